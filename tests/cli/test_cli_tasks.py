"""The command line for vision models, encoders, and encoders with a decoder."""

from __future__ import annotations

import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, StreamlineError, load, perplexity
from streamline_hooks.checkpoint import load_pretrained, task_of_pretrained
from streamline_hooks.cli.parsing import parse_sources
from streamline_hooks.data import image_text_parts, read_image_texts
from streamline_hooks.evaluation import TaskScores, require_same_inputs
from streamline_hooks.modeling import Task, find_stacks
from streamline_hooks.pipeline import CompressionJob, JobData
from tests.commands import run
from tests.data.test_text_batches import tokenizer_of
from tests.image_text_models import llava, llava_processor, write_rows
from tests.other_models import made

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
COUNTS = ["--calibration-examples", 24, "--validation-examples", 8, "--test-examples", 12]
CLASSES = ["ant", "bee", "cat", "dog", "elk"]


def picture(seed: int) -> Any:
    values = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return pillow.fromarray(values.numpy())


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier with its processor, and a folder of images a class."""
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("vision")
    model = made("vit")
    model.config.id2label = dict(enumerate(reversed(CLASSES)))  # not in the order of the folders
    model.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    for k in range(60):
        path = folder / "images" / CLASSES[k % 5] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path)
    return folder / "model", folder / "images"


def test_a_classifier_and_a_folder_of_images(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = vision
    assert task_of_pretrained(model) == Task("image-classification")
    out = tmp_path / "out"
    asked = ["compress", model, "-c", images, "--remove", 1, *COUNTS, "--loss", "kl", "-o", out]
    code, said, err = run(asked, monkeypatch, capsys)
    assert code == 0, err
    assert "data       calibration 24, validation 8, test 12 images" in said
    assert "accuracy, repaired and trained" in said and "labels" not in said
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "image-classification" and "Scores by step" in (out / "report.html").read_text()
    loaded = load(out)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(out)
    from streamline_hooks.data import image_parts, read_images

    own = [loaded.config.id2label[k] for k in range(5)]
    counts = {"calibration": 24, "validation": 8, "test": 12}
    test = image_parts(read_images(images, classes=own), processor, counts, batch_size=4)["test"]
    found = TaskScores(loaded, test, Task("image-classification")).original["accuracy"]
    assert found == report["scores"]["trained"]["accuracy"]


def test_labels_are_numbered_as_the_model_does(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image is in the folder of what the model takes it for, so that the original is always right."""
    from transformers import AutoImageProcessor

    model = load(vision[0])
    processor = AutoImageProcessor.from_pretrained(vision[0])
    for k in range(60):
        with torch.no_grad():
            said = int(model(**processor(picture(k), return_tensors="pt")).logits.argmax())
        path = tmp_path / "images" / model.config.id2label[said] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path)
    assert len(list((tmp_path / "images").iterdir())) > 1
    out = tmp_path / "out"
    asked = ["compress", vision[0], "-c", tmp_path / "images", "--remove", 1, *COUNTS, "-o", out]
    code, _, err = run(asked, monkeypatch, capsys)
    assert code == 0, err
    assert json.loads((out / "report.json").read_text())["scores"]["original"]["accuracy"] == 1.0


def test_ranking_and_a_dry_run(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = vision
    code, said, err = run(["rank", model, "-c", images, "--calibration-examples", 20, "--json"], monkeypatch, capsys)
    assert code == 0, err
    assert json.loads(said)["blocks"] == 4 and json.loads(said)["tokens"] == 20 * 5  # patches, and the class token
    code, said, err = run(
        ["compress", model, "-c", images, *COUNTS, "--dry-run", "-o", tmp_path / "out"], monkeypatch, capsys
    )
    assert code == 0 and "images" in said and "\ntotal " in said and not (tmp_path / "out").exists()
    best = ["compress", model, "-c", images, *COUNTS, "--dry-run", "-o", tmp_path / "out", "--preset", "best"]
    code, _, err = run(best, monkeypatch, capsys)
    assert code == 2 and re.search(r"lm.*kl \+ lm.*image-classification", err)
    assert "of images" not in err, "it was told after they were read"


def test_no_example_is_not_taken_for_the_default(
    vision: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = vision
    code, _, err = run(["rank", model, "-c", images, "--calibration-examples", 0], monkeypatch, capsys)
    assert code == 2 and re.search(r"\b0 images.*calibration.*at least 1", err), err


def test_labels_that_are_not_the_models_are_left_out(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number of a class that is another class of the model's would make an accuracy of nothing."""
    model, images = vision
    (tmp_path / "images").mkdir()
    for number, folder in enumerate(sorted(images.iterdir())):
        (tmp_path / "images" / f"kind {number}").symlink_to(folder)
    out = tmp_path / "out"
    code, said, err = run(
        ["compress", model, "-c", tmp_path / "images", *COUNTS, "-o", out, "--remove", 1], monkeypatch, capsys
    )
    assert code == 0, err
    assert re.search(r"labels +kind 0, kind 1, kind 2, kind 3, \.\.\. .*model's classes \(elk, dog, cat, bee", said)
    assert "accuracy" not in json.loads((out / "report.json").read_text())["scores"]["original"]


def test_parquet_and_a_test_set_of_its_own(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    files = []
    for k in range(100, 120):
        file = BytesIO()
        picture(k).save(file, format="PNG")
        files.append({"bytes": file.getvalue(), "path": f"{k}.png"})
    table = pa.table({"image": files, "label": [k % 5 for k in range(20)]})
    parquet.write_table(table, tmp_path / "test.parquet")
    out = tmp_path / "out"
    asked = ["compress", vision[0], "-c", vision[1], *COUNTS, "--remove", 1, "-o", out]
    code, said, err = run([*asked, "--test", tmp_path / "test.parquet"], monkeypatch, capsys)
    assert code == 0, err
    assert "test 12 images" in said and "accuracy, repaired" in said
    asked[asked.index("--calibration-examples") + 1] = 40
    code, said, err = run([*asked, "--test", vision[1], "--overwrite"], monkeypatch, capsys)
    assert code == 2 and re.search(r"of the test.*calibration part", err)


def words(count: int, seed: int) -> list[str]:
    found = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [str(one) for one in found]


def saved(name: str, folder: Path) -> Path:
    made(name).save_pretrained(folder)
    tokenizer_of(50, model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    return folder


@pytest.mark.long
def test_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved("bert", tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n\n".join(" ".join(words(30, k)) for k in range(80)))
    sizes = ["--calibration-tokens", 600, "--validation-tokens", 200, "--test-tokens", 200, "--sequence-length", 32]
    out = tmp_path / "out"
    asked = ["compress", model, "-c", tmp_path / "text.txt", *sizes, "--remove", 1, "-o", out]
    code, said, err = run([*asked, "--loss", "embedding"], monkeypatch, capsys)
    assert code == 0, err
    assert "cosine, repaired and trained" in said and "1 - cosine" in said
    assert json.loads((out / "report.json").read_text())["task"] == "embedding"
    code, said, err = run([*asked, "--overwrite", "--task", "embedding:pooling=first"], monkeypatch, capsys)
    assert code == 0 and json.loads((out / "report.json").read_text())["task"] == "embedding:pooling=first", err
    code, said, err = run([*asked, "--overwrite", "--loss", "kl"], monkeypatch, capsys)
    assert code == 2 and re.search(r"kl.*for embedding has none.*Use embedding", err)


@pytest.mark.long
def test_an_encoder_with_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, lines = saved("bart decoder", tmp_path / "model"), []
    for k in range(60):
        lines.append(json.dumps({"source": " ".join(words(8, k)), "target": " ".join(words(5, k + 99))}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    asked = ["compress", model, "-c", tmp_path / "pairs.jsonl", *COUNTS, "--remove", 1, "--sequence-length", 32]
    for stack in ("model.encoder.layers", "model.decoder.layers"):
        code, said, err = run([*asked, "--stack", stack, "-o", out, "--overwrite", "--loss", "kl"], monkeypatch, capsys)
        assert code == 0, err
        assert f"stack      {stack}: 4 x" in said and "KL, repaired and trained" in said
        assert json.loads((out / "report.json").read_text())["task"] == "seq2seq"
    best = [*asked, "--stack", "model.decoder.layers", "-o", out, "--overwrite", "--preset", "best"]
    code, said, err = run(best, monkeypatch, capsys)
    assert code == 0, err
    assert "repeated   nothing, in the inputs of a model for seq2seq, although the preset repeats passages" in said
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["history"][0]["validated"] > report["training"]["history"][0]["distance"] + 1
    code, _, err = run([*best, "--repeated-context", 1], monkeypatch, capsys)
    assert code == 2 and re.search(r"apply to text.*batches were given", " ".join(err.split()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], r"needs images.*Expected.*--calibration"),
        (["-c", "self"], r"--calibration self.*models that generate"),
        (["-c", "one:0.5,two:0.5"], r"--calibration with shares.*models that generate"),
        (["-c", "IMAGES", "--pack"], r"--pack.*models that generate"),
        (["-c", "IMAGES", "--memory", "1GB"], r"--memory.*models that generate"),
        (
            ["-c", "IMAGES", "--test-tokens", "99"],
            r"--test-tokens has no effect.*image-class",
        ),
        (["-c", "IMAGES", "--sequence-length", "9"], r"--sequence-length has no effect.*images.*Leave it"),
        (["-c", "IMAGES", "--task", "poetry"], "task 'poetry' is unknown"),
        (["-c", "IMAGES", "--remove", "latency:0.8", *map(str, COUNTS)], "is a generation time"),
    ],
)
def test_what_is_refused(
    more: list[str],
    message: str,
    vision: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, images = vision
    given = [str(images) if one == "IMAGES" else one for one in more]
    code, _, err = run(["compress", model, *given, "-o", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2 and re.search(message, err)


def test_images_with_texts_need_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["rank", saved("clip text", tmp_path / "model"), "-c", "pairs.jsonl"], monkeypatch, capsys)
    assert code == 2 and "no processor for images and text" in err and "Save the processor" in err


def test_a_class_that_is_for_nothing_known_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a causal language model it would be loaded, with a head of random weights."""
    import transformers

    transformers.BertForTokenClassification(made("bert").config).save_pretrained(tmp_path)
    tokenizer_of(50).save_pretrained(tmp_path)
    code, _, err = run(["rank", tmp_path], monkeypatch, capsys)
    assert code == 2 and re.search("BertForTokenClassification, whose task is unknown.*--task", err)
    code, _, err = run(["rank", tmp_path, "--task", "masked-lm"], monkeypatch, capsys)
    assert code == 2 and "no weights for cls.predictions" in err and "random" in err


@pytest.mark.parametrize("command", ["rank", "compress"])
@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("bert", "--calibration-examples", r"embedding of text.*Give --calibration-tokens"),
        ("deit", "--calibration-tokens", r"embedding of images.*Give --calibration-examples"),
        ("deit", "--sequence-length", "model for images.*Leave it out"),
    ],
)
def test_what_has_no_effect_on_embeddings_is_refused_once_it_is_known_of_what_they_are(
    name: str, option: str, message: str, command: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from transformers import ViTImageProcessor

    folder = saved(name, tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    monkeypatch.setattr("streamline_hooks.data.task_batches", lambda *_, **__: pytest.fail("something was read"))
    output = ["-o", tmp_path / "out"] if command == "compress" else []
    code, _, err = run([command, folder, "-c", tmp_path, "--remove", 1, option, 64, *output], monkeypatch, capsys)
    assert code == 2 and re.search(f"{option} has no effect.*{message}", " ".join(err.split()))


@pytest.mark.parametrize(
    ("name", "marks"), [("vit", ["->"]), ("t5 encoder", ["  ", "->"]), ("clip text", ["->", "  "])]
)
def test_the_stacks_of_a_model_for_anything_are_shown(
    name: str, marks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is neither a tokenizer in its folder nor an image processor."""
    model = made(name)
    model.save_pretrained(tmp_path)
    stacks = [f"{mark} {stack.path}" for mark, stack in zip(marks, find_stacks(model), strict=True)]
    code, said, err = run(["inspect", tmp_path], monkeypatch, capsys)
    assert code == 0, err
    first, *others = said.splitlines()
    assert first == f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    assert [line.partition(":")[0] for line in others] == stacks
    rows = json.loads(run(["inspect", tmp_path, "--json"], monkeypatch, capsys)[1])
    assert [("-> " if row["chosen"] else "   ") + row["path"] for row in rows] == stacks


def test_weights_that_are_no_safetensors_and_names_of_the_hub_are_inspected_as_they_are_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("bert", tmp_path / "model")
    torch.save(load(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, said, err = run(["inspect", folder], monkeypatch, capsys)
    assert code == 0 and said.startswith("BertModel, "), err
    monkeypatch.setattr(
        "streamline_hooks.checkpoint.pretrained.task_of_pretrained", lambda name, loading: Task("embedding")
    )
    monkeypatch.setattr(
        "streamline_hooks.checkpoint.pretrained.load_pretrained",
        lambda name, task, loading: load_pretrained(folder, task=task),
    )
    code, again, err = run(["inspect", "somebody/bert"], monkeypatch, capsys)
    assert code == 0 and again == said, err
    code, again, err = run(["diff", "somebody/bert", "somebody/bert"], monkeypatch, capsys)
    assert code == 0 and again.startswith("   0 <- 0"), err


def test_a_command_for_text_takes_no_other_model(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["generate", vision[0], "Once"], monkeypatch, capsys)
    assert code == 2 and re.search(r"is a model for image-classification.*Expected a causal language model", err)
    code, _, err = run(["evaluate", vision[0], "--problems", "probes"], monkeypatch, capsys)
    assert code == 2 and re.search(r"generates text.*is for image-classification.*Expected --text", err)


def test_a_vision_model_is_evaluated_and_swept(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = vision
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    given = ["evaluate", model, "--against", copy, "--text", images, "--items", 20, "--json", "--no-speed"]
    code, out, err = run(given, monkeypatch, capsys)
    assert code == 0, err
    assert "accuracy" in out and json.loads(out)
    swept = ["sweep", model, "-c", images, "--remove", "1,2", "--repair", "none", "-o", tmp_path / "swept", *COUNTS]
    code, out, err = run([*swept, "--no-speed", "--json"], monkeypatch, capsys)
    assert code == 0, err
    points = json.loads(out)["points"]
    assert len(points) == 2 and all(not point.get("refused") for point in points)


@pytest.mark.parametrize("command", ["compress", "plan", "rank", "sweep", "evaluate"])
def test_the_options_that_errors_name_are_there(
    command: str,
    vision: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each error names an option, which is then given to the same command."""
    output = ["-o", tmp_path / "out"] if command in ("compress", "sweep") else []
    given = [command, saved("bert", tmp_path / "bert"), *output, "--task", "masked-lm"]
    code, _, err = run(given, monkeypatch, capsys)
    assert code == 2 and re.search(f"no weights for cls.predictions.*--task of .*{command}", err), err

    model, images = vision
    given = [command, model, *output]
    code, _, err = run(given, monkeypatch, capsys)
    option = "--text" if command == "evaluate" else "--calibration"
    assert code == 2 and re.search(f"ViTForImageClassification needs images.*Expected.*{option}", err), err
    given += [option, images]
    if command == "evaluate":
        given += ["--items", 20]
    else:
        code, _, err = run([*given, "--calibration-tokens", 64], monkeypatch, capsys)
        assert code == 2 and "Give --calibration-examples instead" in err, err
        given += COUNTS[:2] if command == "rank" else COUNTS
        given += {"sweep": ["--remove", 1, "--no-speed"], "rank": []}.get(command, ["--remove", 1])
    code, _, err = run(given, monkeypatch, capsys)
    assert code == 0, err


@pytest.mark.parametrize("command", ["compress", "plan", "rank", "sweep"])
def test_numbers_of_images_are_refused_for_text(
    command: str,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ["-o", tmp_path / "out"] if command in ("compress", "sweep") else []
    code, _, err = run([command, stories_folder, *output, "--calibration-examples", 9], monkeypatch, capsys)
    assert code == 2 and "--calibration-examples has no effect" in err, err


def test_models_that_read_their_inputs_differently_are_not_compared(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original would be given what the processor of the other model makes."""
    from transformers import ViTImageProcessor

    model, images = vision
    darker = Path(shutil.copytree(model, tmp_path / "darker"))
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.9, 0.9, 0.9]).save_pretrained(darker)
    given = ["evaluate", model, "--against", darker, "--text", images, "--items", 8, "--no-speed"]
    code, _, err = run(given, monkeypatch, capsys)
    assert code == 2 and re.search(r"image_mean is .*0\.5.* and .*0\.9.*Expected the same settings", err), err
    assert "size" not in err
    with pytest.raises(StreamlineError, match="ViTImageProcessor, the other a .*Expected two models for"):
        require_same_inputs(ViTImageProcessor(), tokenizer_of(50))

    (tmp_path / "text.txt").write_text("\n\n\n".join(" ".join(words(30, k)) for k in range(20)))
    encoder = saved("bert", tmp_path / "encoder")
    given = ["evaluate", encoder, "--text", tmp_path / "text.txt", "--text-tokens", 60, "--window", 32, "--against"]
    same = shutil.copytree(encoder, tmp_path / "same")
    code, _, err = run([*given, same], monkeypatch, capsys)
    assert code == 0, err
    other = shutil.copytree(encoder, tmp_path / "other")
    tokenizer_of(50, "$A [SEP]", model_input_names=["input_ids", "attention_mask"]).save_pretrained(other)
    code, _, err = run([*given, other], monkeypatch, capsys)
    assert code == 2 and re.search("tokenizers.*differently.*Expected the same", err), err


def test_a_model_for_images_with_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of images with texts go through its processor, and plain text through its tokenizer."""
    folder, rows = tmp_path / "model", write_rows(tmp_path / "rows", 44)
    llava().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    given = ["compress", folder, "-c", rows, "--remove", 1, *COUNTS, "--no-speed", "--no-generation", "-o"]
    code, out, err = run([*given, tmp_path / "out", "--json"], monkeypatch, capsys)
    assert code == 0, err
    assert "image" in err and json.loads(out)["task"] == "causal-lm"
    code, out, err = run(["rank", folder, "-c", rows, "--calibration-examples", 20, "--json"], monkeypatch, capsys)
    assert code == 0, err
    images = json.loads(out)["tokens"]
    assert images > 20 * 5  # an image takes five places, and each text has three words at least
    code, _, err = run([*given[:-1], "-o", tmp_path / "no", "--test-tokens", 9, "-c", "pydoc"], monkeypatch, capsys)
    assert code == 2 and not (tmp_path / "no").exists(), err


@pytest.mark.parametrize("kind", ["images", "images with texts"])
def test_passages_of_a_preset_are_repeated_in_text_only(kind: str, vision: tuple[Path, Path], tmp_path: Path) -> None:
    """Also in a sweep, which loads the data of a job without checking its options."""
    folder, source = vision
    if kind == "images with texts":
        folder, source = tmp_path / "model", write_rows(tmp_path / "rows", 44)
        llava().save_pretrained(folder)
        llava_processor().save_pretrained(folder)
    preset = CompressionConfig.preset("best", remove=1)
    examples = {"calibration": 20, "validation": 8, "test": 8}
    job = CompressionJob(
        str(folder), preset, tmp_path / "out", JobData(parse_sources([str(source)]), examples=examples)
    )
    job.load()
    assert preset.data.repeated_context == 1 and job.config.data.repeated_context == 0
    if kind == "images with texts":
        job = CompressionJob(str(folder), preset, tmp_path / "out", JobData(parse_sources(["pydoc"])))
        job.check()
        assert job.config.data.repeated_context == 1


def test_a_model_for_images_with_texts_is_evaluated_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts of such a file alone, without their images, have another perplexity."""
    folder, rows = tmp_path / "model", write_rows(tmp_path / "rows", 16, prompt="which color?")
    llava().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    given = ["evaluate", folder, "--json", "--no-speed", "--text"]
    code, out, err = run([*given, rows, "--items", 12, "--batch-size", 4], monkeypatch, capsys)
    assert code == 0, err
    parts = image_text_parts(read_image_texts(rows), llava_processor(), {"test": 12}, batch_size=4)
    expected = perplexity(llava(), parts["test"])
    found = json.loads(out)["perplexity"][str(rows)]
    assert (found["value"], found["tokens"]) == (pytest.approx(expected.value, rel=1e-6), expected.tokens)
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4")
    code, out, err = run([*given, tmp_path / "text.txt"], monkeypatch, capsys)
    assert code == 0 and json.loads(out)["perplexity"]["text"]["tokens"] == 4, err
    (folder / "processor_config.json").unlink()
    code, _, err = run([*given, rows, "--items", 12], monkeypatch, capsys)
    assert code == 2 and re.search("no processor for images and text.*Expected", err)


def test_a_pooler_that_was_not_saved_is_not_made_up(
    vision: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    model, out = tmp_path / "model", tmp_path / "out"
    transformers.ViTModel(made("vit").config, add_pooling_layer=False).save_pretrained(model)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    assert load_pretrained(model, task=Task("embedding"))[0].pooler is None
    code, _, err = run(
        ["compress", model, "-c", vision[1], "--remove", 1, *COUNTS, "--repair", "linear", "-o", out],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    assert len(find_stacks(load(out))[0]) == 3 and load(out).pooler is None


@pytest.mark.parametrize(("mode", "pooling"), [("cls_token", "first"), ("lasttoken", "last"), ("mean_tokens", "mean")])
def test_the_pooling_of_sentence_transformers_is_read(
    mode: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("bert", tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    said = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "lasttoken", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **said}))
    assert task_of_pretrained(folder) == Task("embedding", pooling)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert task_of_pretrained("~/model") == Task("embedding", pooling)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(StreamlineError, match="pooling_mode_max_tokens"):
        task_of_pretrained(folder)


def test_ranking_goes_by_the_task_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked, answers = saved("bert", tmp_path / "model"), [], Task.answers
    (tmp_path / "text.txt").write_text("\n\n\n".join(" ".join(words(30, k)) for k in range(80)))

    def watched(self: Task, output: Any, given: Any) -> torch.Tensor:
        asked.append(str(self))
        return answers(self, output, given)

    monkeypatch.setattr(Task, "answers", watched)
    sizes = ["--calibration-tokens", 200, "--sequence-length", 32, "--remove", 1, "--criterion", "kl"]
    options = ["-c", tmp_path / "text.txt", *sizes, "--task", "embedding:pooling=first"]
    code, _, err = run(["rank", model, *options], monkeypatch, capsys)
    assert code == 0, err
    assert set(asked) == {"embedding:pooling=first"}

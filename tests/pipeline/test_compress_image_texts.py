"""Image-text models: compressed on images with texts, saved with their processor, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import StreamlineError, compress, find_stack, load, perplexity
from streamline_hooks.checkpoint import load_pretrained, load_processor
from streamline_hooks.data import TextSources, image_text_parts, read_image_texts
from streamline_hooks.evaluation import Suite
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import suite_for_model
from streamline_hooks.pipeline.job import takes_documents
from streamline_hooks.testing import tiny_model
from tests.commands import run
from tests.configured import configured
from tests.image_text_models import BOTH, write_rows

COUNTS = {"calibration": 12, "validation": 4, "test": 4}


@pytest.mark.parametrize("name", BOTH)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    make, processor = BOTH[name]
    original = make()
    original.save_pretrained(tmp_path / "original")
    processor().save_pretrained(tmp_path / "original")
    model, _ = load_pretrained(tmp_path / "original")
    assert type(model) is type(original), "the class that sees images, though it is for causal language models"
    loaded = load_processor(tmp_path / "original")
    assert type(loaded) is type(processor())
    rows = read_image_texts(write_rows(tmp_path / "rows", 20, prompt="which color?"))
    parts = image_text_parts(rows, loaded, COUNTS, batch_size=5)
    before = perplexity(model, parts["test"])
    labeled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in parts["test"])
    result = compress(model, parts, configured(remove=1, shortlist=2), tokenizer=loaded, output=tmp_path / "small")
    assert len(find_stack(model)) == 3 and before.tokens == labeled
    assert result.perplexities["original"] == pytest.approx(before.value, rel=1e-5)
    again, processed = load(tmp_path / "small"), load_processor(tmp_path / "small")
    assert processed.chat_template == loaded.chat_template
    same = image_text_parts(rows, processed, COUNTS, batch_size=5)
    last = next(result.perplexities[label] for label in ("repaired", "removed") if label in result.perplexities)
    assert perplexity(again, same["test"]).value == pytest.approx(last, rel=1e-5)


def test_a_folder_without_a_processor_is_refused_with_a_reason(tmp_path: Path) -> None:
    BOTH["llava"][1]().tokenizer.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StreamlineError, match=r"no processor for images and text.*Expected.*Save"):
            load_processor(folder)


def test_a_processor_is_needed_for_images_only(tmp_path: Path) -> None:
    """Text alone goes through the tokenizer, as of any causal language model."""
    make, processor = BOTH["llava"]
    make().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    model, tokenizer = load_pretrained(tmp_path)
    ids: Any = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids).logits.shape == (1, ids.shape[1], 64)


@pytest.mark.parametrize("command", ["compress", "rank", "evaluate"])
def test_the_processor_is_that_of_the_revision(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, processor = BOTH["llava"]
    make().save_pretrained(tmp_path / "original")
    processor().save_pretrained(tmp_path / "original")
    asked = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append(options)
        raise OSError("Stopped")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", from_pretrained)
    more = ["--remove", 1, "-o", tmp_path / "small"] if command == "compress" else []
    source = "--text" if command == "evaluate" else "--calibration"
    given = [command, tmp_path / "original", source, write_rows(tmp_path / "rows", 6), *more]
    code, _, err = run([*given, "--revision", "v1", "--trust-remote-code"], monkeypatch, capsys)
    assert code == 2 and "Stopped" in err
    assert asked == [{"revision": "v1", "trust_remote_code": True}]


def test_images_with_texts_are_never_read_as_their_captions(tmp_path: Path) -> None:
    make, processor = BOTH["llava"]
    model, task = make(), Task("causal-lm")
    make().save_pretrained(tmp_path / "original")
    processor().save_pretrained(tmp_path / "original")
    path = str(write_rows(tmp_path / "rows", 6))
    assert not takes_documents(model, task, TextSources((path,))) and takes_documents(model, task, TextSources())
    mixed = TextSources((path, "pydoc"))
    assert takes_documents(tiny_model("llama"), task, mixed), "a model for text reads the captions"
    with pytest.raises(StreamlineError, match=r"rows\.jsonl has images.*pydoc has text without.*Expected.*Leave"):
        takes_documents(model, task, mixed)
    for image in (tmp_path / "rows").glob("*.png"):
        image.unlink()
    with pytest.raises(StreamlineError, match=r"no image file '0\.png'"):
        suite_for_model(tmp_path / "original", model, processor(), Suite(text=[path]), task)

"""Likelihoods of whole documents are those of lm-eval."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.evaluation.sliding_perplexity import sliding_perplexity
from tests.evaluation.local_tasks import write_texts

sliding = import_module("streamline_hooks.evaluation.sliding_perplexity")  # the package has a function of this name

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")


def harness(model: Any, tokenizer: Any, folder: Path, *tasks: str, add_bos: bool | None = None) -> dict[str, Any]:
    """What lm-eval says, asked without this library, with what it says of each document."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, add_bos_token=add_bos)
    found = evaluate(lm, manager.load(list(tasks)))
    assert found is not None
    return found


def documents(data_folder: Path, story_texts: list[str]) -> list[str]:
    """Longer than the model's positions and shorter, of ASCII and not, and empty ones."""
    kept = (data_folder / "text" / "heldout" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    assert not kept[4000:7000].isascii()
    return [kept[4000:7000], " ".join(story_texts[:6]), story_texts[7], "Äpfel 日本語 für", "", " once upon \n"]


@given(st.integers(0, 200), st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))))
def test_the_windows_are_the_same_for_every_stride(tokens: int, sizes: tuple[int, int]) -> None:
    from lm_eval.utils import get_rolling_token_windows

    window, stride = sizes
    text = list(range(1, tokens + 1))
    theirs = list(get_rolling_token_windows(text, 0, window, window - stride + 1))
    row = [0, *text]
    ours = [
        (row[part.start : part.end], row[part.end - part.scored + 1 : part.end + 1])
        for part in sliding.sliding_windows(0, tokens, window, stride)
    ]
    assert ours == theirs


@pytest.mark.parametrize("add_bos", [None, False], ids=["as the tokenizer does", "no special tokens"])
def test_whole_documents(
    add_bos: bool | None, stories: tuple[Any, Any], story_texts: list[str], data_folder: Path, tmp_path: Path
) -> None:
    """The tokenizer puts a BOS in front, and lm-eval, unless it is told not to, lets it be predicted from another."""
    model, tokenizer = stories
    texts = documents(data_folder, story_texts)
    window = model.config.max_position_embeddings
    found = harness(model, tokenizer, write_texts(tmp_path, "texts", texts), "texts", add_bos=add_bos)
    asked: dict[str, Any] = {"window": window, "stride": window, "add_special_tokens": add_bos is None}
    ours = sliding_perplexity(model, tokenizer, texts, **asked)
    theirs = found["results"]["texts"]
    assert 2**ours.bits_per_byte == pytest.approx(theirs["byte_perplexity,none"], rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)
    for text, sample in zip(texts, found["samples"]["texts"], strict=True):
        one = sliding_perplexity(model, tokenizer, [text], **asked)
        assert -one.nll == pytest.approx(sample["resps"][0][0], rel=1e-6, abs=1e-4)
        assert one.bytes == sample["byte_perplexity"][1]
    shifted = sliding_perplexity(model, tokenizer, texts, **{**asked, "stride": window - 1})
    assert shifted.bits_per_byte != pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)


@pytest.mark.slow
def test_a_real_model(smollm2: tuple[Any, Any], data_folder: Path, tmp_path: Path) -> None:
    """Its tokenizer adds no BOS; documents begin with the one that it has."""
    model, tokenizer = smollm2
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 64  # so that a document is longer than a window
    text = (data_folder / "text" / "heldout" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    texts = [text[4000:4500], "Äpfel 日本語 für"]
    write_texts(tmp_path, "texts", texts)
    found = harness(model, tokenizer, tmp_path, "texts")
    ours = sliding_perplexity(model, tokenizer, texts, window=64, stride=64)
    assert ours.tokens > 100
    assert ours.bits_per_byte == pytest.approx(found["results"]["texts"]["bits_per_byte,none"], rel=1e-5)

"""Our numbers are lm-eval's own: whole documents, and choices."""

from __future__ import annotations

import copy
import gzip
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.evaluation import sliding
from streamline_hooks.evaluation.choices import score_choices
from streamline_hooks.evaluation.questions import Question, read_questions
from streamline_hooks.evaluation.sliding import sliding_perplexity
from tests.integrations.local_tasks import write_questions, write_texts

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

BENCHES = ("arc_easy", "boolq", "commonsense_qa", "copa", "hellaswag_val", "piqa", "winograd_wsc")
CONTEXTS = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}


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


def likelihoods(found: dict[str, Any], task: str) -> list[list[float]]:
    return [[response[0][0] for response in sample["resps"]] for sample in found["samples"][task]]


def rows_of(data_folder: Path, bench: str, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first questions of a file that fit into a small model."""
    path = next((data_folder / "bench").glob(f"{bench}.jsonl*"))
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    short = (row for row in rows if len(tokenizer(json.dumps(row))["input_ids"]) < 400)
    return [row for row, _ in zip(short, range(count), strict=False)]


def pairs_of(data_folder: Path, count: int) -> list[dict[str, Any]]:
    """Sentences of which the first is the grammatical one."""
    with zipfile.ZipFile(data_folder / "bench" / "blimp.zip") as packed:
        name = next(name for name in packed.namelist() if name.endswith("anaphor_number_agreement.jsonl"))
        rows = [json.loads(line) for line in packed.read(name).splitlines()[:count]]
    return [{"query": "", "choices": [row["sentence_good"], row["sentence_bad"]], "gold": 0} for row in rows]


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
    assert ours.word_perplexity == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
    assert 2**ours.bits_per_byte == pytest.approx(theirs["byte_perplexity,none"], rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)
    for text, sample in zip(texts, found["samples"]["texts"], strict=True):
        one = sliding_perplexity(model, tokenizer, [text], **asked)
        assert -one.nll == pytest.approx(sample["resps"][0][0], rel=1e-6, abs=1e-4)
        assert one.words == sample["word_perplexity"][1] and one.bytes == sample["byte_perplexity"][1]
    shifted = sliding_perplexity(model, tokenizer, texts, **{**asked, "stride": window - 1})
    assert shifted.bits_per_byte != pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)


def test_choices(stories: tuple[Any, Any], data_folder: Path, tmp_path: Path) -> None:
    """By queries, by contexts, and by sentences alone."""
    model, tokenizer = stories
    for bench in BENCHES:
        settings = CONTEXTS if bench == "winograd_wsc" else {}
        write_questions(tmp_path, bench, rows_of(data_folder, bench, tokenizer, 20), **settings)
    write_questions(tmp_path, "pairs", pairs_of(data_folder, 20), doc_to_text="", target_delimiter="")
    found = harness(model, tokenizer, tmp_path, *BENCHES, "pairs")
    for task in (*BENCHES, "pairs"):
        questions = read_questions(tmp_path / f"{task}.jsonl")
        ours = score_choices(model, tokenizer, questions, add_bos=True)
        compare(ours, found, task, normalised=task != "winograd_wsc")
        if task == "winograd_wsc":  # lm-eval divides by the lengths of what it calls the choices: here the contexts
            each = zip(ours.loglikelihoods, questions, strict=True)
            right = [by_length(found_, q.contexts) == q.gold for found_, q in each]
            assert sum(right) / len(right) == pytest.approx(found["results"][task]["acc_norm,none"], abs=1e-12)


def by_length(loglikelihoods: Sequence[float], texts: Sequence[str]) -> int:
    values = [value / len(text) for value, text in zip(loglikelihoods, texts, strict=True)]
    return values.index(max(values))


def compare(ours: Any, found: dict[str, Any], task: str, normalised: bool = True) -> None:
    theirs = found["results"][task]
    for mine, other in zip(ours.loglikelihoods, likelihoods(found, task), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-4), task
    assert ours.accuracy == pytest.approx(theirs["acc,none"], abs=1e-12)
    assert ours.standard_error == pytest.approx(theirs["acc_stderr,none"], abs=1e-12)
    if normalised:
        assert ours.normalised_accuracy == pytest.approx(theirs["acc_norm,none"], abs=1e-12)
        assert ours.normalised_standard_error == pytest.approx(theirs["acc_norm_stderr,none"], abs=1e-12)


def test_where_white_space_meets(stories: tuple[Any, Any], tmp_path: Path) -> None:
    """lm-eval puts its delimiter beside white space that is there already, and before a sentence without a context.

    What it then scores is another text: two spaces, or a space first. Given that text, both say the same.
    """
    model, tokenizer = stories
    rows = [
        {"query": "The sun was ", "choices": ["shining.", "sad."], "gold": 0},
        {"query": "The sun was", "choices": [" shining.", " sad."], "gold": 0},
        {"query": "", "choices": ["The sun was shining.", "The sun were shining."], "gold": 0},
    ]
    found = harness(model, tokenizer, write_questions(tmp_path, "ends", rows), "ends")
    theirs = likelihoods(found, "ends")
    ours = score_choices(model, tokenizer, read_questions(tmp_path / "ends.jsonl"), add_bos=True).loglikelihoods
    same = [
        Question(("The sun was",) * 2, ("  shining.", "  sad."), 0),
        Question(("The sun was",) * 2, ("  shining.", "  sad."), 0),
        Question(("",) * 2, (" The sun was shining.", " The sun were shining."), 0),
    ]
    given_that = score_choices(model, tokenizer, same, add_bos=True).loglikelihoods
    for mine, shifted, other in zip(ours, given_that, theirs, strict=True):
        assert shifted == pytest.approx(other, rel=1e-5, abs=1e-4)
        assert mine != pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_a_real_model(smollm2: tuple[Any, Any], data_folder: Path, tmp_path: Path) -> None:
    """Its tokenizer adds no BOS; documents begin with the one that it has."""
    model, tokenizer = smollm2
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 64  # so that a document is longer than a window
    text = (data_folder / "text" / "heldout" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    texts = [text[4000:4500], "Äpfel 日本語 für"]
    write_texts(tmp_path, "texts", texts)
    tasks = ("arc_easy", "hellaswag_val", "pairs")
    for bench in tasks[:2]:
        write_questions(tmp_path, bench, rows_of(data_folder, bench, tokenizer, 3))
    write_questions(tmp_path, "pairs", pairs_of(data_folder, 4), doc_to_text="", target_delimiter="")
    found = harness(model, tokenizer, tmp_path, "texts")
    ours = sliding_perplexity(model, tokenizer, texts, window=64, stride=64)
    assert ours.tokens > 100
    assert ours.bits_per_byte == pytest.approx(found["results"]["texts"]["bits_per_byte,none"], rel=1e-5)
    assert ours.word_perplexity == pytest.approx(found["results"]["texts"]["word_perplexity,none"], rel=1e-4)
    found = harness(smollm2[0], tokenizer, tmp_path, *tasks)
    for task in tasks:
        compare(score_choices(smollm2[0], tokenizer, read_questions(tmp_path / f"{task}.jsonl")), found, task)

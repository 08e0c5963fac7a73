"""Compressions that remove only as many blocks as keep the losses within limits, and say what they tested."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from streamline_hooks import CompressionConfig, CompressionResult, DistillationConfig, StreamlineError, compress, load
from streamline_hooks.data import TokenSplit
from streamline_hooks.evaluation import Guarantee, guarantee, run_tasks, task_config_from_rows
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import compress_checkpoint, fit_depths, fit_prompt_skip, sweep
from streamline_hooks.pipeline.config import RunOptions
from streamline_hooks.repair import BlockConfig, FoldedConfig, ReplacementConfig
from streamline_hooks.selection import Target
from streamline_hooks.testing import tiny_model
from tests.tiny_models import left_padded

DOCUMENTS = list(torch.randint(3, 60, (96, 10), generator=torch.Generator().manual_seed(0)).split(4))
DATA, UNSEEN = DOCUMENTS[:12], DOCUMENTS[12:]


def compressed(limit: float, measure: str = "kl", **fields: Any) -> CompressionResult:
    given: dict[str, Any] = {"at_most": {measure: limit}, "guarantee_data": {measure: UNSEEN}, "remove": 4}
    return compress(tiny_model("llama"), DATA, **{**given, **fields})


def statements_of(result: CompressionResult, measure: str = "kl") -> dict[int, Guarantee]:
    assert result.bounded is not None
    return {depth: dict(statements)[measure] for depth, statements in result.bounded.statements.items()}  # type: ignore[index]


@pytest.fixture(scope="module")
def bounds() -> dict[int, float]:
    """The bound at each depth, tested with a limit that all pass."""
    return {depth: statement.bound for depth, statement in statements_of(compressed(0.999)).items()}


def test_the_largest_window_within_the_limit_is_removed(bounds: dict[int, float]) -> None:
    assert list(bounds) == [7, 6, 4] and bounds[7] < bounds[6] < bounds[4]
    for depth, limit in ((4, 0.999), (6, (bounds[6] + bounds[4]) / 2), (7, (bounds[7] + bounds[6]) / 2)):
        result = compressed(limit)
        assert result.bounded is not None
        assert len(result.plan.slots) == depth == result.bounded.depth
        assert result.candidates[0].blocks == set(result.plan.removed)
        assert ("first_repaired" in result.perplexities) == ("first_removed" in result.perplexities) == False  # noqa: E712


@pytest.mark.parametrize("repair", [None, FoldedConfig(), BlockConfig()])
def test_the_tested_model_is_the_compressed_one(repair: ReplacementConfig | None, bounds: dict[int, float]) -> None:
    limit = (bounds[6] + bounds[4]) / 2 if repair is None else 0.999
    result = compressed(limit, **({} if repair is None else {"repair": repair}))
    assert result.bounded is not None and result.bounded.depth == len(result.plan.slots)
    assert statements_of(result)[result.bounded.depth] == guarantee(tiny_model("llama"), result.model, UNSEEN, "kl")


def test_the_windows_lie_inside_the_one_that_is_removed_without_a_limit(bounds: dict[int, float]) -> None:
    whole = set(compress(tiny_model("llama"), DATA, remove=4).plan.removed)
    half = set(compressed((bounds[6] + bounds[4]) / 2).plan.removed)
    assert len(half) == 2 and half < whole


def test_all_limits_must_hold(bounds: dict[int, float]) -> None:
    limits = {"kl": 0.999, "disagreement": 0.6}
    result = compressed(0.0, at_most=limits, guarantee_data=dict.fromkeys(limits, UNSEEN))
    bound = {depth: statement.bound for depth, statement in statements_of(result, "disagreement").items()}
    depths = list(bound)
    assert result.bounded is not None and all(bound[depth] <= 0.6 for depth in depths if depth >= result.bounded.depth)
    assert depths[-1] < result.bounded.depth and bound[depths[-1]] > 0.6
    assert str(result.bounded).count("at most") == 2 and "at most 0.6" in str(result.bounded)


def test_an_error_says_how_many_documents_are_needed_and_leaves_the_model_unchanged(bounds: dict[int, float]) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given: dict[str, Any] = {"remove": 4, "guarantee_data": {"kl": UNSEEN}}
    with pytest.raises(StreamlineError, match=r"(?s)48 documents.*For kl, about [\d,]+ units would be enough"):
        compress(model, DATA, at_most={"kl": bounds[7] - 1e-4}, **given)
    with pytest.raises(StreamlineError, match="more than a million units would be needed, or none is enough"):
        compress(model, DATA, at_most={"kl": 1e-6}, **given)
    assert len(model.model.layers) == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_number_of_blocks_that_cannot_be_removed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_hooks.core import UnsupportedSurgery
    from streamline_hooks.pipeline import depths

    verify = depths.verify_shortlist

    def refused(model: Any, selections: Any, *args: Any, **options: Any) -> Any:
        if len(selections[0].blocks) == 2:
            raise UnsupportedSurgery("Planted.", "planted")
        return verify(model, selections, *args, **options)

    monkeypatch.setattr(depths, "verify_shortlist", refused)
    result = compressed(0.999)
    assert list(statements_of(result)) == [7, 4] and len(result.plan.slots) == 4


def test_the_limit_is_in_the_card_the_report_and_the_config(tmp_path: Path) -> None:
    """The bound of the chosen depth is not, because it was used to choose it."""
    folder = tmp_path / "small"
    result = compressed(0.999, output=folder, delta=0.1)
    statement = statements_of(result)[4]
    assert statement.delta == 0.1 and statement.units == 48
    text = (
        f"with probability 0.9: expected KL divergence per token, clipped at 1 nat, at most 0.999 ({statement.sample})"
    )
    assert str(result.bounded) == text and text in result.table()
    card = (folder / "README.md").read_text()
    assert f"- Bounded losses, relative to the model before this change, {text}.\n" in card
    assert f"{statement.bound:.3f}" not in card
    report = json.loads((folder / "report.json").read_text())
    assert report["bounded"]["statements"]["4"]["kl"] == statement.to_dict()
    saved = CompressionConfig.load(folder)
    assert saved.at_most == {"kl": 0.999} and saved.delta == 0.1
    assert guarantee(tiny_model("llama"), load(folder), UNSEEN, "kl", delta=0.1) == statement


def test_losses_are_relative_to_a_given_teacher(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    with torch.no_grad():
        teacher.model.layers[5].mlp.down_proj.weight.mul_(3)
    result = compressed(0.999, teacher=teacher, output=tmp_path / "small")
    assert statements_of(result)[4] == guarantee(teacher, result.model, UNSEEN, "kl")
    assert "relative to the given teacher" in (tmp_path / "small" / "README.md").read_text()


def test_the_drop_in_accuracy_is_bounded_on_tasks(stories: tuple[Any, Any], story_texts: list[str]) -> None:
    rows = [{"goal": f"{number} and", "sol1": "one", "sol2": "two", "label": number % 2} for number in range(24)]
    task = task_config_from_rows(rows, "choices")
    original, tokenizer = stories
    sizes = {"sequence_length": 64, "calibration_tokens": 640, "validation_tokens": 128, "test_tokens": 128}
    config = CompressionConfig(remove=1).updated({f"data.{name}": size for name, size in sizes.items()})
    given: dict[str, Any] = {"tokenizer": tokenizer, "inplace": False}
    result = compress(
        original, story_texts, config, at_most={"accuracy_drop": 0.9}, guarantee_data={"accuracy_drop": [task]}, **given
    )
    (statement,) = statements_of(result, "accuracy_drop").values()
    before, after = (run_tasks(model, tokenizer, [task])["choices"].scores for model in (original, result.model))
    assert statement.units == 24 and list(statement.losses) == [a - b for a, b in zip(before, after, strict=True)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"at_most": {"kl": 0.5}, "guarantee_data": {}}, "guarantee_data has no measure, and at_most kl"),
    "empty data": ({"guarantee_data": {"kl": []}}, "the data for kl are empty"),
    "a generator": ({"guarantee_data": {"kl": {1: 2}}}, "guarantee_data"),
    "data without a limit": ({"at_most": None}, "the config has no at_most"),
    "a probability without a limit": ({"at_most": None, "guarantee_data": {}, "delta": 0.1}, "delta=0.1 has no effect"),
    "an unknown measure": ({"at_most": {"perplexity": 0.5}}, "accuracy_drop, disagreement, kl"),
    "a limit of 1": ({"at_most": {"kl": 1.0}}, "between 0 and 1"),
    "training": ({"distillation": DistillationConfig()}, "a distillation"),
    "a size": ({"remove": Target(parameters=0.2)}, "the target parameters"),
    "another task": ({"task": Task("embedding")}, "at_most was given with task=embedding"),
    "documents of the calibration": (
        {"guarantee_data": {"kl": [*UNSEEN, DATA[3]]}}, "4 of 52 documents.*also among",
    ),
    "the same document twice": ({"guarantee_data": {"kl": [*UNSEEN, UNSEEN[0][:1]]}}, "1 of 49 documents occur twice"),
    "text without a tokenizer": ({"guarantee_data": {"kl": ["One text."]}}, "without a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_a_wrong_statement_is_refused_before_a_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, message = REFUSED[case]
    monkeypatch.setattr("streamline_hooks.pipeline.one_round.CompressionRun.profile", None)
    with pytest.raises(StreamlineError, match=message):
        compressed(0.5, **fields)


def test_models_that_do_not_predict_tokens_are_refused() -> None:
    model = AutoModel.from_config(tiny_model("bert").config).eval()
    given: dict[str, Any] = {"remove": 1, "guarantee_data": {"kl": UNSEEN}, "at_most": {"kl": 0.5}}
    with pytest.raises(StreamlineError, match="compares predictions of tokens"):
        compress(model, DATA, **given)


def test_padding_does_not_hide_a_document_of_the_calibration() -> None:
    padded = left_padded(4, 10)
    rows = [row[mask.bool()] for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    given: dict[str, Any] = {"at_most": {"kl": 0.5}, "guarantee_data": {"kl": [row[None] for row in rows]}}
    with pytest.raises(StreamlineError, match="4 of 4 documents"):
        compress(tiny_model("llama"), [*DATA, padded, DOCUMENTS[20]], **given)


def test_documents_are_given_as_text(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    texts = [f"There were {number} birds in the garden, and nobody counted the others." for number in range(90)]
    same = [f"Nobody knew the {number} songs that the birds sang over there." for number in range(40)]
    sizes = {"sequence_length": 32, "calibration_tokens": 640, "validation_tokens": 160, "test_tokens": 160}
    config = CompressionConfig(remove=1).updated({f"data.{name}": size for name, size in sizes.items()})
    given: dict[str, Any] = {"tokenizer": tokenizer, "inplace": False, "at_most": {"disagreement": 0.99}}
    result = compress(model, texts, config, guarantee_data={"disagreement": same}, **given)
    assert [statement.units for statement in statements_of(result, "disagreement").values()] == [40]
    with pytest.raises(StreamlineError, match="1 of 41 documents"):
        compress(model, texts, config, guarantee_data={"disagreement": [*same, texts[5]]}, **given)
    with pytest.raises(StreamlineError, match="1 of 41 documents"):
        compress(
            model, texts, config, guarantee_data={"disagreement": [*same, "A text."]}, test_texts=["A text."], **given
        )


def test_data_of_another_form_are_not_compared_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.cat(DATA)
    split = TokenSplit(rows[:32], rows[32:40], rows[40:], "fingerprint")
    given: dict[str, Any] = {"at_most": {"kl": 0.999}, "guarantee_data": {"kl": UNSEEN}, "remove": 4}
    with caplog.at_level(logging.WARNING, logger="streamline_hooks"), pytest.raises(StreamlineError):
        compress(tiny_model("llama"), split, **given)  # text needs a tokenizer
    assert "guarantee_data was not compared" in caplog.text


def test_functions_that_bound_nothing_refuse_limits(tmp_path: Path) -> None:
    config, model = CompressionConfig(remove=2, at_most={"kl": 0.5}), tiny_model("llama")
    calls: dict[str, Any] = {
        "fit_depths: .*choose_depth": lambda: fit_depths(model, DATA, [7], config),
        "fit_prompt_skip: .*at_most": lambda: fit_prompt_skip(model, DATA, 2, config),
        "sweep: .*at_most": lambda: sweep(model, DATA, config, remove=[2], repair=[FoldedConfig()]),
        "at_most, which compares whole models": lambda: compress_checkpoint(
            "model", ["Text."], config, tokenizer=None, output=tmp_path / "small"
        ),
        "the options have guarantee_data": lambda: compress_checkpoint(
            "model", ["Text."], tokenizer=None, output=tmp_path, options=RunOptions(guarantee_data={"kl": UNSEEN})
        ),
    }
    for message, call in calls.items():
        with pytest.raises(StreamlineError, match=message):
            call()


def test_the_given_model_may_be_kept(bounds: dict[int, float]) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    given: dict[str, Any] = {"remove": 4, "guarantee_data": {"kl": UNSEEN}, "at_most": {"kl": 0.999}}
    result = compress(model, DATA, inplace=False, **given)
    assert {depth: statement.bound for depth, statement in statements_of(result).items()} == bounds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_documents_of_the_compression_are_found_whatever_surrounds_them(
    stories: tuple[Any, Any], story_texts: list[str]
) -> None:
    """Documents are read without outer whitespace, and other readers keep it."""
    model, tokenizer = stories
    documents = [f" {text}\n" for text in story_texts[:20]]
    with pytest.raises(StreamlineError, match="20 of 20 documents in guarantee_data"):
        compress(
            model, story_texts, tokenizer=tokenizer, remove=1, at_most={"kl": 0.9}, guarantee_data={"kl": documents}
        )

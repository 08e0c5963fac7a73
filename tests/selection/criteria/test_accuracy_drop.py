"""The accuracy that is lost with a window, against the shorter model asked outright."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation.choices import score_choices
from streamline_hooks.selection.criteria import CRITERIA, accuracy_drop, combined, register_criterion, score_windows
from tests.evaluation.test_choices import Numbers, questions_of
from tests.tiny_models import BLOCKS, tiny_model, tokens

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


def test_it_equals_the_shorter_models_accuracy() -> None:
    model = tiny_model("llama")
    questions = questions_of(tiny_model("qwen3"), count=20, choices=3, seed=1)
    whole = score_choices(model, Numbers(), questions)
    keys = list(model.state_dict())
    for normalised in (False, True):
        criterion = accuracy_drop(questions, Numbers(), normalised=normalised)
        scores = score_windows(criterion, WINDOWS, model=model, batches=[])
        for score, window in zip(scores, WINDOWS, strict=True):
            with LayerSurgeon(model) as surgeon:
                surgeon.remove(window)
                short = score_choices(model, Numbers(), questions)
            expected = (
                short.normalised_accuracy - whole.normalised_accuracy if normalised else short.accuracy - whole.accuracy
            )
            assert score == pytest.approx(expected, abs=1e-12)
    assert list(model.state_dict()) == keys


def test_from_a_file_and_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    questions = questions_of(model, count=12, choices=4, seed=2)
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(json.dumps({"query": q.contexts[0], "choices": q.continuations, "gold": q.gold}) for q in questions)
    )
    expected = score_windows(accuracy_drop(questions, Numbers()), WINDOWS, model=model, batches=[])
    try:
        register_criterion(replace(accuracy_drop(path, Numbers()), name="mine"))
        assert score_windows("mine", WINDOWS, model=model, batches=[]) == expected
        both = combined({"mine": 1.0, "cosine": 1.0})
        assert len(score_windows(both, WINDOWS, model=model, batches=[tokens(2, 8)])) == 3
    finally:
        CRITERIA.pop("mine", None)
    with pytest.raises(StreamlineError, match="cannot be read"):
        accuracy_drop(tmp_path / "absent.jsonl", Numbers())


def test_a_window_without_which_nothing_can_be_answered_comes_last() -> None:
    model = tiny_model("llama")
    questions = questions_of(model, count=6, choices=3, seed=3)

    def rest_on_block_2(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] / (args[0].abs().max() < 1e5),)

    model.model.layers[1].register_forward_hook(lambda m, a, o: o * 1e10)
    model.model.layers[2].register_forward_hook(lambda m, a, o: o * 1e-10)
    model.model.layers[3].input_layernorm.register_forward_pre_hook(rest_on_block_2)
    scores = score_windows(accuracy_drop(questions, Numbers()), [range(2, 3), range(4, 5)], model=model, batches=[])
    assert scores[0] == -math.inf and math.isfinite(scores[1])

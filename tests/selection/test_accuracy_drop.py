"""The accuracy that is lost with a window, against the shorter model evaluated itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import TaskSettings, run_tasks, task_config_from_rows
from streamline_hooks.selection.accuracy import accuracy_drop
from streamline_hooks.selection.criteria import CRITERIA, combine_criteria, register_criterion
from streamline_hooks.selection.scoring import score_windows
from tests.evaluation.number_tasks import number_tokenizer, rows_of
from tests.tiny_models import BLOCKS, tiny_model, tokens

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_it_equals_the_shorter_models_accuracy(metric: str) -> None:
    model, tokenizer = tiny_model("llama"), number_tokenizer()
    task = task_config_from_rows(rows_of(tiny_model("qwen3"), count=20, choices=3, seed=1), "mine")
    settings = TaskSettings(metric=metric)
    whole = run_tasks(model, tokenizer, [task], settings)["mine"]
    assert whole.metric == metric
    keys = list(model.state_dict())
    scores = score_windows(accuracy_drop(task, tokenizer, settings), WINDOWS, model=model, batches=[])
    for score, window in zip(scores, WINDOWS, strict=True):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(window)
            short = run_tasks(model, tokenizer, [task], settings)["mine"]
        assert score == pytest.approx(short.accuracy - whole.accuracy, abs=1e-12)
    assert list(model.state_dict()) == keys


def test_from_a_file_and_by_name(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), number_tokenizer()
    rows = rows_of(model, count=12, choices=4, seed=2)
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    expected = score_windows(
        accuracy_drop(task_config_from_rows(rows, "mine"), tokenizer), WINDOWS, model=model, batches=[]
    )
    try:
        criterion = register_criterion(replace(accuracy_drop(str(path), tokenizer), name="mine"))
        assert score_windows("mine", WINDOWS, model=model, batches=[]) == expected
        both = combine_criteria({"mine": 1.0, "cosine": 1.0})
        assert len(score_windows(both, WINDOWS, model=model, batches=[tokens(2, 8)])) == 3
    finally:
        CRITERIA.pop("mine", None)
    path.write_text("\n".join(map(json.dumps, rows[1:])))
    assert criterion.made_of is not None
    other = accuracy_drop(str(path), tokenizer).made_of
    assert other is not None and other() != criterion.made_of()
    with pytest.raises(StreamlineError, match="cannot be read"):
        accuracy_drop(str(tmp_path / "absent.jsonl"), tokenizer)


def test_a_window_without_which_nothing_can_be_answered_comes_last() -> None:
    model = tiny_model("llama")
    task = task_config_from_rows(rows_of(model, count=6, choices=3, seed=3), "mine")

    def rest_on_block_2(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] / (args[0].abs().max() < 1e5),)

    model.model.layers[1].register_forward_hook(lambda m, a, o: o * 1e10)
    model.model.layers[2].register_forward_hook(lambda m, a, o: o * 1e-10)
    model.model.layers[3].input_layernorm.register_forward_pre_hook(rest_on_block_2)
    windows = [range(2, 3), range(4, 5)]
    scores = score_windows(accuracy_drop(task, number_tokenizer()), windows, model=model, batches=[])
    assert scores[0] == -math.inf and math.isfinite(scores[1])

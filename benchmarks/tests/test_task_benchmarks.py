"""The benchmark of a text encoder, a vision encoder and a classifier, on tiny ones."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import task_models
from benchmarks.task_models import Subject, accuracy, linear_probe, measure, split_in_two, table
from streamline_hooks.data import BatchSplit
from streamline_hooks.distillation import Objective
from streamline_hooks.evaluation import TaskScores
from streamline_hooks.modeling import Task
from tests.other_models import made
from tests.pipeline.test_compress_tasks import parts


def subject(name: str) -> Subject:
    model, given = made("vit"), parts("vit")
    board = TaskScores(model, given["test"], Task("image-classification"))
    split = BatchSplit.of(given, board.task)
    return Subject(name, model, board.task, split, partial(board.of, model), (1, 2), Objective({"kl": 1.0}), 2)


def test_rows_are_made_once_and_the_model_stays_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    one = subject("small_vit")
    content: dict[str, Any] = {"command": "python -m benchmarks.task_models"}
    before = one.scores()
    file, picture = tmp_path / "rows.json", tmp_path / "influence.svg"
    measure(one, content, file, picture)
    assert one.scores() == before and content["small_vit"]["rows"]["original"] == {"removed": "", **before}
    kept = json.loads(file.read_text())
    rows: dict[str, Any] = kept["small_vit"]["rows"]
    assert list(rows) == ["original", *(f"{n} {name}" for n in (1, 2) for name in task_models.RECIPES)]
    for n in (1, 2):
        trained, fitted = rows[f"{n} linear, trained"], rows[f"{n} linear"]
        assert trained["distance"] <= fitted["distance"] and trained["kind"] == "linear"
        assert rows[f"{n} SwiGLU, trained"]["kind"] == "swiglu:width=42"
        assert rows[f"{n} removed"]["parameters"] - fitted["parameters"] == 32 * 32
    assert len(kept["small_vit"]["influence"]) == 4 and "<svg" in picture.read_text()
    assert "| 2 SwiGLU, trained | " in file.with_suffix(".md").read_text() and "accuracy" in table(kept)
    capsys.readouterr()
    measure(one, kept, file, picture)
    assert capsys.readouterr().out == "", "a row was made again"


def test_a_probe_tells_what_is_linear_from_what_is_not() -> None:
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    labels = (rows[:, 0] + 0.5 * rows[:, 1] > 0).long()
    probe = linear_probe(rows[:300], labels[:300])
    assert accuracy(probe(rows[300:]), labels[300:]) > 0.9
    random = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(1))
    assert accuracy(linear_probe(rows[:300], random[:300])(rows[300:]), random[300:]) < 0.65
    assert accuracy(linear_probe(3 * rows[:300] + 7, labels[:300])(3 * rows[300:] + 7), labels[300:]) > 0.9


def test_a_text_is_cut_between_two_words() -> None:
    assert split_in_two("one two  three\nfour five") == ("one two", "three four five")

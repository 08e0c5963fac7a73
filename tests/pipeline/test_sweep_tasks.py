"""Sweeps over models without a perplexity: their outputs are compared with the original's."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import LinearConfig, sweep
from streamline_hooks.evaluation import TaskScores
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import SpeedConfig, Sweep, compress, write_report
from streamline_hooks.pipeline.sweep import SweepPoint
from streamline_hooks.repair import NoneConfig
from tests.configured import configured
from tests.other_models import OTHERS, made
from tests.pipeline.test_compress_tasks import parts

KINDS = [NoneConfig(), LinearConfig()]


def common(name: str, **more: Any) -> Any:
    return configured(stack=OTHERS[name].path(made(name)), protect=(0,), shortlist=2, **more)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["vit", "bert", "bart decoder"])
def test_a_point_is_what_compress_gives(name: str, tmp_path: Path) -> None:
    model, given = made(name), parts(name)
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {
        "remove": [1, 2],
        "repair": KINDS,
        "speed": SpeedConfig(repeats=2),
        "cache_file": tmp_path / "points.json",
    }
    found = sweep(model, given, common(name), **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    task = Task.of(model)
    for point in found.points:
        changed = made(name)
        kind = next(kind for kind in KINDS if str(kind) == point.kind)
        alone = compress(changed, given, common(name, remove=int(point.remove), repair=kind))
        scores = TaskScores(made(name), given["test"], task).of(changed)
        distance = scores["kl"] if task.gives_distributions else 1 - scores["cosine"]
        assert point.distance == pytest.approx(distance, rel=1e-4, abs=1e-6) and point.distance > 0
        assert point.measure == task.distance and point.perplexity_ratio is None
        assert point.parameters_ratio == alone.parameters[1] / alone.parameters[0]
        assert (point.accuracy is not None) == (name == "vit") and point.accuracy == scores.get("accuracy")
        assert point.prefill_ratio is not None and point.prefill_ratio > 0 and point.decode_ratio is None
    assert found.front(), "smaller at some loss is a choice"
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [float(row["distance"]) for row in rows] == [point.distance for point in found.points]
    head = found.table().splitlines()[0]
    assert task.distance in head and ("accuracy" in head) == (name == "vit") and "perplexity" not in head
    page = write_report(tmp_path, sweep=report, command="c", title="t").read_text()
    assert task.distance in page and "perplexity ratio" not in page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["streamline_hooks.pipeline.sweep"], "compress", _fails)
        assert sweep(model, given, common(name), **options) == found
        other = given | {"test": [{**given["test"][0]}]}
        with pytest.raises(AssertionError, match="compressed again"):
            sweep(model, other, common(name), **options)


def _fails(*args: Any, **options: Any) -> Any:
    raise AssertionError("compressed again")


def test_the_original_has_no_distance_from_itself() -> None:
    """A point that is larger than the original, or as large and different, is on no front."""
    points = tuple(
        SweepPoint("1", kind, parameters_ratio=size, distance=distance, measure="1 - cosine")
        for kind, size, distance in (("a", 0.8, 0.2), ("b", 0.9, 0.3), ("c", 1.1, 0.001), ("d", 0.5, math.inf))
    )
    assert [point.kind for point in Sweep(points).front()] == ["a"]
    zero = SweepPoint("1", "e", parameters_ratio=1.0, distance=0.0, measure="1 - cosine")
    assert Sweep((*points, zero)).front() == [points[0], zero]

"""What a run gives is what the page reads: the made-up example has not drifted from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamline_hooks import LayerSurgeon, compress, evaluate
from streamline_hooks.distillation import DistillationConfig
from streamline_hooks.evaluation import SpeedReport, Suite, Timing, task_config_from_rows
from streamline_hooks.pipeline import plots
from streamline_hooks.pipeline.report import write_report
from tests.configured import configured
from tests.pipeline import example
from tests.pipeline.reading import Reader

SMALL = {"sequence_length": 64, "calibration_tokens": 3200, "validation_tokens": 320, "test_tokens": 320}


def shape(value: Any) -> Any:
    """The names at every depth."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_a_compression_is_told_as_it_was(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.Plot, "svg", lambda self, width: "")
    training = DistillationConfig(learning_rate=3e-3, validations=2)
    model, tokenizer = story_model
    result = compress(
        model, story_texts, configured(remove=1, shortlist=2, distillation=training, **SMALL), tokenizer=tokenizer
    )
    said = json.loads(json.dumps(result.report()))
    made_up = example.compression(4, ((1, 2),))
    said.pop("data"), made_up.pop("data"), said["perplexity"].clear(), made_up["perplexity"].clear()
    for one in (said, made_up):
        one["plan"]["slots"] = one["plan"]["splices"] = None
    assert set(shape(made_up)) == set(shape(said))
    for name in ("candidates", "training", "parameters", "bytes", "stand_in", "similarity", "samples"):
        assert shape(made_up[name]) == shape(said[name]), name

    said = json.loads(json.dumps(result.report()))
    reader = Reader(write_report(tmp_path, compression=said, command="c", title="t").read_text())
    window = result.candidates[0].windows[0]
    assert f"Removed: {window.start} (in the original's numbering, from 0)." in reader.text
    assert [row[-1] for row in reader.tables["Candidates"][1:]] == [f"{one.distance:.4f}" for one in result.candidates]
    told = {row[0]: row[1] for row in reader.tables["Perplexity by step"][1:]}
    assert told["repaired and trained"] == f"{result.perplexities['trained']:.2f}"
    plot = plots.influence(said)
    assert plot is not None
    bars = {round(bar.get_x() + 0.4): bar for bar in plot.figure().axes[0].patches}
    influences = [1 - result.profile.value("cosine", range(k, k + 1)) for k in range(5)]
    assert np.allclose([bars[k].get_height() for k in range(5)], influences)
    assert [k for k in range(5) if bars[k].get_hatch()] == list(window)


def test_an_evaluation_is_told_as_it_was(
    stories: tuple[Any, Any], story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plots.Plot, "svg", lambda self, width: "")
    original, (changed, tokenizer) = stories[0], story_model
    with LayerSurgeon(changed) as surgeon:
        surgeon.remove(range(2, 3))
        surgeon.commit()
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    questions = [
        {"query": "Once upon a", "choices": ["time", "table"], "gold": 0},
        {"query": "She was very", "choices": ["and", "happy"], "gold": 1},
    ]
    ends = [{"context": "Once upon a", "continuation": "time"}]
    suite = Suite(
        text={"tales": story_texts[:2]}, tasks=[task_config_from_rows(questions, "girls"), task_config_from_rows(ends,
        "ends")], prompts=["One day, a big dog"], window=48, stride=16, new_tokens=12, timed=(8, 2, 1),
    )  # fmt: skip
    found = evaluate(changed, tokenizer, suite, original, name="shorter", reference_name="stories")
    assert found.original is not None and found.speed is not None
    said = json.loads(json.dumps(found.report(), allow_nan=False))
    made_up = example.evaluation()
    assert set(made_up) == set(said) - {"mean_perplexity_ratio"}
    for name in ("writing", "agreement"):
        assert set(made_up[name]) == set(said[name]), name
    for name in ("perplexity", "accuracy", "stability", "retained", "tasks"):
        first, own = (next(iter(one[name].values())) for one in (made_up, said))
        assert set(first) <= set(own), name
    reader = Reader(write_report(tmp_path, evaluation=said, command="c", title="t").read_text())
    mine, theirs = found.scores.text["tales"].value, found.original.text["tales"].value
    assert reader.tables["Perplexity by domain"][1][3:] == [f"{mine:.2f}", f"{theirs:.2f}", f"{mine / theirs:.2f}"]
    assert [row[0] for row in reader.tables["Tasks, ± one standard error"][1:]] == ["girls", "ends"] * 2
    assert "KL, tales (nats per token)" in [row[0] for row in reader.tables["Agreement with the original"]]
    assert found.scores.generated[0].text in [data for _, data in reader.texts]
    assert [row[0] for row in reader.tables["Speed"][1:]] == [
        "stories, first token", "stories, further token", "shorter, first token", "shorter, further token",
    ]  # fmt: skip
    assert f"{found.mean_perplexity_ratio:.2f}" in reader.text


def test_speeds_are_told_as_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.Plot, "svg", lambda self, width: "")
    timings = {
        name: Timing((s, 2 * s, 3 * s), (s / 10, s / 5, s / 2), 1, "float32", "cpu", 2_500_000)
        for name, s in (("a", 0.2), ("b", 0.1))
    }
    report = SpeedReport(timings, 2, 50, 4, 1, "here")
    said = {"speed": json.loads(json.dumps(report.to_dict()))}
    reader = Reader(write_report(tmp_path, evaluation=said, command="c", title="t").read_text())
    assert reader.tables["Speed"][1:] == [
        ["a, first token", "400.0", "300.0 to 500.0", "250.0", "1.000", "1.000 to 1.000", "2.5"],
        ["a, further token", "40.0", "30.0 to 70.0", "50.0", "1.000", "1.000 to 1.000", "2.5"],
        ["b, first token", "200.0", "150.0 to 250.0", "500.0", "0.500", "0.500 to 0.500", "2.5"],
        ["b, further token", "20.0", "15.0 to 35.0", "100.0", "0.500", "0.500 to 0.500", "2.5"],
    ]
    assert report.tokens_per_second("b") == pytest.approx(500.0)

"""The count of wrong bounds and intervals: right ones are rarely wrong, and planted wrong ones are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import coverage


def test_a_bound_that_is_only_the_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    expectation, draw = coverage.SOURCES["fractions with mean 0.1"]
    row = coverage.violations(expectation, draw, 50, 100)
    assert row["violations"] <= 0.12 and 0 < row["bootstrap"] < row["width"]
    monkeypatch.setattr(coverage, "mean_upper_bound", lambda losses, delta, seed: float(np.mean(losses)))
    assert coverage.violations(expectation, draw, 50, 100)["violations"] > 0.3


def test_an_interval_that_is_too_narrow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = coverage.coverage(200, 100)
    assert row["ratio"] >= 0.88 and row["above_chance"] >= 0.88
    exact = coverage.relative_accuracy
    monkeypatch.setattr(coverage, "relative_accuracy", lambda *args, **options: exact(*args, **options, level=0.5))
    assert coverage.coverage(200, 100)["ratio"] < 0.7


def test_the_table_has_simulated_and_real_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses = np.linspace(0, 0.2, 40)
    monkeypatch.setattr(coverage, "real_losses", lambda data, documents: {"kl": losses})
    monkeypatch.setattr(coverage, "FILE", tmp_path / "coverage.json")
    monkeypatch.setattr("sys.argv", ["coverage", "--data", ".", "--runs", "5", "--resampled", "5"])
    coverage.main()
    content = json.loads(coverage.FILE.read_text())
    names = {row["losses"] for row in content["bounds"]}
    assert names == {*coverage.SOURCES, "kl, 40 paragraphs"} and len(content["intervals"]) == 2
    assert "| kl, 40 paragraphs | 50 | 5 |" in coverage.FILE.with_suffix(".md").read_text()

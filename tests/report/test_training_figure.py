"""The training curve is the history that was kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamline_hooks.report.drawing import Style
from streamline_hooks.report.training_figure import training
from tests.report import example
from tests.report.overlaps import drawn


def test_the_curves_are_the_history() -> None:
    said = example.compression()
    history = said["training"]["history"]
    drawing = training(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        kl, loss = figure.axes
        assert "thousands" in kl.get_xlabel() and "nats" in kl.get_ylabel()
        assert np.allclose(kl.lines[0].get_xydata(), [(row["tokens"] / 1e3, row["distance"]) for row in history])
        assert np.allclose(loss.lines[0].get_xydata(), [(row["tokens"] / 1e3, row["loss"]) for row in history[1:]])
        best = min(history, key=lambda row: row["distance"])
        assert np.allclose(kl.lines[1].get_xydata(), [(best["tokens"] / 1e3, best["distance"])])
        assert kl.lines[1].get_label() == f"best: {best['distance']:.4f} at step 210"


def test_a_validation_without_a_number_is_left_out_of_the_curve() -> None:
    said = example.compression()
    said["training"]["history"][2]["distance"] = math.inf
    said["training"]["best_step"] = 60  # what had no number
    drawing = training(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert len(figure.axes[0].lines) == 1 and len(figure.axes[0].lines[0].get_xdata()) == 8


@pytest.mark.parametrize("said", [{}, {"training": None}, {"training": {"history": []}}])
def test_no_training_no_curve(said: dict[str, object]) -> None:
    assert training(said) is None

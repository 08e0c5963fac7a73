"""Rows hold the values under their own names, whatever is missing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.colors import to_hex

from streamline_hooks.report.drawing import Drawing, Style
from streamline_hooks.report.palette import LIGHT
from streamline_hooks.report.row_figures import accuracy, candidates, perplexity, speed, steps
from tests.report import example
from tests.report.overlaps import drawn

MARKS = {"D": "before", "o": "after", "|": "chance"}


def marks(drawing: Drawing | None) -> dict[str, dict[str, float]]:
    """The values of each row by its name, read from what is drawn."""
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        axes = figure.axes[0]
        names = [text.get_text() for text in axes.get_yticklabels()]
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for line in axes.lines:
            name = names[round(float(line.get_ydata()[0]))]
            if line.get_marker() in MARKS and len(line.get_xdata()) == 1:
                found[name][MARKS[line.get_marker()]] = float(line.get_xdata()[0])
            elif len(line.get_xdata()) == 2 and line.get_marker() == "|":
                shape = "before" if to_hex(line.get_color()) == LIGHT.before else "after"
                found[name][f"{shape} low"], found[name][f"{shape} high"] = map(float, line.get_xdata())
        return found


def test_candidates_have_their_kl_and_the_first_is_the_chosen() -> None:
    said = example.compression()
    drawing = candidates(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        axes = figure.axes[0]
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert names[1:] == ["12–19", "13–20", "5–12", "11–18"]  # the refused one has no KL
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.41, 0.58, 0.75, 0.92, 1.09])
        colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
        assert colours == [LIGHT.after] + [LIGHT.before] * 4
        assert [t.get_text() for t in axes.texts][:2] == ["0.410, chosen", "0.580"]
        assert "nats" in axes.get_xlabel()


def test_only_the_first_candidates_are_drawn_and_the_caption_says_so() -> None:
    said = example.compression()
    said["candidates"] = [{**said["candidates"][1], "distance": 0.1 * k} for k in range(1, 31)]
    drawing = candidates(said)
    assert drawing is not None and "The first 20 of 30." in drawing.caption
    with drawn(drawing, Style()) as figure:
        assert len(figure.axes[0].patches) == 20


def test_when_the_chosen_one_has_no_kl_no_other_is_called_chosen() -> None:
    said = example.compression()
    said["candidates"][0]["distance"] = math.nan
    drawing = candidates(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert not any("chosen" in text.get_text() for text in figure.axes[0].texts)


def test_steps_start_at_the_original() -> None:
    found = marks(steps(example.compression()))
    assert found["repaired and trained"] == {"before": 11.55, "after": 15.21}
    assert next(iter(found)) == "plain removal" and len(found) == 5


def test_perplexity_before_and_after_stand_in_their_rows() -> None:
    said = example.evaluation()
    said["original"]["perplexity"].pop("peps")
    said["perplexity"]["blog_18f"]["value"] = math.inf
    found = marks(perplexity(said))
    assert list(found) == ["fiction_austen_doyle", "news_digitalgov", "peps", "wikitext2_raw_test"]
    assert set(found["peps"]) == {"after"}
    for name, row in found.items():
        assert row["after"] == said["perplexity"][name]["value"]
        if name != "peps":
            assert row["before"] == said["original"]["perplexity"][name]["value"]


def test_accuracy_is_in_percent_with_its_error_and_chance() -> None:
    said = example.evaluation()
    said["accuracy"]["piqa"] |= {"value": 0.65, "standard_error": 0.02}
    found = marks(accuracy(said))
    assert found["piqa"] == pytest.approx(
        {"chance": 50.0, "before": 74.0, "before low": 72.1, "before high": 75.9, "after": 65.0, "after low": 63.0,
         "after high": 67.0}
    )  # fmt: skip
    assert "chance" not in found["counting_problems"]


def test_speed_is_against_the_first() -> None:
    said = example.evaluation()
    assert marks(speed(said)) == {
        "First token": {"before": 1.0, "after": 0.752, "after low": 0.741, "after high": 0.768},
        "Further token": {"before": 1.0, "after": 0.781, "after low": 0.77, "after high": 0.80},
    }
    said["speed"]["ratios"]["third"] = {"prefill": {"median": 0.5, "low": 0.4, "high": 0.6}}
    assert list(marks(speed(said))) == [
        "build/smollm2, first token", "build/smollm2, further token", "third, first token",
    ]  # fmt: skip


@pytest.mark.parametrize("figure", [candidates, steps, perplexity, accuracy, speed], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"candidates": [{"windows": [[1, 2]], "silenced": [], "distance": None}]},
        {"perplexity": {"original": math.nan, "removed": 3.0}, "accuracy": {}, "speed": {"ratios": {"a": {}}}},
        {"perplexity": {"original": 3.0}},
    ],
)
def test_nothing_is_drawn_of_nothing(figure: Any, said: dict[str, Any]) -> None:
    if figure is perplexity and "perplexity" in said:
        said = {"perplexity": {"a": {"value": None}}}
    assert figure(said) is None

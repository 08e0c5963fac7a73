"""What each search is asked, and on how much text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import SearchProblem, find_selections
from streamline_hooks.batch import tokens_of
from streamline_hooks.selection import windows
from streamline_hooks.selection.criteria import CRITERIA, RUN_FOR_EACH, Criterion
from streamline_hooks.testing import tiny_model


@pytest.mark.parametrize("name", RUN_FOR_EACH)
@pytest.mark.parametrize("search", ["window", "one-shot", "disjoint"])
def test_a_model_is_run_without_each_window_on_the_beginning_of_the_text(
    name: str, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever there is to fit on: eight blocks by 41,000 tokens would be eight times the cost of all else."""
    model, batches = tiny_model("llama"), [torch.randint(3, 60, (16, 32)) for _ in range(10)]
    seen: list[int] = []

    def scored(model: Any, batches: Any, windows: Any, **options: Any) -> Any:
        seen.append(sum(map(tokens_of, batches)))
        return [-float(window.start) for window in windows]

    monkeypatch.setitem(CRITERIA, name, Criterion(name, scored, "model"))
    asked = {"model": model, "batches": batches}
    found = find_selections(search, SearchProblem(windows(8, 2), 8, name, **asked))
    assert found and set(seen) == {4_096}
    find_selections(search, SearchProblem(windows(8, 2), 8, name, model=model, batches=[torch.ones(400, 32).long()]))
    assert seen[-1] == 12_800, "one batch at least"
    seen.clear()
    other = Criterion("other", scored, "model")
    find_selections(search, SearchProblem(windows(8, 2), 8, other, **asked))
    assert set(seen) == {5_120}

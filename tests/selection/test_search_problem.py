"""On how much text a criterion is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from streamline_hooks.core import count_tokens
from streamline_hooks.selection import CRITERIA, SEARCHES, Criterion, windows_of_size
from streamline_hooks.testing import tiny_model


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.runs_per_window])
@pytest.mark.parametrize("search", ["window", "one-shot", "disjoint"])
def test_a_model_is_run_without_each_window_on_the_beginning_of_the_text(
    name: str, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever there is to fit on: eight blocks by 41,000 tokens would be eight times the cost of all else."""
    model, batches = tiny_model("llama"), [torch.randint(3, 60, (16, 32)) for _ in range(10)]
    seen: list[int] = []

    def scored(model: Any, batches: Any, windows: Any, **options: Any) -> Any:
        seen.append(sum(map(count_tokens, batches)))
        return [-float(window.start) for window in windows]

    monkeypatch.setitem(CRITERIA, name, replace(CRITERIA[name], score=scored))
    config = SEARCHES[search](name)

    def find(batches: list[torch.Tensor], **more: Any) -> Any:
        return config.find(config.problem(windows_of_size(8, 2), 8, model=model, batches=batches, **more))

    assert find(batches) and set(seen) == {4_096}
    find([torch.ones(400, 32).long()])
    assert seen[-1] == 12_800, "one batch at least"
    for each, tokens in ((False, 5_120), (True, 4_096)):
        seen.clear()
        find(batches, criterion=Criterion("other", scored, "model", runs_per_window=each))
        assert set(seen) == {tokens}

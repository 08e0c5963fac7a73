"""Windows, and what takes as many blocks from several places, on one shortlist."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import profile
from streamline_hooks.selection import (
    DisjointSearch,
    MixedSearch,
    OneShotSearch,
    SearchConfig,
    WindowSearch,
    windows_of_size,
)
from streamline_hooks.testing import tiny_model


@pytest.mark.parametrize(("count", "parts"), [(3, 2), (4, 3), (2, 2)])
def test_it_is_the_best_windows_and_the_first_of_the_others(count: int, parts: int) -> None:
    measured = profile(tiny_model("llama"), [torch.arange(3, 63).view(5, 12)])

    def found(search: SearchConfig) -> list[tuple[range, ...]]:
        problem = search.problem(windows_of_size(8, count), 8, profile=measured)
        return [selection.windows for selection in search.find(problem)]

    mixed = found(MixedSearch("cosine", (0,), 3, windows=parts))
    single = found(WindowSearch("cosine", (0,), 3))
    assert mixed[: len(single)] == single
    disjoint = [DisjointSearch("cosine", (0,), 1, windows=number) for number in range(2, parts + 1)]
    several = [found(search)[0] for search in (OneShotSearch("cosine", (0,), 1), *disjoint)]
    assert set(mixed) == {*single, *several}
    assert len(mixed) == len(set(mixed))
    assert all(sum(map(len, chosen)) == count and 0 not in chosen[0] for chosen in mixed)


def test_parts_that_do_not_fit_are_left_out() -> None:
    measured = profile(tiny_model("llama"), [torch.arange(3, 63).view(5, 12)])
    search = MixedSearch("cosine", shortlist=2, windows=4)
    chosen = search.find(search.problem(windows_of_size(8, 6), 8, profile=measured))
    assert max(len(selection.windows) for selection in chosen) <= 3
    assert any(len(selection.windows) > 1 for selection in chosen)

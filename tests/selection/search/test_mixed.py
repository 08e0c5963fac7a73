"""Windows, and what takes as many blocks from several places, on one shortlist."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import SearchProblem, find_selections, profile
from streamline_hooks.selection import windows
from streamline_hooks.testing import tiny_model


@pytest.mark.parametrize(("count", "parts"), [(3, 2), (4, 3), (2, 2)])
def test_it_is_the_best_windows_and_the_first_of_the_others(count: int, parts: int) -> None:
    measured = profile(tiny_model("llama"), [torch.arange(3, 63).view(5, 12)])
    asked = {"profile": measured, "parts": parts, "keep": frozenset({0})}
    candidates = windows(8, count, frozenset({0}))

    def found(search: str, best: int, **more: int) -> list[tuple[range, ...]]:
        problem = SearchProblem(candidates, 8, "cosine", best=best, **{**asked, **more})
        return [selection.windows for selection in find_selections(search, problem)]

    mixed = found("mixed", 3)
    single = found("window", 3)
    assert mixed[: len(single)] == single
    several = [*found("one-shot", 1), *(w for p in range(2, parts + 1) for w in found("disjoint", 1, parts=p))]
    assert set(mixed) == {*single, *several}
    assert len(mixed) == len(set(mixed))
    assert all(sum(map(len, chosen)) == count and 0 not in chosen[0] for chosen in mixed)


def test_parts_that_do_not_fit_are_left_out() -> None:
    measured = profile(tiny_model("llama"), [torch.arange(3, 63).view(5, 12)])
    problem = SearchProblem(windows(8, 6), 8, "cosine", best=2, parts=4, profile=measured)
    chosen = find_selections("mixed", problem)
    assert max(len(selection.windows) for selection in chosen) <= 3
    assert any(len(selection.windows) > 1 for selection in chosen)

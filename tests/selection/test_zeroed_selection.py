"""Attentions and MLPs alone."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.selection import SEARCHES, SearchProblem
from streamline_hooks.selection.search_algorithms import best_branches
from streamline_hooks.statistics import measure_branches
from streamline_hooks.testing import tiny_model

TOKENS = torch.arange(3, 43).view(2, 20)


def planted() -> torch.nn.Module:
    """Three attentions and two MLPs do almost nothing."""
    model = tiny_model("llama")
    for k in (2, 3, 6):
        model.model.layers[k].self_attn.o_proj.weight.data *= 1e-4
    for k in (1, 5):
        model.model.layers[k].mlp.down_proj.weight.data *= 1e-4
    return model


@pytest.mark.parametrize(("branch", "blocks"), [("attention", [2, 3, 6]), ("mlp", [1, 5])])
def test_what_does_nothing_is_found(branch: str, blocks: list[int]) -> None:
    asked = SearchProblem([range(0, len(blocks))], 8, model=planted(), batches=[TOKENS])
    found = SEARCHES[branch]().find(asked)[0]
    assert found.windows == () and found.zeroed == tuple((k, branch) for k in blocks)


def test_zeroing_them_changes_next_to_nothing() -> None:
    model = planted()
    logits = model(TOKENS).logits
    chosen = best_branches(measure_branches(model, [TOKENS]), "attention", 3)[0]
    with LayerSurgeon(model) as surgeon:
        for k, branch in chosen.zeroed:
            surgeon.zero_branch(k, branch)
        torch.testing.assert_close(model(TOKENS).logits, logits, atol=1e-2, rtol=1e-2)
    assert torch.equal(model(TOKENS).logits, logits)


def test_protected_and_too_many() -> None:
    scores = measure_branches(planted(), [TOKENS])
    first, second = best_branches(scores, "mlp", 2, protect=[1], best=2)
    assert (5, "mlp") in first.zeroed and (1, "mlp") not in first.zeroed and first.score >= second.score
    with pytest.raises(StreamlineError, match=r"9 mlp.*8 are available"):
        best_branches(scores, "mlp", 9)

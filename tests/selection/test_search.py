"""search: the shortlist that compress verifies, from a profile alone or with the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import (
    LayerSurgeon,
    LinearConfig,
    StreamlineError,
    Target,
    compress,
    profile,
    search,
    verify_shortlist,
)
from streamline_hooks.repair import BlockConfig
from streamline_hooks.selection import DisjointSearch, GreedySearch, WindowSearch
from streamline_hooks.testing import tiny_model

BATCHES = list(torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0)).split(2))
PARTS = {"calibration": BATCHES[:10], "validation": BATCHES[10:12], "test": BATCHES[12:]}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("config", "remove"),
    [
        (WindowSearch(), 2),
        (WindowSearch(criterion="angular", protect=(0, -1), shortlist=3), 0.25),
        (DisjointSearch(windows=2), 3),
        (WindowSearch(), Target(parameters=0.2)),
        (GreedySearch(), 2),
    ],
)
def test_it_finds_what_compress_verifies(config: Any, remove: Any) -> None:
    model = tiny_model("llama")
    protect = [k % 8 for k in config.protect]
    measured = profile(model, PARTS["calibration"], protect=protect)
    found = search(measured, remove, config, replacement=LinearConfig(), model=model, batches=PARTS["calibration"])
    result = compress(model, PARTS, remove=remove, search=config)
    assert {one.windows for one in found} == {one.windows for one in result.candidates}
    assert len(found) <= config.shortlist


def test_the_steps_by_hand_give_the_weights_of_compress() -> None:
    by_hand, model = tiny_model("llama"), tiny_model("llama")
    selections = search(profile(by_hand, PARTS["calibration"]), remove=2)
    fit, held_out = PARTS["calibration"][:8], PARTS["calibration"][8:]
    best = verify_shortlist(by_hand, selections, fit, held_out, PARTS["validation"])[0]
    with LayerSurgeon(by_hand) as surgeon:
        for repair in best.repairs:
            surgeon.replace(repair.window, repair.replacement_module)
        surgeon.commit()
    compress(model, PARTS, remove=2)
    found, wanted = by_hand.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_replacement_that_takes_a_slot_makes_longer_windows() -> None:
    measured = profile(tiny_model("llama"), BATCHES[:4])
    assert {len(one.windows[0]) for one in search(measured, 2, replacement=BlockConfig())} == {3}


def test_a_model_is_asked_for_where_it_is_needed() -> None:
    measured = profile(tiny_model("llama"), BATCHES[:4])
    with pytest.raises(StreamlineError, match="parameters:0.2 requires a model.*Pass model"):
        search(measured, Target(parameters=0.2))
    with pytest.raises(StreamlineError, match="kl runs the model, but model=None.*Pass model"):
        search(measured, 2, WindowSearch(criterion="kl"))

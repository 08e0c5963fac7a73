"""The smallest depth with a bounded loss: depths in order, and an error of the choice as rare as stated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError, at_depth, fit_depths
from streamline_hooks.evaluation import Guarantee, guarantee, mean_upper_bound
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import choose_depth
from streamline_hooks.testing import tiny_model

DEPTHS = [7, 6, 4]


def documents(count: int = 12, first: int = 0) -> list[torch.Tensor]:
    return [
        torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(k)) for k in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("llama")
    fit_depths(model, documents(), DEPTHS)
    return model


def test_the_smallest_depth_within_the_limits_is_chosen(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = {"disagreement": documents(first=100), "kl": documents(first=200)}
    loose = choose_depth(model, data, {"disagreement": 1.0, "kl": 1.0})
    assert loose.depth == 4 and list(loose.statements) == DEPTHS and not loose.required_units
    bounds = {depth: tested["disagreement"].bound for depth, tested in loose.statements.items()}
    assert bounds[7] < bounds[6] < bounds[4]
    limit = (bounds[7] + bounds[6]) / 2
    chosen = choose_depth(model, data, {"disagreement": limit, "kl": 1.0})
    assert chosen.depth == 7 and list(chosen.statements) == [7, 6] and list(chosen.required_units) == ["disagreement"]
    nothing = choose_depth(model, data, {"disagreement": 0.0001, "kl": 1.0})
    assert nothing.depth == 8 and list(nothing.statements) == [7] and nothing.required_units == {"disagreement": None}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_statements_are_those_of_the_model_at_the_depth(model: Any) -> None:
    texts = documents(first=300)
    chosen = choose_depth(model, {"kl": texts}, {"kl": 2.0}, delta=0.1, clip=2.0)
    original = tiny_model("llama")
    for depth in DEPTHS:
        with at_depth(model, depth):
            assert chosen.statements[depth]["kl"] == guarantee(original, model, texts, "kl", delta=0.1, clip=2.0)


def test_the_required_number_of_units_would_pass(model: Any) -> None:
    texts = documents(5, first=400)
    tested = choose_depth(model, {"disagreement": texts}, {"disagreement": 1.0}).statements[7]["disagreement"]
    limit = (tested.mean + tested.bound) / 2
    chosen = choose_depth(model, {"disagreement": texts}, {"disagreement": limit})
    count = chosen.required_units["disagreement"]
    assert chosen.depth == 8 and count is not None and count > tested.units
    assert mean_upper_bound(np.resize(tested.losses, count).tolist()) <= limit


@pytest.mark.parametrize("limit", [0.03, 0.06])
def test_the_chosen_depth_violates_its_limit_at_most_as_often_as_stated(
    limit: float, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expectations, delta, runs = {7: 0.02, 6: 0.035, 4: 0.065}, 0.1, 150
    random = np.random.default_rng(0)

    def measured(original: nn.Module, changed: nn.Module, units: Any, measure: Any, **options: Any) -> Guarantee:
        losses = (random.random(400) < expectations[len(find_stack(changed))]).astype(float)
        return Guarantee(measure, mean_upper_bound(losses.tolist(), delta), tuple(losses.tolist()), delta, "")

    monkeypatch.setattr("streamline_hooks.pipeline.depths.bound_losses", measured)
    chosen = [choose_depth(model, {"kl": documents(1)}, {"kl": limit}, delta=delta).depth for _ in range(runs)]
    violations = np.mean([expectations.get(depth, 0.0) > limit for depth in chosen])
    assert violations <= delta + 3 * (delta * (1 - delta) / runs) ** 0.5
    assert len(set(chosen)) > 1


def test_data_and_limits_need_the_same_measures(model: Any) -> None:
    for data, limits in (({"kl": documents(2)}, {"disagreement": 0.1}), ({}, {})):
        with pytest.raises(StreamlineError, match="same measures"):
            choose_depth(model, data, limits)
    with pytest.raises(StreamlineError, match="one depth"):
        choose_depth(tiny_model("llama"), {"kl": documents(2)}, {"kl": 0.1})

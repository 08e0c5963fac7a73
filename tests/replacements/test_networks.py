"""What all replacements without a slot have in common: start, gradients, tokens, precision, cost and checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from streamline_hooks import StreamlineError
from streamline_hooks.replacements import (
    REGISTERED,
    LinearReplacement,
    MLPReplacement,
    SwiGLUReplacement,
    build_replacement,
    is_own,
    replacement_config,
)

WIDTH = 6
MADE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearReplacement(WIDTH),
    "low rank": lambda: LinearReplacement(WIDTH, rank=2),
    "diagonal": lambda: LinearReplacement(WIDTH, diagonal=True),
    "mlp": lambda: MLPReplacement(WIDTH),
    "mlp with biases": lambda: MLPReplacement(WIDTH, 5, "silu", bias=True, linear=False),
    "swiglu": lambda: SwiGLUReplacement(WIDTH, 7),
    "plain swiglu": lambda: SwiGLUReplacement(WIDTH, 7, norm=False, linear=False),
}
OTHERS = {"feed_forward": "starts at random weights", "normed_linear": "maps the normalised state"}
OWN = {kind for kind in REGISTERED if is_own(kind)}
every = pytest.mark.parametrize("name", MADE)


def made(name: str, seed: int | None = None) -> nn.Module:
    """One as it starts, or with random weights everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        module = MADE[name]()
        for parameter in module.parameters() if seed is not None else ():
            nn.init.normal_(parameter, std=0.5)
    return module


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_module_is_in_one_of_the_two_lists() -> None:
    assert {make().kind for make in MADE.values()} | set(OTHERS) == OWN


@every
def test_it_starts_at_plain_removal(name: str) -> None:
    state = states(2, 3)
    assert torch.equal(made(name)(state), state)


@every
def test_from_the_start_something_has_a_gradient_that_leads_away(name: str) -> None:
    """Two steps suffice to train every weight: no two factors of a product are zero."""
    module = made(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (module(states(4, 3)) - states(4, 3, seed=1)).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


@every
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    module, state = made(name, seed=1).double(), states(2, 3, dtype=torch.float64).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(state: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (state,))

    values = [p.detach().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, (state, *values))


@every
def test_each_token_is_mapped_by_itself(name: str) -> None:
    module, state = made(name, seed=1), states(2, 5)
    changed = state.clone()
    changed[:, 3] += 1.0
    before, after = module(state), module(changed)
    others = [0, 1, 2, 4]
    assert torch.equal(before[:, others], after[:, others]) and not torch.allclose(before[:, 3], after[:, 3])


@every
def test_it_states_what_it_costs(name: str) -> None:
    module = made(name)
    flops: Any = module.flops_per_token
    if name == "diagonal":  # an elementwise product, which the counter of matrix products does not see
        assert flops == 2 * WIDTH
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(states(3, 5))
    assert counter.get_total_flops() == 15 * flops


@every
def test_it_is_built_again_from_what_json_keeps(name: str) -> None:
    module = made(name, seed=1)
    kind, config = replacement_config(module)
    again = build_replacement(kind, json.loads(json.dumps(config)))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(states(2, 3)), module(states(2, 3)))


def test_checkpoints_of_before_low_rank_still_load() -> None:
    again = build_replacement("linear", {"features": WIDTH})
    again.load_state_dict({"projection.weight": torch.eye(WIDTH)})
    assert torch.equal(again(states(2, 3)), 2 * states(2, 3))
    assert LinearReplacement(WIDTH).to_config() == {"features": WIDTH}


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_precisions_bear_massive_activations(name: str, dtype: torch.dtype) -> None:
    module, state = made(name, seed=1), states(2, 3)
    state[0, 0] *= 300.0
    with torch.no_grad():
        narrow = module.to(dtype)(state.to(dtype))
        wide = module.float()(state)
    assert narrow.dtype == dtype
    if name == "plain swiglu" and dtype == torch.float16:
        assert not torch.isfinite(narrow).all()  # what the norm is for
        return
    assert float((narrow.float() - wide).norm() / wide.norm()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@every
def test_it_is_exported_and_compiled_whole(name: str) -> None:
    module, state = made(name, seed=1), states(2, 3)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(module, (state,), dynamic_shapes=({1: tokens},))
    torch.testing.assert_close(exported.module()(states(2, 9)), module(states(2, 9)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state), module(state))


@every
def test_it_starts_at_a_map(name: str) -> None:
    module, map_, state = made(name, seed=1), 0.3 * states(WIDTH), states(2, 3)
    if not getattr(module, "holds_map", True):
        with pytest.raises(StreamlineError, match="linear=False"):
            module.start_at(map_)
        return
    if name == "low rank":
        left, values, right = torch.linalg.svd(map_)
        map_ = left[:, :2] * values[:2] @ right[:2]
    if name == "diagonal":
        map_ = torch.diag(map_.diagonal())
    module.start_at(map_)
    torch.testing.assert_close(module(state), state + state @ map_)


def test_a_map_of_lower_rank_leaves_the_rest_free_to_grow() -> None:
    module = LinearReplacement.from_map(torch.ones(WIDTH, WIDTH), rank=3)
    first, second = (layer.get_parameter("weight") for layer in module.projection.children())
    assert torch.linalg.matrix_rank(first) == 3 and torch.linalg.matrix_rank(second @ first, rtol=1e-5) == 1


def test_default_widths() -> None:
    assert MLPReplacement(WIDTH).width == 4 * WIDTH
    assert [SwiGLUReplacement(d).width for d in (24, 25, 576, 4096)] == [64, 128, 1536, 10944]


def test_the_norm_keeps_large_states_from_ruling() -> None:
    module, state = made("swiglu", seed=1), states(1, 4)
    branch = module(state) - state - module.linear(state)
    large = 1000.0 * state
    torch.testing.assert_close(module(large) - large - module.linear(large), branch, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LinearReplacement(4, rank=5), r"features=4, rank=5, diagonal=False.*Expected"),
        (lambda: LinearReplacement(4, rank=0), "rank=0"),
        (lambda: LinearReplacement(4, rank=2, diagonal=True), "diagonal=True.*no rank with diagonal"),
        (lambda: MLPReplacement(4, 0), r"width=0.*at least 1"),
        (lambda: MLPReplacement(4, activation="gelo"), r"activation='gelo'.*Expected.*gelu,"),
        (lambda: SwiGLUReplacement(4, -1), r"width=-1.*at least 1"),
    ],
)
def test_what_cannot_be_built(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        make()

"""Gradients at places whose state is that of another place, since a forward goes without the block between them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamline_hooks.training import HiddenStateMonitor, Measurement, StochasticDepth
from streamline_hooks.training.gradient_probes import GradientProbe
from tests.tiny_models import BLOCKS, tiny_model, tokens

RATES = [0.5] * BLOCKS


def loss_of(model: nn.Module, seed: int) -> Tensor:
    batch = tokens(2, 8, seed=seed)
    return model(batch, labels=batch, use_cache=False).loss


@contextmanager
def gradients(model: nn.Module) -> Iterator[list[dict[float, Tensor]]]:
    """Of each forward the gradients at the entrance of each block k that ran, and, as k + 0.5, at its exit."""
    forwards: list[dict[float, Tensor]] = []
    handles = [model.register_forward_pre_hook(lambda module, args: forwards.append({}))]
    for k, block in enumerate(model.model.layers):

        def enter(module: nn.Module, args: Any, k: int = k) -> None:
            found = forwards[-1]
            args[0].register_hook(lambda gradient: found.update({k: gradient.double()}))

        def leave(module: nn.Module, args: Any, output: Tensor, k: int = k) -> None:
            found = forwards[-1]
            output.register_hook(lambda gradient: found.update({k + 0.5: gradient.double()}))

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    yield forwards
    for handle in handles:
        handle.remove()


def norms(forwards: list[dict[float, Tensor]]) -> list[float]:
    """A place's state is what enters the next block that ran, or else what left the last."""
    return [
        math.sqrt(sum(f[min((k for k in f if k >= place), default=max(f))].square().sum().item() for f in forwards))
        for place in range(BLOCKS + 1)
    ]


def trained(model: nn.Module, seed: int, forwards: int = 6) -> tuple[Measurement, set[int]]:
    """What is measured in a step of several forwards, and the blocks that some of them went without."""
    without: set[int] = set()
    with StochasticDepth(model, RATES, seed=seed) as depth, HiddenStateMonitor(model) as monitor:
        for number in range(forwards):
            (loss_of(model, number) / forwards).backward()
            without |= set(depth.skipped)
        found = monitor.step()
    model.zero_grad()
    assert found is not None
    return found, without


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("at_once", [False, True])
def test_blocks_that_are_skipped_at_random(seed: int, at_once: bool) -> None:
    """The first and the last one, several in a row, and several forwards before one backward."""
    model = tiny_model("llama").train()
    skipped = []
    with (
        gradients(model) as reference,
        StochasticDepth(model, RATES, seed=seed) as depth,
        HiddenStateMonitor(model) as monitor,
    ):
        losses = []
        for number in range(6):
            losses.append(loss_of(model, number) / 6)
            skipped.append(depth.skipped)
            if not at_once:
                losses.pop().backward()
        if at_once:
            torch.stack(losses).sum().backward()
        found = monitor.step()
    assert {0, BLOCKS - 1} <= {k for blocks in skipped for k in blocks}
    assert any(set(blocks) >= {k, k + 1} for blocks in skipped for k in range(BLOCKS))
    assert list(found.gradient_norm) == pytest.approx(norms(reference), rel=1e-5)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    """Its blocks are checkpointed with their hooks inside, as those of Transformers 4 are."""
    for block in model.model.layers:
        call = functools.partial(type(block).__call__, block)

        def checkpointed_call(self: nn.Module, *args: Any, call: Any = call, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(call, **kwargs), *args, use_reentrant=reentrant)

        block.__class__ = type("Checkpointed", (type(block),), {"__call__": checkpointed_call})
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    """Where the graph is made in the backward it is not known which blocks ran: their places are not told."""
    plain, without = trained(tiny_model("llama").train(), seed=1, forwards=2)
    assert 0 < len(without) < BLOCKS
    found, _ = trained(checkpointed(tiny_model("llama").train(), reentrant), seed=1, forwards=2)
    for place, (one, other) in enumerate(zip(found.gradient_norm, plain.gradient_norm, strict=True)):
        if one is None:
            assert reentrant and {place - 1, place} & without
        else:
            assert one == pytest.approx(other, rel=1e-5)
    assert (None in found.gradient_norm) == reentrant


class Dropping(nn.Module):
    """It passes over blocks by itself, as by LayerDrop."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(4))
        self.layers = nn.ModuleList(blocks)

    def forward(self, state: Tensor, without: tuple[int, ...] = ()) -> Tensor:
        for k, block in enumerate(self.layers):
            state = state if k in without else block(state)
        return state


def test_blocks_that_a_model_passes_over_itself() -> None:
    """The last ones are not known to have been: whether a forward went on from there, nobody says."""
    torch.manual_seed(0)
    model, state = Dropping().train(), torch.randn(2, 5, 8, requires_grad=True)
    weights = torch.randn(2, 5, 8)

    def measured(*without: tuple[int, ...]) -> tuple[float | None, ...]:
        with HiddenStateMonitor(model) as monitor:
            for blocks in without:
                (model(state, without=blocks) * weights).sum().backward()
            found = monitor.step()
        assert found is not None
        return found.gradient_norm

    one = measured((1,))
    assert one[1] == one[2] and None not in one and one[2] != one[3]
    first = measured((0, 1))
    assert first[0] == first[1] == first[2] and None not in first
    both, last = measured((1,), (0, 1)), measured((1,), (2, 3))
    assert both[2] == pytest.approx(math.hypot(one[2], first[2]), rel=1e-6)
    assert [value is None for value in last] == [False, False, False, True, True]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_backwards_of_one_forward_are_not_told(reentrant: bool | None) -> None:
    model = tiny_model("llama").train()
    model = model if reentrant is None else checkpointed(model, reentrant)
    with HiddenStateMonitor(model, every=1) as monitor:
        loss = loss_of(model, 0) / 2
        loss.backward(retain_graph=True)
        loss.backward()
        found = monitor.step()
        assert found is not None and found.gradient_norm == (None,) * (BLOCKS + 1)
        assert None not in found.influence and None not in found.norm
        (loss_of(model, 0) / 2).backward()
        (loss_of(model, 1) / 2).backward()
        assert None not in monitor.step().gradient_norm  # type: ignore[union-attr]


# One probe


def probed() -> tuple[GradientProbe, Tensor, Tensor]:
    probe, state = GradientProbe(torch.device("cpu")), torch.randn(2, 3, 4, requires_grad=True)
    return probe, state, probe(state)


def test_two_backwards_through_one_state_have_no_sum() -> None:
    """Their gradients add up, and the squares of these do not."""
    probe, state, passed = probed()
    passed.sum().backward(retain_graph=True)
    passed.square().sum().backward()
    found = probe.pop()
    assert found is not None and math.isnan(found)
    assert torch.equal(state.grad, 1 + 2 * state)
    assert probe.pop() is None


def test_each_of_several_states_may_have_a_backward_of_its_own() -> None:
    probe, state, passed = probed()
    again = probe(state)
    passed.sum().backward()
    (2 * again).sum().backward()
    assert probe.pop() == pytest.approx(24 + 4 * 24)


def test_a_backward_that_sums_nothing_does_not_count() -> None:
    """As of a penalty on the gradient of the input."""
    probe, state, passed = probed()
    (slope,) = torch.autograd.grad(passed.square().sum(), state, create_graph=True)
    assert probe.pop() is None
    (passed.square().sum() + slope.detach().sum()).backward()
    assert probe.pop() == pytest.approx(float((2 * state.detach()).square().sum()), rel=1e-5)

"""A sum of squares is that of whole gradients, or not a number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from streamline_hooks.in_training.place_probes import GradientProbe


def probed() -> tuple[GradientProbe, Tensor, Tensor]:
    probe, state = GradientProbe(torch.device("cpu")), torch.randn(2, 3, 4, requires_grad=True)
    return probe, state, probe(state)


def test_two_backwards_through_one_state_have_no_sum() -> None:
    """Their gradients add up, and the squares of these do not."""
    probe, state, passed = probed()
    passed.sum().backward(retain_graph=True)
    passed.square().sum().backward()
    found = probe.take()
    assert found is not None and math.isnan(found)
    assert torch.equal(state.grad, 1 + 2 * state)
    assert probe.take() is None


def test_each_of_several_states_may_have_a_backward_of_its_own() -> None:
    probe, state, passed = probed()
    again = probe(state)
    passed.sum().backward()
    (2 * again).sum().backward()
    assert probe.take() == pytest.approx(24 + 4 * 24)


def test_a_backward_that_sums_nothing_does_not_count() -> None:
    """As of a penalty on the gradient of the input."""
    probe, state, passed = probed()
    (slope,) = torch.autograd.grad(passed.square().sum(), state, create_graph=True)
    assert probe.take() is None
    (passed.square().sum() + slope.detach().sum()).backward()
    assert probe.take() == pytest.approx(float((2 * state.detach()).square().sum()), rel=1e-5)

"""KL both ways, and a text's loss, against formulas written out anew, and their gradients against autograd's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.core import IGNORE_INDEX
from streamline_hooks.distillation.losses import Objective, summed_cross_entropy, summed_logit_loss


def plain_kl(repaired: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    p, q = original.log_softmax(dim=-1), repaired.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum()


WEIGHTS = st.sampled_from([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0), (0.3, 2.0, 0.7), (1.0, 0.0, 1.0)])


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 150), vocabulary=st.integers(2, 40), weights=WEIGHTS, seed=st.integers(0, 99))
def test_kl_both_ways_with_a_text_and_the_gradient_are_those_of_the_formula(
    tokens: int, vocabulary: int, weights: tuple[float, float, float], seed: int
) -> None:
    torch.manual_seed(seed)
    original, mine = torch.randn(tokens, vocabulary) * 3, torch.randn(tokens, vocabulary, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    forward, reverse, text = weights
    following = torch.randint(0, vocabulary, (tokens,)).where(torch.rand(tokens) < 0.7, IGNORE_INDEX)
    known = following != IGNORE_INDEX
    wanted = forward * plain_kl(theirs.double(), original.double())
    wanted = wanted + reverse * plain_kl(original.double(), theirs.double())
    wanted = wanted - text * theirs.double().log_softmax(dim=-1)[known, following[known]].sum()
    wanted.backward()
    with torch.no_grad():
        found = summed_logit_loss(mine, original, *weights, following)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    given = {"kl": forward, "reverse_kl": reverse, "lm": text}
    objective = Objective({name: weight for name, weight in given.items() if weight})
    found = objective.output_loss(mine, original.clone(), following)
    (2.0 * found).backward()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, 2.0 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_kl_without_a_gradient_leaves_the_original_alone() -> None:
    original, mine = torch.randn(7, 9), torch.randn(7, 9, requires_grad=True)
    before = original.clone()
    with torch.no_grad():
        summed_logit_loss(mine, original)
    assert torch.equal(original, before)


def test_a_gradient_that_is_used_up_is_not_given_twice() -> None:
    mine = torch.randn(7, 9, requires_grad=True)
    found = summed_logit_loss(mine, torch.randn(7, 9))
    (3.0 * found).backward(retain_graph=True)
    with pytest.raises(StreamlineError, match=r"backward.*already called.*again"):
        found.backward()


@pytest.mark.parametrize("label", [-1, 9])
def test_what_is_no_token_is_not_learned_as_one(label: int) -> None:
    following = torch.tensor([3, IGNORE_INDEX, label])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        summed_cross_entropy(torch.randn(3, 9), following)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        summed_logit_loss(torch.randn(3, 9), torch.randn(3, 9), 1.0, 0.0, 1.0, following)

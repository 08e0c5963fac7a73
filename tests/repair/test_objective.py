"""Objectives against formulas written out anew, and their gradients against autograd's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.predicted import UNCOUNTED, following_tokens
from streamline_hooks.repair.objective import Objective, summed_divergence, text_loss
from streamline_hooks.task import real_tokens


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
    following = torch.randint(0, vocabulary, (tokens,)).where(torch.rand(tokens) < 0.7, UNCOUNTED)
    known = following != UNCOUNTED
    wanted = forward * plain_kl(theirs.double(), original.double())
    wanted = wanted + reverse * plain_kl(original.double(), theirs.double())
    wanted = wanted - text * theirs.double().log_softmax(dim=-1)[known, following[known]].sum()
    wanted.backward()
    with torch.no_grad():
        found = summed_divergence(mine, original, *weights, following)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    found = Objective(kl=forward, reverse_kl=reverse, lm=text).of_answers(mine, original.clone(), following)
    (2.0 * found).backward()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, 2.0 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_kl_without_a_gradient_leaves_the_original_alone() -> None:
    original, mine = torch.randn(7, 9), torch.randn(7, 9, requires_grad=True)
    before = original.clone()
    with torch.no_grad():
        summed_divergence(mine, original)
    assert torch.equal(original, before)


def test_padding_counts_in_no_part() -> None:
    objective = Objective(kl=1.0, lm=0.5, mse=0.3, relative=0.2, cosine=0.1)
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    logits, said = torch.randn(2, 4, 11), torch.randn(2, 4, 11)
    states, theirs = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    ids = torch.randint(0, 11, (2, 4))

    def loss_of(logits: torch.Tensor, said: torch.Tensor, states: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        following = real_tokens(following_tokens(ids, mask)[..., None], mask)[:, 0]
        answers = objective.of_answers(real_tokens(logits, mask), real_tokens(said, mask), following)
        return answers + objective.of_states([states], [theirs], mask)

    loss = loss_of(logits, said, states, theirs)
    other = [tensor.clone() for tensor in (logits, said, states, theirs)]
    for tensor in other:
        tensor[0, :2] = 1e6
    assert torch.equal(loss, loss_of(*other))


def test_states_and_text_are_compared_as_the_formulas_say() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    a, b = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    square = (a - b).square()
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert Objective(kl=0, mse=2).of_states([a], [b], mask) == pytest.approx(2 * float(square.mean(-1).sum()))
    relative = square.sum(-1) / b.square().sum(-1)
    assert Objective(kl=0, relative=1).of_states([a], [b], mask) == pytest.approx(float(relative.sum()))
    assert Objective(kl=0, cosine=1).of_states([a], [b], mask) == pytest.approx(float((1 - cosine).sum()), rel=1e-5)
    assert Objective(kl=0, mse=2).of_states([a, b], [b, b], mask) == pytest.approx(float(square.mean(-1).sum()))
    logits, ids = torch.randn(1, 3, 6), torch.tensor([[4, 2, 5]])
    nll = -logits.log_softmax(-1)[0, [0, 1], [2, 5]].sum()
    following = following_tokens(ids, mask)[0]
    assert text_loss(logits[0], following) == pytest.approx(float(nll), rel=1e-5)
    assert Objective(kl=0, lm=2).of_answers(logits[0], following=following) == pytest.approx(2 * float(nll), rel=1e-5)


@pytest.mark.parametrize("text", ["kl", "mse", "relative + cosine", "kl + 0.5*lm", "0.25*kl + 2*mse"])
def test_an_objective_is_written_as_it_is_read(text: str) -> None:
    assert str(Objective.parse(text)) == text
    assert Objective.parse(str(Objective.parse(text))) == Objective.parse(text)


@pytest.mark.parametrize("text", ["", "mse + ", "kld", "x*kl", "kl*2"])
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"cannot be read at .*Expected a sum of kl, lm, mse, relative, cosine"):
        Objective.parse(text)


def test_weights_are_not_negative_and_not_all_zero() -> None:
    for weights in ({"kl": 0.0}, {"kl": -1.0, "lm": 2.0}):
        with pytest.raises(StreamlineError, match="expected one above zero, and none below"):
            Objective(**weights)


def test_a_gradient_that_is_used_up_is_not_given_twice() -> None:
    mine = torch.randn(7, 9, requires_grad=True)
    found = summed_divergence(mine, torch.randn(7, 9))
    (3.0 * found).backward(retain_graph=True)
    with pytest.raises(StreamlineError, match=r"has been used up; compute the KL anew"):
        found.backward()

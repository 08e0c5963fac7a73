"""Objectives against formulas written out anew, and their gradients against autograd's own."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.cli import parse_loss
from streamline_hooks.core import shift_labels
from streamline_hooks.distillation.losses import Objective, summed_cross_entropy
from streamline_hooks.modeling import select_tokens


def test_padding_counts_in_no_part() -> None:
    objective = Objective({"kl": 1.0, "lm": 0.5, "mse": 0.3, "relative": 0.2, "cosine": 0.1})
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    logits, said = torch.randn(2, 4, 11), torch.randn(2, 4, 11)
    states, theirs = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    ids = torch.randint(0, 11, (2, 4))

    def loss_of(logits: torch.Tensor, said: torch.Tensor, states: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        following = select_tokens(shift_labels(ids, mask)[..., None], mask)[:, 0]
        answers = objective.output_loss(select_tokens(logits, mask), select_tokens(said, mask), following)
        return answers + objective.state_loss([states], [theirs], mask)

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
    assert Objective({"mse": 2.0}).state_loss([a], [b], mask) == pytest.approx(2 * float(square.mean(-1).sum()))
    relative = square.sum(-1) / b.square().sum(-1)
    assert Objective({"relative": 1.0}).state_loss([a], [b], mask) == pytest.approx(float(relative.sum()))
    assert Objective({"cosine": 1.0}).state_loss([a], [b], mask) == pytest.approx(float((1 - cosine).sum()), rel=1e-5)
    assert Objective({"mse": 2.0}).state_loss([a, b], [b, b], mask) == pytest.approx(float(square.mean(-1).sum()))
    logits, ids = torch.randn(1, 3, 6), torch.tensor([[4, 2, 5]])
    nll = -logits.log_softmax(-1)[0, [0, 1], [2, 5]].sum()
    following = shift_labels(ids, mask)[0]
    assert summed_cross_entropy(logits[0], following) == pytest.approx(float(nll), rel=1e-5)
    assert Objective({"lm": 2.0}).output_loss(logits[0], following=following) == pytest.approx(2 * float(nll), rel=1e-5)


@pytest.mark.parametrize("text", ["kl", "mse", "relative + cosine", "kl + 0.5*lm", "0.25*kl + 2*mse"])
def test_an_objective_is_written_as_it_is_read(text: str) -> None:
    assert str(Objective(parse_loss(text))) == text
    assert Objective(parse_loss(str(Objective(parse_loss(text))))) == Objective(parse_loss(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "loss '' is unknown.*kl, lm, mse, relative, cosine"),
        ("mse + ", "loss '' is unknown"),
        ("kld", "'kld'.*Did you mean 'kl'"),
        ("x*kl", "weight 'x' of 'kl'.*above 0"),
        ("kl*2", "'2' is unknown"),
        ("kl + kl", "'kl' occurs twice.*Add"),
    ],
)
def test_what_is_no_objective_is_refused(text: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        parse_loss(text)


def test_weights_are_above_zero() -> None:
    for weights in ({"kl": 0.0}, {"kl": -1.0, "lm": 2.0}):
        with pytest.raises(StreamlineError, match=r"'kl'.*above 0.*Change"):
            Objective(weights)
    with pytest.raises(StreamlineError, match=r"loss=.*empty.*\{'kl': 1.0\}"):
        Objective({})


@pytest.mark.parametrize(
    ("objective", "lacking"),
    [
        (Objective({"kl": 1.0, "lm": 1.0}), r"kl . lm.*the teacher's output"),
        (Objective({"reverse_kl": 1.0}), "the teacher's output"),
        (Objective({"lm": 1.0}), r"loss lm.*labels"),
    ],
)
def test_a_part_of_the_loss_is_not_left_out_in_silence(objective: Objective, lacking: str) -> None:
    with pytest.raises(StreamlineError, match=lacking):
        objective.output_loss(torch.randn(3, 5))
    with pytest.raises(StreamlineError, match="without labels"):
        Objective({"kl": 1.0, "lm": 1.0}).output_loss(torch.randn(3, 5), torch.randn(3, 5))

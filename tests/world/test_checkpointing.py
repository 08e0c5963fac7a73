"""Gradient checkpointing runs a block twice: once forward, once more during the backward."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError
from streamline_hooks.recording import RecordingConfig
from tests.tiny_models import BLOCKS, Nudge, left_padded, tiny_model

both = pytest.mark.parametrize("use_reentrant", [True, False])


class Block(nn.Module):
    def __init__(self, ran: list[int]) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)
        self.ran = ran

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(1)
        return x + self.map(x).tanh()


class Checkpointed(nn.Module):
    """Checkpoints the call of each block, hooks included, as most code outside Transformers does."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ran: list[int] = []
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(self.ran) for _ in range(4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def states() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@both
@pytest.mark.parametrize("tokens", ["all", "real", "last"])
def test_one_visit_a_forward_though_a_block_runs_twice(use_reentrant: bool, tokens: str) -> None:
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    expected, model = Checkpointed(None), Checkpointed(use_reentrant)
    with HiddenStateRecorder(expected, tokens=tokens) as plain:
        expected(states(), attention_mask=mask)
    with HiddenStateRecorder(model, tokens=tokens) as record:
        for _ in range(2):
            model(states(), attention_mask=mask).square().mean().backward()
    assert len(model.ran) == 2 * 2 * 4
    for k in range(4):
        assert len(record.inputs[k]) == len(record.outputs[k]) == 2
        assert torch.equal(record.inputs[k][0], plain.inputs[k][0])
        assert torch.equal(record.outputs[k][1], plain.outputs[k][0])


@pytest.mark.parametrize("tokens", ["all", "real", "last"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_kept_graph_goes_through_the_checkpoint(tokens: str, dtype: torch.dtype | None) -> None:
    """What the recorder computes must not count among the tensors that a checkpoint keeps and compares."""
    mask, gradients = torch.tensor([[1] * 5, [1] * 3 + [0] * 2]), []
    for use_reentrant in (None, False):
        model = Checkpointed(use_reentrant)
        with HiddenStateRecorder(model, tokens=tokens, config=RecordingConfig(detach=False, dtype=dtype)) as record:
            output = model(states(), attention_mask=mask)
        sum(record.outputs[k][0].square().mean() for k in range(4)).backward(retain_graph=True)
        output.mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_graph_that_the_reentrant_kind_cuts_is_not_promised() -> None:
    model = Checkpointed(True)
    with (
        HiddenStateRecorder(model, config=RecordingConfig(detach=False)),
        pytest.raises(StreamlineError, match="Use use_reentrant=False, or"),
    ):
        model(states())
    with torch.no_grad(), HiddenStateRecorder(model, config=RecordingConfig(detach=False)) as record:
        model(states())  # nobody expects a graph here
    assert len(record.inputs[0]) == 1


def splice_gradient(model: nn.Module, surgeon_first: bool = True) -> Tensor:
    nudge = Nudge(8)
    model.requires_grad_(False)
    with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.replace([2], nudge)
        model(states().requires_grad_()).square().mean().backward()
        assert [len(record.inputs[k]) for k in range(4)] == [1, 1, 0, 1]
    assert nudge.weight.grad is not None
    return nudge.weight.grad


@both
def test_a_trained_splice_between_frozen_blocks(use_reentrant: bool) -> None:
    torch.testing.assert_close(splice_gradient(Checkpointed(use_reentrant)), splice_gradient(Checkpointed(None)))


def test_the_reentrant_kind_needs_an_input_with_gradients() -> None:
    """PyTorch's own limit, which it warns of: a trained splice in a frozen model would get no gradient."""
    model, nudge = Checkpointed(True).requires_grad_(False), Nudge(8)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2], nudge)
        with pytest.warns(UserWarning, match="requires_grad=True"):
            loss = model(states()).square().mean()
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()


def llama_gradients(use_reentrant: bool | None) -> tuple[Tensor, HiddenStateRecorder]:
    model, nudge = tiny_model("llama").train().requires_grad_(False), Nudge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name in every version that is supported
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.replace([2], nudge)
        record(**left_padded(2, 7)).logits.square().mean().backward()
    assert nudge.weight.grad is not None and all(p.grad is None for p in model.parameters())
    return nudge.weight.grad, record


@both
def test_transformers_checkpointing(use_reentrant: bool) -> None:
    expected, plain = llama_gradients(None)
    gradient, record = llama_gradients(use_reentrant)
    torch.testing.assert_close(gradient, expected)
    for k in set(range(BLOCKS)) - {2}:
        assert len(record.inputs[k]) == len(record.outputs[k]) == 1
        assert torch.equal(record.inputs[k][0], plain.inputs[k][0])

"""torch.compile: before, it is refused; inside a context, it works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError
from streamline_hooks.recording import RecordingConfig
from tests.tiny_models import BLOCKS, Nudge, tiny_model, tokens


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 7), use_cache=False).logits


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def one_block(model: nn.Module) -> nn.Module:
    model.model.layers[3].compile(backend="eager")
    return model


def one_forward(model: nn.Module) -> nn.Module:
    block = model.model.layers[3]
    block.forward = torch.compile(block.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place, one_block, one_forward])
def test_a_compiled_model_is_refused(compiled: object) -> None:
    model = compiled(tiny_model("llama"))  # type: ignore[operator]
    with pytest.raises(StreamlineError, match=r"Cannot operate on a compiled.*hooks.*never fire"):
        LayerSurgeon(model).__enter__()
    with pytest.raises(StreamlineError, match=r"hidden states of a compiled.*compile it afterwards"):
        HiddenStateRecorder(model).__enter__()


def test_compiled_inside_a_surgeon_without_a_graph_break() -> None:
    model = tiny_model("llama")
    original = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], Nudge(seed=1))
        surgeon.insert(BLOCKS, Nudge(seed=2))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled), logits(model))
    torch.testing.assert_close(logits(compiled), original)  # the compiler notices that the splices are gone


def test_compiled_inside_a_recorder_of_states_with_their_graph() -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model, config=RecordingConfig(detach=False)) as record:
        logits(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        logits(compiled), logits(compiled)
    logits(compiled)
    for visits in (*record.inputs.values(), *record.outputs.values()):
        assert len(visits) == 3
        torch.testing.assert_close(visits[1], visits[0])
        assert torch.equal(visits[1], visits[2])


def test_compiled_after_a_commit() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], Nudge())
        surgeon.commit()
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True, backend="eager")), logits(model))

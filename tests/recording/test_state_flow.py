"""Which argument of a plain block is its hidden state is verified, or named by the user; it is never guessed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack, load, profile, save
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import bypassing

WIDTH = 8
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
CONDITIONS = {
    "same shape": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)),
    "a vector a row": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)),
    "other tokens": torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)),
}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.condition = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def mixed(self, state: Tensor, condition: Tensor) -> Tensor:
        added = self.condition(condition)
        added = added[:, None] if added.ndim == 2 else added if added.shape == state.shape else added.mean(1, True)
        return state + self.inner(state).tanh() + added


class ConditionFirst(_Block):
    def forward(self, cond: Tensor, x: Tensor) -> Tensor:
        return self.mixed(x, cond)


class Misleading(_Block):
    """The usual name is that of the condition."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.mixed(h, x)


class StateFirst(_Block):
    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.mixed(x, cond)


class ByKeyword(_Block):
    def forward(self, *, cond: Tensor, h: Tensor) -> Tensor:
        return self.mixed(h, cond)


class NamedStateFirst(StateFirst):
    hidden_state_argument = "x"


class NamedConditionFirst(ConditionFirst):
    hidden_state_argument = "x"


class NumberedConditionFirst(ConditionFirst):
    hidden_state_argument = 1


class NamedMisleading(Misleading):
    hidden_state_argument = "h"


class NamedByKeyword(ByKeyword):
    hidden_state_argument = "h"


class Model(nn.Module):
    def __init__(self, block: type[_Block], shift: float = 0.0, keywords: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.shift, self.keywords = nn.ModuleList(block() for _ in range(4)), shift, keywords

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, ByKeyword):
                x = layer(cond=condition, h=x)
            elif isinstance(layer, StateFirst):
                x = layer(x, cond=condition) if self.keywords else layer(x, condition)
            elif isinstance(layer, Misleading):
                x = layer(x=condition, h=x) if self.keywords else layer(condition, x)
            else:
                x = layer(condition, x=x) if self.keywords else layer(condition, x)
            x = x + self.shift  # as position embeddings that each block is given anew
        return x


NAMED = [NamedConditionFirst, NumberedConditionFirst, NamedMisleading, NamedByKeyword, NamedStateFirst]
UNNAMED = [ConditionFirst, Misleading, ByKeyword]


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("block", UNNAMED)
def test_what_is_not_the_output_of_the_block_before_is_not_recorded(
    block: type[_Block], keywords: bool, condition: Tensor
) -> None:
    """The error names the parameter, or asks for it."""
    model = Model(block, keywords=keywords)
    expected = "x" if block is ConditionFirst else "h"
    with HiddenStateRecorder(model) as record, pytest.raises(StreamlineError, match="hidden_state_argument") as error:
        record(x=X, condition=condition)
    assert repr(expected) in str(error.value) or block is ByKeyword
    with pytest.raises(StreamlineError, match="hidden_state_argument"):
        profile(model, [{"x": X, "condition": condition}])
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("block", UNNAMED)
def test_a_splice_does_not_change_the_condition(block: type[_Block], keywords: bool, condition: Tensor) -> None:
    model = Model(block, keywords=keywords)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], nn.Linear(WIDTH, WIDTH))
        with pytest.raises(StreamlineError, match="hidden_state_argument"):
            model(X, condition)
    model(X, condition)


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keyword"])
def test_a_generic_name_says_too_little_to_change_its_argument(keywords: bool) -> None:
    """``forward(x, cond)`` looks like ``forward(x, h)``; a vector a row cannot be meant."""
    model = Model(StateFirst, keywords=keywords)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], nn.Linear(WIDTH, WIDTH))
        with pytest.raises(StreamlineError, match="'x', 'cond'.*StateFirst.hidden_state_argument"):
            model(X, CONDITIONS["other tokens"])
        model(X, CONDITIONS["a vector a row"])


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["handed on", "changed in between"])
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("block", [*NAMED, StateFirst])
@torch.no_grad()
def test_a_named_argument_is_read_and_written(
    block: type[_Block], keywords: bool, condition: Tensor, shift: float
) -> None:
    model = Model(block, shift, keywords)
    with HiddenStateRecorder(model) as record:
        output = record(x=X, condition=condition)
    assert torch.equal(record.inputs[0][0], X)
    for k in range(1, 4):
        assert torch.equal(record.inputs[k][0], record.outputs[k - 1][0] + shift)
    assert torch.equal(record.outputs[3][0] + shift, output)
    measured = profile(model, [{"x": X, "condition": condition}])
    assert measured.cosine.shape == (5, 5)


@pytest.mark.parametrize("block", NAMED)
@torch.no_grad()
def test_a_splice_changes_a_named_argument(block: type[_Block]) -> None:
    condition = CONDITIONS["same shape"]
    for keywords in (False, True):
        model = Model(block, keywords=keywords)
        nudge = LinearReplacement.from_map(0.5 * torch.eye(WIDTH))
        state = model.layers[0].mixed(X, condition)
        expected = model.layers[3].mixed(model.layers[2].mixed(nudge(state), condition), condition)
        with bypassing(model, range(1, 2), nudge):
            torch.testing.assert_close(model(X, condition), expected)
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([1], nudge)
            torch.testing.assert_close(model(X, condition), expected)
            torch.testing.assert_close(copy.deepcopy(model)(X, condition), expected)


@torch.no_grad()
def test_a_named_argument_holds_in_a_loaded_model(tmp_path: Path) -> None:
    model, condition = Model(NamedConditionFirst), CONDITIONS["same shape"]
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], LinearReplacement.from_map(0.5 * torch.eye(WIDTH)))
        surgeon.commit()
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", into=Model(NamedConditionFirst))
    torch.testing.assert_close(loaded(X, condition), model(X, condition))


@pytest.mark.parametrize("declared", ["y", 7, 1.5])
def test_a_name_of_no_parameter_is_refused(declared: Any) -> None:
    model = Model(ConditionFirst)
    for layer in model.layers:
        layer.hidden_state_argument = declared
    with HiddenStateRecorder(model), pytest.raises(StreamlineError, match=f"{declared!r}"):
        model(X, CONDITIONS["same shape"])


@pytest.mark.parametrize("keywords", [False, True])
def test_a_state_that_is_changed_between_blocks_is_no_contradiction(keywords: bool) -> None:
    """Also if the condition has the shape of the state."""
    model = Model(StateFirst, shift=1.0, keywords=keywords)
    with torch.no_grad(), HiddenStateRecorder(model, [0, 2]) as record:
        record(x=X, condition=CONDITIONS["same shape"])
    assert torch.equal(record.inputs[0][0], X)


def test_each_block_is_verified_once() -> None:
    """What is compared by value costs a synchronization on a GPU."""
    model, compared = Model(StateFirst, shift=1.0), []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            compared.extend([function] if function is torch.equal else [])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), HiddenStateRecorder(model) as record, Watched():
        record(x=X, condition=CONDITIONS["same shape"])
        once = len(compared)
        record(x=X, condition=CONDITIONS["same shape"])
    assert 0 < once == len(compared)


def test_compiled_without_a_graph_break() -> None:
    """A block with several possible states, spliced."""
    torch.compiler.reset()
    condition = CONDITIONS["same shape"]
    for block in (NamedStateFirst, NamedConditionFirst):
        model = Model(block)
        with torch.no_grad(), LayerSurgeon(model) as surgeon:
            surgeon.replace([1], nn.Linear(WIDTH, WIDTH))
            expected = model(X, condition)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(X, condition), expected)
    torch.compiler.reset()


def test_the_stack_of_torch_s_own_decoder() -> None:
    """Its blocks are given the encoder's states beside their own."""
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True)
    model = nn.TransformerDecoder(layer, 3).eval()
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        model(X, CONDITIONS["same shape"])
    assert torch.equal(record.inputs[1][0], record.outputs[0][0]) and len(find_stack(model)) == 3

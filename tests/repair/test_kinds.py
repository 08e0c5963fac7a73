"""Kinds by name, with their options, and what each costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamline_hooks import LinearReplacement, StreamlineError, find_stack
from streamline_hooks.repair import Kind, kind_named, known_kinds, register_kind, size_of
from streamline_hooks.repair.size import features_of, inner_width_of
from streamline_hooks.replacements import InheritedBlocks, MLPReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model as any_model
from tests.other_models import made
from tests.repair.stand_ins import KINDS, SLOTS
from tests.tiny_models import FAMILIES, WIDTH, tiny_model

WINDOW = range(2, 5)


def built(text: str, family: str = "llama") -> nn.Module:
    made = kind_named(text).build(find_stack(tiny_model(family)), WINDOW)
    assert isinstance(made, nn.Module)
    return made


def test_options_are_read() -> None:
    low_rank, diagonal, mlp, swiglu = map(
        built,
        (
            "linear:rank=4",
            "linear:diagonal",
            " mlp:width=24, activation=relu,bias,linear=False ",
            "swiglu:norm=false,width=24",
        ),
    )
    assert isinstance(low_rank, LinearReplacement) and low_rank.rank == 4
    assert isinstance(diagonal, LinearReplacement) and diagonal.diagonal
    assert isinstance(mlp, MLPReplacement)
    assert mlp.to_config() == {"features": WIDTH, "width": 24, "activation": "relu", "bias": True, "linear": False}
    assert isinstance(swiglu, SwiGLUReplacement) and (swiglu.width, swiglu.norm) == (24, None)
    assert kind_named(" mlp:width=24 ").name == "mlp:width=24"
    two = built("block:count=2")
    assert isinstance(two, InheritedBlocks) and len(two) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cubic",
            r"'cubic'.*Known: none, linear, mlp",
        ),
        (
            "linear:width=3",
            r"'linear:width=3'.*'width'.*options: rank .int.",
        ),
        ("none:width=3", r"'none'.*'width'.*options: none"),
        (
            "mlp:width=3,width=4",
            r"'mlp'.*twice, 'width'.*options: width .int.",
        ),
        ("mlp:width=wide", r"'mlp:width=wide'.*width='wide'.*expected int"),
        ("mlp:width", r"width='true'.*expected int"),
        ("swiglu:norm=perhaps", r"norm='perhaps'.*expected bool"),
        ("block:count=0", r"count=0.*1 or more"),
        ("block:count=1.5", r"count='1.5'.*expected int"),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        kind_named(text)


def test_a_kind_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self, features: int, depth: int = 1, wide: bool = False, scale: float = 1.0) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(features, features) for _ in range(depth)))
            self.given = (depth, wide, scale)

        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state + self.layers(state)

    register_kind("test-own", Own)
    register_kind("test-own", Own)  # as when a notebook's cell runs again
    assert "test-own" in known_kinds()
    assert built("test-own:depth=3,wide,scale=0.5").given == (3, True, 0.5)
    register_kind("test-untyped", lambda features, depth=1, name=None: nn.Linear(features, features))
    assert kind_named("test-untyped:depth=2,name=what").name == "test-untyped:depth=2,name=what"
    with pytest.raises(StreamlineError, match=r"depth .int., wide .bool., scale .float."):
        kind_named("test-own:deep=3")
    with pytest.raises(StreamlineError, match=r"depth='1.5'.*expected"):
        kind_named("test-untyped:depth=1.5")

    def strange(features: int, shape: list[int] | None = None, depth: Unknown = 2, **more: int) -> nn.Module:  # noqa: F821
        return nn.Linear(features, features * depth)

    register_kind("test-strange", strange)
    assert built("test-strange:depth=3").out_features == 3 * WIDTH
    with pytest.raises(StreamlineError, match=r"'more'.*shape .*, depth .int.[.]"):
        kind_named("test-strange:more=3")
    with pytest.raises(StreamlineError, match=r"'linear'.*_linear.*choose"):
        register_kind("linear", Own)
    for name in ("", "a:b", "a,b", "a b", "a=b"):
        with pytest.raises(StreamlineError, match=r"cannot name a kind.*expected"):
            register_kind(name, Own)


def test_a_kind_that_makes_what_takes_a_slot_says_so() -> None:
    stack = find_stack(tiny_model("llama"))
    kind = Kind("mine", lambda stack, window: stack[window.start])
    with pytest.raises(StreamlineError, match=r"'mine'.*0 slots.*LlamaDecod"):
        kind.build(stack, WINDOW)


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_states_what_it_costs(family: str, text: str) -> None:
    """Told without building it, and as counted on what is built."""
    stack, kind = find_stack(tiny_model(family)), kind_named(text)
    size, made = kind.size(stack, WINDOW), kind.build(stack, WINDOW)
    assert size == size_of(stack, made)
    parameters = list(made.parameters()) if isinstance(made, nn.Module) else []
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.slots == kind.slots == SLOTS.get(text, 0)
    if text != "linear:diagonal":
        assert size.flops_per_token == 2 * sum(p.numel() for p in parameters if p.ndim > 1)


def test_what_a_mixture_or_a_strange_module_costs_is_not_guessed() -> None:
    mixture = find_stack(any_model("mixtral"))
    size = kind_named("block").size(mixture, WINDOW)
    assert size.flops_per_token is None
    assert str(size) == f"{size.parameters:,} parameters, FLOPs not stated, 1 slot"
    assert size_of(mixture, nn.Linear(3, 3)).flops_per_token is None
    assert str(kind_named("none").size(mixture, WINDOW)) == "0 parameters, 0 FLOPs a token, no slot"


@pytest.mark.parametrize(
    ("family", "inner"),
    [("llama", 48), ("opt", 48), ("gpt2", None), ("gpt_neox", 48), ("qwen3", 48), ("gemma3", 48)],
)
def test_widths_come_from_the_configuration(family: str, inner: int | None) -> None:
    stack = find_stack(tiny_model(family))
    assert features_of(stack) == WIDTH and inner_width_of(stack, 2) == inner
    swiglu = kind_named("swiglu").build(stack, WINDOW)
    assert isinstance(swiglu, SwiGLUReplacement) and swiglu.width == (inner or 128)


def test_widths_of_a_model_without_a_configuration() -> None:
    class Bare(nn.Module):
        def __init__(self, embedded: bool, normed: bool) -> None:
            super().__init__()
            self.tokens = nn.Embedding(20, 8) if embedded else nn.Linear(4, 8)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
            for block in self.blocks if not normed else ():
                block.norm1 = block.norm2 = nn.Identity()

    assert all(features_of(find_stack(Bare(*how), "blocks")) == 8 for how in ((True, False), (False, True)))
    with pytest.raises(StreamlineError, match=r"Bare.*no hidden_size"):
        features_of(find_stack(Bare(False, False), "blocks"))


def test_random_weights_are_the_same_for_a_seed_and_others_for_another() -> None:
    stack = find_stack(tiny_model("llama"))
    weights = [kind_named("swiglu", seed).build(stack, WINDOW).up_proj.weight for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("stage", "width"), [(0, 16), (1, 32)])
def test_each_stage_has_a_width_of_its_own(stage: int, width: int) -> None:
    """The configuration speaks of the last stage alone."""
    stack = find_stack(made("swin"), f"encoder.layers.{stage}.blocks")
    assert features_of(stack) == width
    assert kind_named("linear").make(stack, range(1)).projection.weight.shape == (width, width)

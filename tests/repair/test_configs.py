"""Configs of replacements: their options, their short forms, files, and what each costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError, find_stack
from streamline_hooks.cli import parse_replacement
from streamline_hooks.modeling import BlockStack, StateSource
from streamline_hooks.repair import (
    REPLACEMENTS,
    BlockConfig,
    LinearConfig,
    MLPConfig,
    NoneConfig,
    Repair,
    ReplacementConfig,
    SwiGLUConfig,
    fit_windows,
    register_replacement,
    replacement_size,
)
from streamline_hooks.repair.inherited_blocks import InheritedBlocks
from streamline_hooks.repair.placement import hidden_size_of, inner_width_of
from streamline_hooks.replacements import LinearReplacement, MLPReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model as any_model
from tests.other_models import made
from tests.repair.replacement_modules import KINDS, SLOTS
from tests.tiny_models import FAMILIES, WIDTH, tiny_model

WINDOW = range(2, 5)


def built(text: str, family: str = "llama") -> nn.Module:
    made = parse_replacement(text).build(find_stack(tiny_model(family)), WINDOW)
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
    assert MLPConfig(width=24).name == "mlp:width=24"
    two = built("block:count=2")
    assert isinstance(two, InheritedBlocks) and len(two) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cubic",
            r"'cubic'.*Expected one of none, linear, mlp",
        ),
        (
            "linear:width=3",
            r"'linear:width=3'.*'width'.*Expected one of rank .int.",
        ),
        ("none:width=3", r"'none'.*'width'.*Expected no options"),
        (
            "mlp:width=3,width=4",
            r"'mlp'.*repeats.*'width'.*Expected one of width .int.",
        ),
        ("mlp:width=wide", r"'mlp:width=wide'.*width='wide'.*Expected int"),
        ("mlp:width", r"width='true'.*Expected int"),
        ("swiglu:norm=perhaps", r"norm='perhaps'.*Expected bool"),
        ("block:count=0", r"count=0.*at least 1"),
        ("block:count=1.5", r"count='1.5'.*Expected int"),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        parse_replacement(text)


class Own(nn.Module):
    def __init__(self, features: int, depth: int, wide: bool, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(features, features) for _ in range(depth)))
        self.given = (depth, wide, scale)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.layers(state)


@dataclass(frozen=True)
class OwnConfig(ReplacementConfig):
    kind = "test-own"
    is_solved = False
    depth: int = 1
    wide: bool = False
    scale: float = 1.0

    def make(self, stack: BlockStack, window: range) -> nn.Module:
        return Own(hidden_size_of(stack), self.depth, self.wide, self.scale)


def test_a_kind_of_a_user() -> None:
    assert register_replacement(register_replacement(OwnConfig)) is OwnConfig  # as when a notebook's cell runs again
    assert "test-own" in REPLACEMENTS
    config = parse_replacement("test-own:depth=3,wide,scale=0.5").seeded(7)
    assert config == OwnConfig(depth=3, wide=True, scale=0.5, seed=7)
    assert built(config.name).given == (3, True, 0.5)
    with pytest.raises(StreamlineError, match=r"depth .int., wide .bool., scale .float."):
        parse_replacement("test-own:deep=3")
    with pytest.raises(StreamlineError, match=r"depth='1.5'.*Expected int"):
        parse_replacement("test-own:depth=1.5")
    with pytest.raises(StreamlineError, match=r"OwnConfig.*depth='3'.*Expected int"):
        OwnConfig(depth="3")  # type: ignore[arg-type]


def test_annotations_that_cannot_be_read() -> None:
    config = make_dataclass("Strange", [("depth", "Unknown", 2)], bases=(ReplacementConfig,), frozen=True)
    config.kind = "test-strange"  # type: ignore[attr-defined]
    register_replacement(config)
    assert parse_replacement("test-strange:depth=3").depth == 3  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Named(ReplacementConfig):
    kind = "test-named"
    mode: str = "plain"
    layers: tuple[str, ...] = field(default_factory=lambda: ("q", "k"))
    wide: bool = True


@pytest.mark.parametrize(
    "config", [Named(), Named(mode="Bc"), Named(layers=("v",)), Named(layers=("v", "o"), wide=False)]
)
def test_every_option_is_in_the_short_form(config: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPLACEMENTS, "test-named", Named)
    assert parse_replacement(config.name) == config
    assert Named().name == "test-named"


class NoDataclass(ReplacementConfig):
    kind = "test-no-dataclass"


@dataclass(frozen=True)
class Required(ReplacementConfig):
    kind = "test-required"
    depth: int = field(kw_only=True)


@pytest.mark.parametrize("kind", ["", "a:b", "a,b", "a b", "a=b", 3, "linear"])
def test_kinds_that_cannot_be_registered(kind: Any) -> None:
    config = make_dataclass("Named", [], bases=(ReplacementConfig,), frozen=True)
    config.kind = kind  # type: ignore[attr-defined]
    with pytest.raises(StreamlineError, match=rf"{kind!r}.*(Change|Choose)"):
        register_replacement(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (NoDataclass, "NoDataclass.*dataclass"),
        (Required, "depth.*Add a default"),
        (nn.Linear, "Linear.*Expected"),
    ],
)
def test_classes_that_are_no_config(config: Any, named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        register_replacement(config)


def test_a_config_whose_module_takes_a_slot_says_so() -> None:
    class Copying(ReplacementConfig):
        def make(self, stack: BlockStack, window: range) -> nn.Module:
            return stack[window.start]

    with pytest.raises(StreamlineError, match=r"Copying.*slots=0.*LlamaDecoderLayer.*Correct"):
        Copying().build(find_stack(tiny_model("llama")), WINDOW)


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"rank": 4, "diagonal": True},
    "mlp": {"width": 24, "activation": "relu", "bias": True, "linear": False},
    "swiglu": {"width": 24, "norm": False, "linear": False},
    "block": {"count": 2, "solve": False},
    "merged": {"weight": 0.5, "solve": True},
    "feed_forward": {"width": 24},
}
OWN = [kind for kind, config in REPLACEMENTS.items() if config.__module__.startswith("streamline_hooks.")]
"""The library's own kinds: other tests register more."""


@pytest.mark.parametrize("kind", OWN)
def test_configs_are_read_as_they_were_written(kind: str) -> None:
    plain = REPLACEMENTS[kind]()
    assert ReplacementConfig.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert parse_replacement(plain.name) == plain and plain.name == kind == str(plain)
    assert {f.name for f in fields(plain)} == {"seed", *OPTIONS.get(kind, {})}, "describe the option in OPTIONS"
    for option, value in OPTIONS.get(kind, {}).items():
        config = replace(plain, **{option: value}, seed=3)
        assert getattr(config, option) != getattr(plain, option)
        assert ReplacementConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert parse_replacement(config.name).seeded(3) == config


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind, options in OPTIONS.items() for option in options]
)
def test_each_option_has_an_effect(kind: str, option: str) -> None:
    """In what is made, or in how it is fitted."""
    stack, plain = find_stack(tiny_model("llama")), REPLACEMENTS[kind]()
    config = replace(plain, **{option: OPTIONS[kind][option]})

    def effect(config: ReplacementConfig) -> tuple[Any, ...]:
        module = config.build(stack, WINDOW)
        assert isinstance(module, nn.Module)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        values = [p.double().sum().item() for p in module.parameters()]
        return str(module), shapes, values, config.is_solved, config.slots

    assert effect(config) != effect(plain)
    assert effect(plain) == effect(replace(plain))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "linaer"}, "'linaer'.*Did you mean 'linear'"),
        ({}, "kind is missing.*Expected one of none, linear.*Add"),
        ({"kind": "linear", "rnak": 3}, "'rnak'.*Did you mean 'rank'"),
        ({"kind": "linear", "rank": 0}, "rank=0.*at least 1"),
        ({"kind": "mlp", "width": 0}, "width=0.*at least 1"),
        ({"kind": "linear", "rank": True}, "rank=True.*Expected int"),
        ({"kind": "block", "count": 1.5}, "count=1.5.*Expected int"),
        ({"kind": "mlp", "seed": "x"}, "seed='x'.*Expected int"),
    ],
)
def test_values_that_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        ReplacementConfig.from_dict(values)


def test_the_seed_of_the_call_is_for_configs_without_one() -> None:
    assert LinearConfig().seeded(5).seed == 5 and LinearConfig(seed=3).seeded(5).seed == 3


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_states_what_it_costs(family: str, text: str) -> None:
    """Told without building it, and as counted on what is built."""
    stack, kind = find_stack(tiny_model(family)), parse_replacement(text)
    size, made = kind.size(stack, WINDOW), kind.build(stack, WINDOW)
    assert size == replacement_size(stack, made)
    parameters = list(made.parameters()) if isinstance(made, nn.Module) else []
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.slots == kind.slots == SLOTS.get(text, 0)
    if text != "linear:diagonal":
        assert size.flops_per_token == 2 * sum(p.numel() for p in parameters if p.ndim > 1)


def test_what_a_mixture_or_a_strange_module_costs_is_not_guessed() -> None:
    mixture = find_stack(any_model("mixtral"))
    size = BlockConfig().size(mixture, WINDOW)
    assert size.flops_per_token is None
    assert str(size) == f"{size.parameters:,} parameters, FLOPs not stated, 1 slot"
    assert replacement_size(mixture, nn.Linear(3, 3)).flops_per_token is None
    assert str(NoneConfig().size(mixture, WINDOW)) == "0 parameters, 0 FLOPs per token, no slot"


@pytest.mark.parametrize(
    ("family", "inner"),
    [("llama", 48), ("opt", 48), ("gpt2", None), ("gpt_neox", 48), ("qwen3", 48), ("gemma3", 48)],
)
def test_widths_come_from_the_configuration(family: str, inner: int | None) -> None:
    stack = find_stack(tiny_model(family))
    assert hidden_size_of(stack) == WIDTH and inner_width_of(stack, 2) == inner
    swiglu = SwiGLUConfig().build(stack, WINDOW)
    assert isinstance(swiglu, SwiGLUReplacement) and swiglu.width == (inner or 128)


def test_widths_of_a_model_without_a_configuration() -> None:
    class Bare(nn.Module):
        def __init__(self, embedded: bool, normed: bool) -> None:
            super().__init__()
            self.tokens = nn.Embedding(20, 8) if embedded else nn.Linear(4, 8)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
            for block in self.blocks if not normed else ():
                block.norm1 = block.norm2 = nn.Identity()

    assert all(hidden_size_of(find_stack(Bare(*how), "blocks")) == 8 for how in ((True, False), (False, True)))
    with pytest.raises(StreamlineError, match=r"Bare.*no hidden_size"):
        hidden_size_of(find_stack(Bare(False, False), "blocks"))


def test_random_weights_are_the_same_for_a_seed_and_others_for_another() -> None:
    stack = find_stack(tiny_model("llama"))
    weights = [SwiGLUConfig().seeded(seed).build(stack, WINDOW).up_proj.weight for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("stage", "width"), [(0, 16), (1, 32)])
def test_each_stage_has_a_width_of_its_own(stage: int, width: int) -> None:
    """The configuration speaks of the last stage alone."""
    stack = find_stack(made("swin"), f"encoder.layers.{stage}.blocks")
    assert hidden_size_of(stack) == width
    assert LinearConfig().make(stack, range(1)).projection.weight.shape == (width, width)


def test_a_module_that_a_fit_made_gets_the_precision_and_mode_of_the_window() -> None:
    def fit_identity(source: StateSource, windows: list[range], *rest: Any) -> list[Repair]:
        width = hidden_size_of(source.stack)
        return [Repair(w, LinearReplacement.from_map(torch.eye(width).double()), 0.5, 0.5, None) for w in windows]

    @dataclass(frozen=True)
    class FittedConfig(ReplacementConfig):
        kind = "test-fitted"
        fit = staticmethod(fit_identity)

        def make(self, stack: BlockStack, window: range) -> None:
            return None

    model = tiny_model("llama").to(torch.bfloat16).eval()
    text = [torch.arange(3, 15).view(2, 6)]
    (repair,) = fit_windows(model, [WINDOW], FittedConfig(), text, text)
    assert {p.dtype for p in repair.replacement_module.parameters()} == {torch.bfloat16}
    assert not repair.replacement_module.training

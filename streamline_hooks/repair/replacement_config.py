"""What describes a replacement: its config, read from and written to names and files, and the registry of kinds."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.repaired import Repair
from streamline_hooks.repair.size import StandInSize, size_of
from streamline_hooks.repair.stand_in import StandIn, blocks_of
from streamline_hooks.stack import BlockStack

Fitter = Callable[..., list[Repair | UnsupportedSurgery]]
Filler = Callable[..., dict[int, UnsupportedSurgery]]


@dataclass(frozen=True)
class ReplacementConfig:
    """Describe what replaces a window of blocks.

    Each kind is a subclass: a frozen dataclass with a class attribute `kind`, its options as fields with defaults, and
    a method `make`. `register_replacement` makes it known by its name.

    Attributes
    ----------
    seed : int, optional
        Seed of the weights that are random at first; by default the seed of the compression.

    Examples
    --------
    >>> from streamline_hooks import LinearConfig, SwiGLUConfig
    >>> LinearConfig(rank=64).to_dict()
    {'kind': 'linear', 'rank': 64, 'diagonal': False, 'seed': None}
    >>> str(SwiGLUConfig(width=1536, norm=False))
    'swiglu:width=1536,norm=false'
    """

    kind: ClassVar[str] = ""
    least: ClassVar[Mapping[str, float]] = {}
    """The smallest value of fields that have one."""
    fit: ClassVar[Fitter | None] = None
    """Fits a kind that is no module. Takes a stack, windows, the two parts of the calibration text, a probe batch and
    the text of the progress bar; returns for each window a `Repair`, or the reason why there is none."""

    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self, **self.least)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise StreamlineError(f"{self.kind}: {f.name}={value} is not finite. Expected a number. Change it.")

    def make(self, stack: BlockStack, window: range) -> StandIn:
        """Return a new replacement for a window, of its final size and not yet initialised from data.

        Parameters
        ----------
        stack : BlockStack
            Of a model that no surgeon has changed.
        window : range

        Returns
        -------
        torch.nn.Module or None
            Maps (batch, tokens, features) to the same shape. None removes the window.
        """
        raise NotImplementedError

    def prepare(self, stack: BlockStack, window: range, probe: Batch | Tensor | None) -> StandIn:
        """Return a new replacement that is to be fitted. `probe` is a batch for models that need one to be run."""
        return self.make(stack, window)

    @property
    def slots(self) -> int:
        """Number of slots in the stack, and so in the KV cache, that the replacement takes."""
        return 0

    @property
    def fill(self) -> Filler | None:
        """Completes new replacements from the calibration text, before least squares; see `fill_concatenated`."""
        return None

    @property
    def is_solved(self) -> bool:
        """Whether least squares initialises the replacement. Otherwise it starts as it was made."""
        return True

    @property
    def replaces_branches(self) -> bool:
        """Whether a linear map also replaces an attention or an MLP that is removed alone."""
        return False

    @property
    def is_meaningful_untrained(self) -> bool:
        """Whether an untrained replacement is solved in closed form, fitted, or copied from blocks, and not random."""
        return self.is_solved or self.fit is not None or self.slots > 0

    @cached_property
    def name(self) -> str:
        """The short form of the command line: the kind, and the options that differ from their defaults."""
        options = [(f.name, getattr(self, f.name)) for f in _options(type(self)) if getattr(self, f.name) != f.default]
        written = [name if value is True else f"{name}={str(value).lower()}" for name, value in options]
        return self.kind + (":" if written else "") + ",".join(written)

    def __str__(self) -> str:
        return self.name

    def build(self, stack: BlockStack, window: range, *, probe: Batch | Tensor | None = None) -> StandIn:
        """Return a new replacement that is to be fitted; the same for the same seed.

        The global random state is left as it was.

        Parameters
        ----------
        stack : BlockStack
            Of a model that no surgeon has changed.
        window : range
        probe : mapping or torch.Tensor, optional
            A batch without padding, for models that cannot be probed otherwise.

        Raises
        ------
        StreamlineError
            If the options do not fit the model or the window.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed or 0)
            made = self.prepare(stack, window, probe)
        taken = len(blocks_of(stack, made))
        if taken != self.slots:
            raise StreamlineError(
                f"{type(self).__name__} has slots={self.slots} and made a {type(made).__name__}, which takes {taken}. "
                "A module of the blocks' own class takes one slot, any other takes none. Correct `slots`."
            )
        return made

    def size(self, stack: BlockStack, window: range) -> StandInSize:
        """Return what the replacement costs, without allocating its weights."""
        with torch.device("meta"):
            return size_of(stack, self.make(stack, window))

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and all fields as JSON values; `replacement_from_dict` reads them."""
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in [*_options(type(self)), _SEED]}


_SEED = fields(ReplacementConfig)[0]
_Config = TypeVar("_Config", bound=type[ReplacementConfig])
_KINDS: dict[str, type[ReplacementConfig]] = {}


def register_replacement(config: _Config) -> _Config:
    """Make a kind of replacement known by its name, for `compress`, config files and the command line.

    Parameters
    ----------
    config : type
        A frozen dataclass that derives from `ReplacementConfig`. A module that it makes starts as it is made if it has
        no method ``start_at(map)``, which is given the closed-form W of h + hW, and no attribute ``last_projection``,
        the path of an ``nn.Linear`` below it that is solved by least squares. For checkpoints, register the module's
        class with `register_module`.

    Returns
    -------
    type
        The same class, so that this can be used as a decorator.

    Raises
    ------
    StreamlineError
        If the class is no such dataclass, its fields have no defaults, or its kind is no name or another class's.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.repair import features_of
    >>> @register_replacement
    ... @dataclass(frozen=True)
    ... class DoctestConfig(ReplacementConfig):
    ...     kind = "doctest-plain"
    ...     bias: bool = False
    ...
    ...     def make(self, stack, window):
    ...         return nn.Linear(features_of(stack), features_of(stack), self.bias)
    >>> replacement_from_dict({"kind": "doctest-plain", "bias": True})
    DoctestConfig(seed=None, bias=True)
    """
    is_config = isinstance(config, type) and issubclass(config, ReplacementConfig) and is_dataclass(config)
    if not is_config or "__dataclass_fields__" not in vars(config):
        raise StreamlineError(
            f"{config!r} is no config of a replacement. Expected a subclass of ReplacementConfig, decorated with "
            "@dataclass(frozen=True). Define one."
        )
    kind = config.kind
    if not isinstance(kind, str) or not kind or set(kind) & set(":,= "):
        raise StreamlineError(
            f"{config.__name__}.kind={kind!r} is no name. Expected text without colon, comma, = and space. Change it."
        )
    known = _KINDS.get(kind)
    if known is not None and (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
        raise StreamlineError(
            f"kind={kind!r} is the kind of {known.__qualname__}. Expected a new name. Choose another."
        )
    without = [f.name for f in _options(config) if f.default is f.default_factory]
    if without:
        raise StreamlineError(f"{config.__name__} has fields without defaults: {', '.join(without)}. Give each one.")
    _KINDS[kind] = config
    return config


def available_kinds() -> list[str]:
    """Return the names of all kinds of replacement."""
    return list(_KINDS)


def replacement_class(kind: str) -> type[ReplacementConfig]:
    """Return the config class of a kind.

    Raises
    ------
    StreamlineError
        If the kind is unknown.
    """
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        raise StreamlineError(
            f"kind={kind!r} is unknown. Expected one of {', '.join(_KINDS)}. "
            + (f"Did you mean {near[0]!r}?" if near else "Register a kind of your own with register_replacement.")
        )
    return _KINDS[kind]


@checked()
def replacement_from_dict(values: Mapping[str, Any]) -> ReplacementConfig:
    """Build a config from what `ReplacementConfig.to_dict` returned.

    Raises
    ------
    StreamlineError
        If the kind or a key is unknown, or a value is invalid.
    """
    options = dict(values)
    config = replacement_class(options.pop("kind", ""))
    known = [f.name for f in fields(config)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise StreamlineError(
                f"{config.kind}: {key!r} is unknown. Expected one of {', '.join(known)}."
                + (f" Did you mean {near[0]!r}?" if near else " Leave it out.")
            )
    return config(**options)


@checked()
def kind_named(name: str | ReplacementConfig, seed: int = 0) -> ReplacementConfig:
    """Return the config that a short form describes, such as ``linear:rank=64``.

    Parameters
    ----------
    name : str or ReplacementConfig
        A kind, and after a colon ``option=value``, with a comma between two; an option alone is true. A config is
        returned with the seed, if it has none.
    seed : int
        Seed of the weights that are random at first.

    Raises
    ------
    StreamlineError
        If there is no such kind or option.

    Examples
    --------
    >>> kind_named("block:count=2").slots, kind_named("linear:diagonal").name
    (2, 'linear:diagonal')
    """
    if isinstance(name, ReplacementConfig):
        return replace(name, seed=seed) if name.seed is None else name
    plain, _, rest = name.strip().partition(":")
    config = replacement_class(plain)
    known = {option: types for option, types in _option_types(config).items() if types}
    options: dict[str, Any] = {"seed": seed}
    for part in filter(None, map(str.strip, rest.split(","))):
        option, given, value = part.partition("=")
        if option not in known or option in options:
            listed = ", ".join(f"{o} ({_expected(types)})" for o, types in known.items()) or "none"
            what = "is given an option twice" if option in options else "has no such option"
            raise StreamlineError(f"{name!r}: the kind {plain!r} {what}, {option!r}. Its options: {listed}.")
        options[option] = _read(name, option, known[option], value if given else "true")
    return config(**options)


def _options(config: type[ReplacementConfig]) -> list[Any]:
    """Return the fields of a config but the seed."""
    return [f for f in fields(config) if f.name != "seed"]


def _option_types(config: type[ReplacementConfig]) -> dict[str, tuple[type, ...]]:
    """Return, for each option, the types that can be written in a short form."""
    try:
        hints = get_type_hints(config)
    except NameError:  # an annotation that is imported for type checkers only
        hints = {}
    return {f.name: _plain_types(hints.get(f.name, type(f.default))) for f in _options(config)}


def _plain_types(annotation: Any) -> tuple[type, ...]:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(t for t in (bool, int, float, str) if t in members)


def _expected(types: tuple[type, ...]) -> str:
    return " or ".join(t.__name__ for t in types)


def _read(name: str, option: str, types: tuple[type, ...], text: str) -> Any:
    """Return an option's value, of the first of its types that the text can be."""
    for kind in types:
        try:
            if kind is not bool:
                return kind(text)
            return {"true": True, "false": False}[text.lower()]
        except (KeyError, ValueError):
            continue
    raise StreamlineError(f"{name!r}: {option}={text!r} is invalid. Expected {_expected(types)}. Change it.")

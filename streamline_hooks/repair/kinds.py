"""The kinds of what can stand in a window's place, by name, with their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.branches import BRANCHES
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.needed_channels import fill_concatenated
from streamline_hooks.repair.published import fit_ghosted, fit_linear_patch, fit_replace_me
from streamline_hooks.repair.repaired import Repair, fit_folded, fit_scaled
from streamline_hooks.repair.size import StandInSize, features_of, inner_width_of, size_of
from streamline_hooks.repair.stand_in import StandIn, blocks_of
from streamline_hooks.replacements import (
    FeedForwardReplacement,
    LinearReplacement,
    MLPReplacement,
    SwiGLUReplacement,
    inherit,
    inherit_silenced,
    merge,
)
from streamline_hooks.stack import BlockStack

Fitter = Callable[..., list[Repair | UnsupportedSurgery]]
Filler = Callable[..., dict[int, UnsupportedSurgery]]


@dataclass(frozen=True)
class Kind:
    """One kind of stand-in, with its options.

    Attributes
    ----------
    name : str
        As it is written, such as ``"swiglu:width=1536"``.
    make : callable
        Makes one for a stack and a window, of its size, for what is counted and timed.
    slots : int
        The blocks of its own that it takes.
    in_branches : bool
        Whether a linear map stands in the place of an attention or an MLP that is given up alone too.
    prepare : callable, optional
        Makes one that is to be started, from a stack, a window and what to run the model on; by default `make` does.
    fit : callable, optional
        Fits those of a kind that is no module: from a stack, windows, the two parts of the text, what to run the model
        on and what the bars say, to a `Repair` each or why there is none.
    fill : callable, optional
        Finishes from text what was made for windows, before least squares: see `fill_concatenated`.
    solve : bool
        Whether least squares starts it. Else it starts as it is made, be that worse than plain removal.
    seed : int
        Of the weights that are random at first.
    """

    name: str
    make: Callable[[BlockStack, range], StandIn]
    slots: int = 0
    in_branches: bool = False
    prepare: Callable[[BlockStack, range, Batch | Tensor | None], StandIn] | None = None
    fit: Fitter | None = None
    fill: Filler | None = None
    solve: bool = True
    seed: int = 0

    @property
    def tells(self) -> bool:
        """Whether what one says tells anything before it is trained: it was solved for, fitted, or once a block.

        What is as it was made, with random weights, says nothing yet.
        """
        return self.solve or self.fit is not None or self.slots > 0

    def build(self, stack: BlockStack, window: range, *, probe: Batch | Tensor | None = None) -> StandIn:
        """Make one that is to be started, the same for a seed; the caller's random numbers are left as they were.

        Parameters
        ----------
        stack : BlockStack
            Of a model that no surgeon has changed.
        window : range
        probe : mapping or torch.Tensor, optional
            What to run a model on that cannot be probed otherwise, without padding.

        Raises
        ------
        StreamlineError
            If the options do not fit the model or the window.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            made = self.make(stack, window) if self.prepare is None else self.prepare(stack, window, probe)
        if len(blocks_of(stack, made)) != self.slots:
            raise StreamlineError(
                f"The kind {self.name!r} takes {self.slots} slots by its own account, and made a "
                f"{type(made).__name__}, which takes {len(blocks_of(stack, made))}: a module of the blocks' own class "
                "takes one, any other none."
            )
        return made

    def size(self, stack: BlockStack, window: range) -> StandInSize:
        """What one costs, told without memory for its weights."""
        with torch.device("meta"):
            return size_of(stack, self.make(stack, window))


@checked()
def register_kind(name: str, factory: Callable[..., nn.Module]) -> None:
    """Name a kind of your own, for ``compress(kind=...)`` and all else that takes one.

    Parameters
    ----------
    name : str
        Without a colon or a comma.
    factory : callable
        A class or function that makes a module from the width of the residual stream, and from the options as
        keywords: ``"mine:depth=3"`` calls ``factory(features, depth=3)``. The module maps (batch, tokens, features) to
        the same shape and starts as it is made. With a method ``start_at(map)`` it is given the closed-form W of
        h + hW; with an attribute ``last_projection``, the path of an ``nn.Linear`` below it, that layer is solved for
        by least squares. For checkpoints its class is decorated with `register_replacement`.

    Raises
    ------
    StreamlineError
        If that cannot be a name, or it is the name of another kind.

    Examples
    --------
    >>> from torch import nn
    >>> register_kind("doctest-plain", lambda features, bias=False: nn.Linear(features, features, bias))
    >>> kind_named("doctest-plain:bias=true").slots
    0
    """
    if not name or set(name) & set(":,= "):
        raise StreamlineError(f"{name!r} cannot name a kind: expected a name without colon, comma, = and space.")
    known = _KINDS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
        raise StreamlineError(f"The kind {name!r} is {known.__qualname__} already; choose another name.")

    def of(**options: Any) -> Kind:
        return Kind(name, lambda stack, window: factory(features_of(stack), **options))

    signature = _signature(factory)
    of.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    of.__module__, of.__qualname__ = factory.__module__, factory.__qualname__
    _KINDS[name] = of


@checked()
def kind_named(name: str | Kind, seed: int = 0) -> Kind:
    """The kind of a name, with its options.

    Parameters
    ----------
    name : str or Kind
        A name, and after a colon ``option=value``, with a comma between two; an option alone is true. A `Kind` is
        given back as it is.
    seed : int
        Of the weights that are random at first, of one that is named.

    Raises
    ------
    StreamlineError
        If there is no such kind or option; the text lists those that are known.

    Examples
    --------
    >>> kind_named("block:count=2").slots, kind_named("linear:diagonal").name
    (2, 'linear:diagonal')
    """
    if isinstance(name, Kind):
        return name
    plain, _, rest = name.strip().partition(":")
    if plain not in _KINDS:
        raise StreamlineError(f"The kind of replacement {plain!r} is unknown. Known: {', '.join(_KINDS)}.")
    known = {o.name: o for o in _signature(_KINDS[plain]).parameters.values() if _types(o)}
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        option, given, value = part.partition("=")
        if option not in known or option in options:
            listed = ", ".join(f"{o.name} ({_expected(o)})" for o in known.values()) or "none"
            what = "is given an option twice" if option in options else "has no such option"
            raise StreamlineError(f"{name!r}: the kind {plain!r} {what}, {option!r}. Its options: {listed}.")
        options[option] = _read(name, known[option], value if given else "true")
    return replace(_KINDS[plain](**options), name=name.strip(), seed=seed)


def known_kinds() -> list[str]:
    """The names of all kinds."""
    return list(_KINDS)


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory, eval_str=True)
    except NameError:  # an annotation that is imported for type checkers only
        signature = inspect.signature(factory)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        return signature.replace(parameters=bare)


def _types(option: inspect.Parameter) -> tuple[type, ...]:
    """What an option may be, of what can be written in a name; nothing if it cannot be given there."""
    plain: tuple[type, ...] = (bool, int, float, str)
    if option.kind not in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY):
        return ()
    if option.annotation is not option.empty:
        is_union = get_origin(option.annotation) in (Union, UnionType)
        members = get_args(option.annotation) if is_union else (option.annotation,)
        return tuple(t for t in plain if t in members)
    return plain if option.default in (None, option.empty) else tuple(t for t in plain if t is type(option.default))


def _expected(option: inspect.Parameter) -> str:
    return " or ".join(t.__name__ for t in _types(option))


def _read(name: str, option: inspect.Parameter, text: str) -> Any:
    """An option's value, of the first type that it may have and that the text can be."""
    for kind in _types(option):
        try:
            if kind is not bool:
                return kind(text)
            return {"true": True, "false": False}[text.lower()]
        except (KeyError, ValueError):
            continue
    raise StreamlineError(f"{name!r}: {option.name}={text!r} is not understood; expected {_expected(option)}.")


def _none() -> Kind:
    return Kind("none", lambda stack, window: None)


@checked(rank=1)
def _linear(rank: int | None = None, diagonal: bool = False) -> Kind:
    def make(stack: BlockStack, window: range) -> StandIn:
        return LinearReplacement(features_of(stack), rank, diagonal)

    return Kind("linear", make, in_branches=rank is None and not diagonal)


def _mlp(width: int | None = None, activation: str = "gelu", bias: bool = False, linear: bool = True) -> Kind:
    return Kind("mlp", lambda stack, window: MLPReplacement(features_of(stack), width, activation, bias, linear))


def _swiglu(width: int | None = None, norm: bool = True, linear: bool = True) -> Kind:
    def make(stack: BlockStack, window: range) -> StandIn:
        inner = inner_width_of(stack, window.start) if width is None else width
        return SwiGLUReplacement(features_of(stack), inner, norm, linear)

    return Kind("swiglu", make)


def _block(count: int = 1, solve: bool = True) -> Kind:
    if count < 1:
        raise StreamlineError(f"count={count} inherited blocks cannot stand anywhere; expected 1 or more.")
    return Kind("block", lambda stack, window: inherit(stack, window, count), slots=count, solve=solve)


def _feed_forward(width: int | None = None) -> Kind:
    def make(stack: BlockStack, window: range) -> StandIn:
        spread = getattr(stack.config, "initializer_range", None)
        return FeedForwardReplacement(features_of(stack), width, 0.02 if spread is None else spread)

    return Kind("feed_forward", make, solve=False)


def _ghosted() -> Kind:
    return Kind("ghosted", lambda stack, window: LinearReplacement(features_of(stack)), fit=fit_ghosted)


def _linear_patch() -> Kind:
    return Kind("linearpatch", lambda stack, window: LinearReplacement(features_of(stack)), fit=fit_linear_patch)


def _replace_me() -> Kind:
    return Kind("replaceme", lambda stack, window: None, fit=fit_replace_me)


def _silenced() -> Kind:
    return Kind("silenced", inherit, slots=1, prepare=inherit_silenced)


@checked()
def _merged(weight: float | None = None, channels: str | None = None, solve: bool = False) -> Kind:
    if channels is None:
        sum_of = 1.0 if weight is None else weight
        return Kind("merged", lambda stack, window: merge(stack, window, sum_of), slots=1, solve=solve)
    branches = [branch for branch in BRANCHES if channels in (branch, "both")]
    if weight is not None or not branches:
        raise StreamlineError(
            f"merged by channels={channels}{'' if weight is None else f' with weight={weight:g}'}: expected "
            f"{', '.join(BRANCHES)} or both, and no weight, which is of a sum."
        )
    fill = partial(fill_concatenated, branches)
    return Kind("merged", inherit, slots=1, fill=fill, solve=solve)


def _folded() -> Kind:
    return Kind("folded", lambda stack, window: None, fit=fit_folded)


def _scale() -> Kind:
    return Kind("scale", lambda stack, window: None, fit=fit_scaled)


_KINDS: dict[str, Callable[..., Kind]] = {
    "none": _none,
    "linear": _linear,
    "mlp": _mlp,
    "swiglu": _swiglu,
    "block": _block,
    "silenced": _silenced,
    "merged": _merged,
    "folded": _folded,
    "scale": _scale,
    "feed_forward": _feed_forward,
    "ghosted": _ghosted,
    "linearpatch": _linear_patch,
    "replaceme": _replace_me,
}

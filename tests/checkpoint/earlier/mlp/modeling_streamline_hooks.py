"""Reads the model in this folder, and runs it, where streamline_hooks is not installed.

Put together from the source of streamline_hooks 0.1.0, to be loaded with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any
import torch
from torch import Tensor, nn
from collections import OrderedDict
from typing import Any, Literal, cast
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable
from torch import nn
from torch.nn import functional as F
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
import transformers
from transformers import PretrainedConfig


class StreamlineError(ValueError):
    """Something was asked for that cannot be done.

    Public functions raise it for arguments and files that they cannot use: wrong types and values, models without
    weights, batches that a model does not take, damaged files. Python raises its own TypeError for a call that does not
    match a function's signature. The text says what was given, what was expected, and what to do.
    """


class TrainingInterrupted(StreamlineError):
    """A training run was interrupted (Ctrl-C), and what it was a part of was not finished.

    The text says where what was trained so far is kept. A command ends with exit code 130.
    """


class UnsupportedSurgery(StreamlineError):
    """A block cannot be removed or replaced in this model without changing what the others compute.

    The text names the block and what depends on it.

    Attributes
    ----------
    cause : str
        A short name of the reason, for programs; see `LayerSurgeon.check`.
    """

    def __init__(self, text: str, cause: str = "") -> None:
        super().__init__(text)
        self.cause = cause


DECLARATION = "hidden_state_argument"
_KEYWORDS = ("hidden_states", "hidden_state", "x", "input", "src", "inputs")
# What first parameters are called that take the hidden state beside other tensors: torch's decoder, XLNet.
_FIRST_PARAMETERS = frozenset({*_KEYWORDS, "tgt", "output_h"})
# Names that fit any tensor. What is read from them can be verified; what is written to them changes the result.
_GENERIC_PARAMETERS = frozenset({"x", "input", "inputs"})


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], block: nn.Module | None = None) -> Tensor:
    """Read the hidden state from a block's call.

    It is the first positional argument if that is a floating-point tensor, else one of the usual keywords. A block
    that takes it elsewhere names the parameter, or its position, in an attribute ``hidden_state_argument`` of its
    class or of the block itself.

    Parameters
    ----------
    args, kwargs
        What the block was called with.
    block : torch.nn.Module, optional
        The block. With it, a call that leaves open which argument is the hidden state is refused.

    Returns
    -------
    torch.Tensor
        The state, usually of shape (batch, tokens, features).

    Raises
    ------
    StreamlineError
        If no argument holds a state, or several may.

    Examples
    --------
    >>> import torch
    >>> read_input((torch.zeros(1, 2, 3), None), {}).shape
    torch.Size([1, 2, 3])
    >>> class Conditioned(nn.Module):
    ...     hidden_state_argument = "x"
    ...
    ...     def forward(self, cond, x): ...
    >>> read_input((torch.zeros(1, 2, 3), torch.zeros(1, 5, 4)), {}, Conditioned()).shape
    torch.Size([1, 5, 4])
    """
    place = _place(args, kwargs, block)
    return args[place] if isinstance(place, int) else kwargs[place]  # type: ignore[no-any-return]


def write_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Tensor, block: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put a hidden state in the place that `read_input` reads.

    Returns
    -------
    args, kwargs
        New containers; everything else in them is the same object as before.

    Raises
    ------
    StreamlineError
        As `read_input`, and if the parameter has a generic name (``x``, ``input``, ``inputs``) while another argument
        may be the state too: a change of the wrong one would go unnoticed.
    """
    place = _place(args, kwargs, block)
    if block is not None and getattr(block, DECLARATION, None) is None:
        _require_certain(args, kwargs, block, place)
    if isinstance(place, int):
        return (*args[:place], state, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, place: state}


def possible_states(args: Sequence[Any], kwargs: Mapping[str, Any], like: Tensor) -> list[tuple[int | str, Tensor]]:
    """The arguments of a block that may be its hidden state, by position or keyword.

    Parameters
    ----------
    args, kwargs
        What the block was called with.
    like : torch.Tensor
        The argument that is read as the state. Tensors of its shape count, and those of three dimensions:
        (batch, tokens, features).
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [
        (place, value) for place, value in given if _is_state(value) and (value.ndim == 3 or value.shape == like.shape)
    ]


def read_output(output: Any) -> Tensor:
    """Read the hidden state from what a block returned: a tensor, or the first element of what came with it.

    Raises
    ------
    StreamlineError
        If the output holds no state in first place.
    """
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    elif is_dataclass(output):
        first = getattr(output, fields(output)[0].name)
    if not _is_state(first):
        raise StreamlineError(
            f"A block returned {_describe(output)}; expected a floating-point tensor with at least two dimensions, "
            "alone or in first place of a tuple, list, mapping or dataclass."
        )
    return first


def write_output(output: Any, state: Tensor) -> Any:
    """Put a hidden state in the place that `read_output` reads.

    Returns
    -------
    Any
        An output of the same type; everything beside the state is the same object as before.
    """
    read_output(output)
    if isinstance(output, Tensor):
        return state
    if isinstance(output, Mapping):
        changed: Any = copy(output)
        changed[next(iter(output))] = state
        return changed
    if isinstance(output, list):
        return [state, *output[1:]]
    if isinstance(output, tuple):
        rest = (state, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest
    return replace(output, **{fields(output)[0].name: state})


def padded(state: Tensor, tokens: int | None = None) -> Tensor:
    """A state with its padding: `nn.TransformerEncoder` makes a nested tensor, without it, of a padded batch.

    Parameters
    ----------
    state : torch.Tensor
        Returned as it is, unless it is nested.
    tokens : int, optional
        How many tokens to pad to; by default as many as the longest sequence has.

    Returns
    -------
    torch.Tensor
        Of shape (batch, tokens, features), zero at the padding.
    """
    if not state.is_nested:
        return state
    return state.to_padded_tensor(0.0, None if tokens is None else (state.size(0), tokens, state.size(-1)))


def nested_mask(state: Tensor, tokens: int | None = None) -> Tensor:
    """The real tokens of a nested state, once it is padded on the right: boolean, of shape (batch, tokens)."""
    lengths = torch.tensor([len(row) for row in state.unbind()], device=state.device)
    return torch.arange(int(lengths.max()) if tokens is None else tokens, device=state.device) < lengths[:, None]


def nested_like(state: Tensor, other: Tensor) -> Tensor:
    """A padded state without its padding, where another state, of the same sequences, is nested."""
    if not other.is_nested:
        return state
    rows = [row[: len(own)] for row, own in zip(state.unbind(), other.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=other.layout)


def tokens_first(block: nn.Module) -> bool:
    """Whether a block is one of PyTorch's own that works on (tokens, batch, features), as they do by default.

    What is given to the model around such blocks has the tokens in front as well.
    """
    own = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return own and not getattr(block.self_attn, "batch_first", True)


def require_batch_first(block: nn.Module) -> None:
    """Raise if a block is one of PyTorch's own that works on (tokens, batch, features), as they do by default.

    Raises
    ------
    StreamlineError
    """
    if tokens_first(block):
        raise StreamlineError(
            f"A {type(block).__name__} without batch_first works on (tokens, batch, features), where real tokens and "
            "padding are not told apart. Build it with batch_first=True, or record all tokens."
        )


def token_mask(state: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The real tokens of a state, as a boolean mask of shape (batch, tokens).

    Raises
    ------
    StreamlineError
        If the state is not laid out as (batch, tokens, features) or does not fit the mask.
    """
    if state.ndim != 3:
        raise StreamlineError(
            f"A hidden state has the shape {tuple(state.shape)}; expected (batch, tokens, features). "
            "Other layouts are not guessed."
        )
    if attention_mask is None:
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    if attention_mask.shape != state.shape[:2]:
        raise StreamlineError(
            f"The attention mask has the shape {tuple(attention_mask.shape)}; the hidden states have "
            f"{tuple(state.shape[:2])} (batch, tokens). Give a mask with one entry a token."
        )
    return attention_mask.to(state.device).bool()


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _place(args: Sequence[Any], kwargs: Mapping[str, Any], block: nn.Module | None) -> int | str:
    """The position or the keyword of the hidden state in a block's call."""
    declared = getattr(block, DECLARATION, None)
    if declared is not None:
        return _declared_place(args, kwargs, block, declared)
    if not (args and _is_state(args[0])):
        return _keyword(args, kwargs)
    if block is not None:
        others = _other_places(args, kwargs, 0)
        name = parameter_name(block, 0) if others else None
        if name is not None and name not in _FIRST_PARAMETERS:
            raise _several_states(block, [0, *others])
    return 0


def _require_certain(args: Sequence[Any], kwargs: Mapping[str, Any], block: nn.Module, place: int | str) -> None:
    others = _other_places(args, kwargs, place)
    if others and parameter_name(block, place) in _GENERIC_PARAMETERS:
        raise _several_states(block, [place, *others])


def _other_places(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str) -> list[int | str]:
    state = args[place] if isinstance(place, int) else kwargs[place]
    return [other for other, _ in possible_states(args, kwargs, state) if other != place]


def _several_states(block: nn.Module, places: Sequence[int | str]) -> StreamlineError:
    listed = ", ".join(repr(parameter_name(block, place)) for place in places)
    return StreamlineError(
        f"{type(block).__name__} was called with several tensors that may be its hidden state: {listed}. "
        f"{naming_remedy(block)}"
    )


def _declared_place(args: Sequence[Any], kwargs: Mapping[str, Any], block: Any, declared: Any) -> int | str:
    names = _parameters(type(block).forward)
    name = names[declared] if type(declared) is int and 0 <= declared < len(names) else declared
    place = name if name in kwargs else names.index(name) if name in names else None
    value = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(name))
    if place is None or not _is_state(value):
        raise StreamlineError(
            f"{type(block).__name__}.{DECLARATION} is {declared!r}, and the block was called with "
            f"({_call(args, kwargs)}). Expected the name or the position of a parameter of its forward that is given a "
            f"floating-point tensor with at least two dimensions, one of: {', '.join(names)}."
        )
    return place


def parameter_name(block: nn.Module, place: int | str) -> str | None:
    """The name of an argument of a block's forward; None if the forward does not name it (``*args``)."""
    if isinstance(place, str):
        return place
    names = _parameters(type(block).forward)
    return names[place] if place < len(names) else None


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters of a forward that take positional arguments, without ``self``."""
    return _read_parameters(forward) if torch.compiler.is_compiling() else _cached_parameters(forward)


def _read_parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


_cached_parameters = functools.cache(_read_parameters)


def naming_remedy(block: nn.Module, argument: int | str = "...") -> str:
    """How to name the argument of a block that is its hidden state, for an error."""
    kind = type(block).__name__
    return (
        f"Name the parameter that takes the hidden state: {kind}.{DECLARATION} = {argument!r} (on the class, or on "
        "each block)."
    )


def _keyword(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    for name in _KEYWORDS:
        if _is_state(kwargs.get(name)):
            return name
    raise StreamlineError(
        f"A block was called with ({_call(args, kwargs)}); expected its hidden state as the first positional argument "
        f"or under one of the keywords {', '.join(_KEYWORDS)}. Else name the parameter in an attribute "
        f"{DECLARATION} of the block's class."
    )


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(_describe(a) for a in args), *(f"{k}={_describe(v)}" for k, v in kwargs.items())])


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


Place = Literal["spliced_before", "spliced_after"]
BEFORE: Place = "spliced_before"
AFTER: Place = "spliced_after"


def run_before(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the block's own computation receives the spliced modules' output."""
    state = run_splices(block, BEFORE, read_input(args, kwargs, block))
    return write_input(args, kwargs, state, block)


def run_after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the spliced modules work on what the block returns."""
    return write_output(output, run_splices(block, AFTER, read_output(output)))


def spliced(block: nn.Module, place: Place) -> tuple[nn.Module, ...]:
    """The modules that are spliced before or after a block, in the order in which they run."""
    return tuple(block._modules.get(place) or ())  # type: ignore[arg-type]


def remember_splices(block: nn.Module, place: Place) -> Callable[[], None]:
    """Remember what is spliced before or after a block.

    Returns
    -------
    callable
        Puts it back as it was; hooks that others have added meanwhile stay.
    """
    children, hooks = block._modules, _hooks(block, place)
    held, hook_id, order = children.get(place), _hook_id(block, place), list(hooks)

    def put_back() -> None:
        present = _hook_id(block, place)
        if present is not None and present != hook_id:
            block._forward_pre_hooks_with_kwargs.pop(present, None)
            hooks.pop(present)  # last: by it a second try, after an interruption, knows that there is work left
        if hook_id is not None and present is None:
            hooks[hook_id] = _HOOKS[place]
            if place == BEFORE:
                block._forward_pre_hooks_with_kwargs[hook_id] = True
            for key in [*(k for k in order if k in hooks), *(k for k in list(hooks) if k not in order)]:
                hooks.move_to_end(key)
        if held is None:
            children.pop(place, None)
        else:
            children[place] = held

    return put_back


def set_splices(block: nn.Module, place: Place, modules: Sequence[nn.Module]) -> None:
    """Make these modules, and no others, the splices before or after a block.

    Their hook runs ahead of every other hook of the block, so that a recorder, whenever it was attached, sees the
    state after the splice.

    Parameters
    ----------
    block : torch.nn.Module
    place : {"spliced_before", "spliced_after"}
    modules : sequence of torch.nn.Module
        In the order in which they run; empty to take all away.
    """
    hook_id = _hook_id(block, place)
    if modules:
        held = block._modules[place] = nn.ModuleList(modules)
        held.training = block.training  # of the list alone: what is in it has a mode already
        if hook_id is None and place == BEFORE:
            block.register_forward_pre_hook(run_before, prepend=True, with_kwargs=True)
        elif hook_id is None:
            block.register_forward_hook(run_after, prepend=True)
        return
    block._modules.pop(place, None)
    if hook_id is not None:
        _hooks(block, place).pop(hook_id)
        block._forward_pre_hooks_with_kwargs.pop(hook_id, None)


_HOOKS: dict[Place, Callable[..., Any]] = {BEFORE: run_before, AFTER: run_after}


def _hooks(block: nn.Module, place: Place) -> OrderedDict[int, Any]:
    hooks: Any = block._forward_pre_hooks if place == BEFORE else block._forward_hooks
    return cast("OrderedDict[int, Any]", hooks)


def _hook_id(block: nn.Module, place: Place) -> int | None:
    return next((key for key, hook in _hooks(block, place).items() if hook is _HOOKS[place]), None)


def run_splices(block: nn.Module, place: Place, state: Tensor) -> Tensor:
    """Run what is spliced before or after a block on a state of shape (batch, tokens, features)."""
    modules = spliced(block, place)
    given, state = state, padded(state) if modules else state
    for module in modules:
        mapped = module(state)
        if mapped.shape != state.shape:
            raise StreamlineError(
                f"A spliced {type(module).__name__} returned the shape {tuple(mapped.shape)} for a state of shape "
                f"{tuple(state.shape)}; expected the same shape, (batch, tokens, features)."
            )
        state = mapped.to(given.dtype)  # under autocast a module may return less than the state had
    return nested_like(state, given)


@runtime_checkable
class Replacement(Protocol):
    """What a module needs so that a checkpoint can hold it and build it again.

    A replacement is any ``torch.nn.Module`` that maps (batch, tokens, features) to the same shape; this protocol is
    what `register_module` asks of it beyond that.
    """

    kind: ClassVar[str]

    def to_config(self) -> dict[str, Any]:
        """The keyword arguments that build this module again, as JSON values."""
        ...


_Class = TypeVar("_Class", bound=type)
REGISTERED: dict[str, type[nn.Module]] = {}


def register_module(kind: str) -> Callable[[_Class], _Class]:
    """Name a class of replacements, so that checkpoints can hold it.

    Parameters
    ----------
    kind : str
        The name that is written into checkpoints.

    Returns
    -------
    callable
        A class decorator. The class needs a method ``to_config()`` that returns the keyword arguments of its
        constructor as JSON values.

    Raises
    ------
    StreamlineError
        If the name is taken by another class, or the class lacks ``to_config``.

    Examples
    --------
    >>> import torch
    >>> @register_module("doctest-shift")
    ... class Shift(torch.nn.Module):
    ...     def __init__(self, features: int) -> None:
    ...         super().__init__()
    ...         self.bias = torch.nn.Parameter(torch.zeros(features))
    ...
    ...     def to_config(self):
    ...         return {"features": self.bias.numel()}
    ...
    ...     def forward(self, state):
    ...         return state + self.bias
    >>> build_replacement("doctest-shift", {"features": 4}).bias.shape
    torch.Size([4])
    """
    if not isinstance(kind, str) or not kind:
        raise StreamlineError(f"kind={kind!r} is no name. Expected a string. Pass the name for checkpoints.")

    def register(cls: _Class) -> _Class:
        known = REGISTERED.get(kind)
        if known is not None and f"{known.__module__}.{known.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
            raise StreamlineError(f"The kind {kind!r} is {known.__qualname__} already; choose another name.")
        if not (issubclass(cls, nn.Module) and callable(getattr(cls, "to_config", None))):
            raise StreamlineError(
                f"{cls.__name__} cannot be registered as {kind!r}: expected an nn.Module with a method to_config() "
                "that returns its constructor's keyword arguments."
            )
        cls.kind = kind  # type: ignore[attr-defined]
        REGISTERED[kind] = cls
        return cls

    return register


def is_own(kind: str) -> bool:
    """Whether a registered class of replacements comes from where this function does, and not from a user."""
    return kind in REGISTERED and REGISTERED[kind].__module__.partition(".")[0] == __name__.partition(".")[0]


def build_replacement(kind: str, config: dict[str, Any]) -> nn.Module:
    """Build a replacement from what a checkpoint says of it.

    Raises
    ------
    StreamlineError
        If the kind is unknown; the text lists the known ones.
    """
    if kind not in REGISTERED:
        raise StreamlineError(
            f"The kind of replacement {kind!r} is unknown. Known here: {', '.join(sorted(REGISTERED))}. If it is your "
            "own, import the module that registers it (register_module) before loading."
        )
    return REGISTERED[kind](**config)


def replacement_config(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The kind and the configuration of a replacement, for a checkpoint.

    Raises
    ------
    StreamlineError
        If the module's class is not registered.
    """
    kind = getattr(type(module), "kind", None)
    if kind is None or REGISTERED.get(kind) is not type(module):
        raise StreamlineError(
            f"A {type(module).__name__} cannot be written to a checkpoint: nothing says how to build it again. "
            "Decorate its class with @register_module('a-name') and give it to_config()."
        )
    return kind, cast(Replacement, module).to_config()


@register_module("linear")
class LinearReplacement(nn.Module):
    """The residual path and a linear map beside it, h ↦ h + hW.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    rank : int, optional
        Make W the product of a (d, rank) and a (rank, d) matrix.
    diagonal : bool
        Make W diagonal: each feature is scaled.

    Raises
    ------
    StreamlineError
        If the rank is not between 1 and d, or a diagonal map is given one.

    Notes
    -----
    It starts at W = 0, the plain removal of what it stands for; `start_at` starts it at a closed-form solution. Of two
    factors only the second is zero then, or neither would ever get a gradient. Full it has d² parameters, of low rank
    2·d·rank, diagonal d; it costs 2 FLOPs a token for each and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> state = torch.randn(2, 3, 8)
    >>> torch.equal(LinearReplacement(8, rank=2)(state), state)
    True
    """

    def __init__(self, features: int, rank: int | None = None, diagonal: bool = False) -> None:
        super().__init__()
        sizes = [features] if rank is None else [features, rank]
        if any(type(size) is not int or size < 1 for size in sizes) or not isinstance(diagonal, bool):
            raise StreamlineError(
                f"features={features!r}, rank={rank!r}, diagonal={diagonal!r} make no linear map. Expected whole "
                "numbers above 0, and True or False. Pass the width of the model's states as features."
            )
        if rank is not None and (diagonal or not 1 <= rank <= features):
            raise StreamlineError(
                f"A linear map of {features} features cannot have rank={rank!r}, diagonal={diagonal!r}; expected a "
                f"rank from 1 to {features}, or a diagonal map without one."
            )
        self.features, self.rank, self.diagonal = features, rank, diagonal
        self.projection: nn.Module
        if diagonal:
            self.projection = Diagonal(features)
        elif rank is None:
            self.projection = nn.Linear(features, features, bias=False)
            nn.init.zeros_(self.projection.weight)
        else:
            first, second = nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=False)
            nn.init.zeros_(second.weight)
            self.projection = nn.Sequential(first, second)

    @classmethod
    def from_map(cls, map_: Tensor, rank: int | None = None, diagonal: bool = False) -> LinearReplacement:
        """Start at a given W of shape (features, features), in h + hW; see `start_at`."""
        if not isinstance(map_, Tensor) or map_.ndim != 2 or map_.shape[0] != map_.shape[1]:
            shape = tuple(map_.shape) if isinstance(map_, Tensor) else type(map_).__name__
            raise StreamlineError(f"map_={shape} is no map. Expected a tensor of shape (features, features). Pass W.")
        module = cls(map_.shape[0], rank, diagonal)
        module.start_at(map_)
        return module

    def start_at(self, map_: Tensor) -> None:
        """Make the map W, or what is nearest to it among the maps that this one can be.

        Parameters
        ----------
        map_ : torch.Tensor
            W of shape (features, features), for h + hW. Of low rank, W itself if its rank is no higher, else its
            truncated singular value decomposition, which is not the best one in the error that W was fitted by:
            `streamline_hooks.repair.solve` gives that. Diagonal, the diagonal of W.
        """
        with torch.no_grad():
            if isinstance(self.projection, Diagonal):
                self.projection.weight.copy_(map_.diagonal())
            elif isinstance(self.projection, nn.Linear):
                self.projection.weight.copy_(map_.T)
            else:
                left, values, right = torch.linalg.svd(map_.detach().double().cpu())
                shrunk = (
                    values[: self.rank, None] * right[: self.rank]
                )  # the second: where it is zero it can still grow
                for layer, matrix in zip(self.projection.children(), (left[:, : self.rank], shrunk), strict=True):
                    layer.get_parameter("weight").copy_(matrix.T)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * sum(p.numel() for p in self.projection.parameters())

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        shape = {"diagonal": True} if self.diagonal else {} if self.rank is None else {"rank": self.rank}
        return {"features": self.features, **shape}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(state)
        return state + mapped


class Diagonal(nn.Module):
    """Each feature times its own weight, all zero at first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, state: Tensor) -> Tensor:
        """Map (..., features) to the same shape."""
        return state * self.weight


@register_module("normed_linear")
class NormedLinearReplacement(nn.Module):
    """The residual path and a linear map of the normalised state beside it, h ↦ h + RMSNorm(h)W.

    A branch of a pre-norm block reads the normalised state; what stands in its place can do so too. Engines know it as
    a block's attention that is linear (``deci`` in llama.cpp).

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    eps : float
        Of the norm.

    Notes
    -----
    It starts at W = 0, and its norm at weights of one. It has d² + d parameters, costs 2·d² FLOPs a token, and takes no
    cache slot.

    Examples
    --------
    >>> state = torch.randn(2, 3, 8)
    >>> torch.equal(NormedLinearReplacement(8)(state), state)
    True
    """

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, eps)
        self.projection = nn.Linear(features, features, bias=False)
        nn.init.zeros_(self.projection.weight)

    @classmethod
    def from_map(cls, map_: Tensor, weight: Tensor, eps: float) -> NormedLinearReplacement:
        """Start at a given W of shape (features, features), and a norm's weights of shape (features,)."""
        module = cls(len(map_), eps)
        with torch.no_grad():
            module.projection.weight.copy_(map_.T)
            module.norm.weight.copy_(weight)
        return module

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.projection.weight.numel()

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.projection.in_features, "eps": self.norm.eps}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(self.norm(state))
        return state + mapped


@register_module("feed_forward")
class FeedForwardReplacement(nn.Module):
    """h ↦ down(relu(up(h))), from width d to 4·d and back, with biases.

    LLM-Streamline, arXiv 2403.19135; its repository has it in examples/mlp_mseloss_train_without_memory_issue. Nothing
    of the state that enters is passed on as it is, so that it has to learn all of it: `MLPReplacement` has the residual
    path.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer, 4·d by default.
    initializer_range : float
        Standard deviation of the weights at the start, as in the configuration of the model; biases start at zero.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    It has 2·d·width + width + d parameters, costs 4·d·width FLOPs a token and takes no cache slot.

    Examples
    --------
    >>> sum(p.numel() for p in FeedForwardReplacement(8).parameters()) == 8 * 8**2 + 5 * 8
    True
    """

    def __init__(self, features: int, width: int | None = None, initializer_range: float = 0.02) -> None:
        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of a feed-forward network must be 1 or more.")
        self.features, self.width, self.initializer_range = features, width, initializer_range
        self.up_proj = nn.Linear(features, width)
        self.down_proj = nn.Linear(width, features)
        for layer in (self.up_proj, self.down_proj):
            nn.init.normal_(layer.weight, std=initializer_range)
            nn.init.zeros_(layer.bias)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 4 * self.features * self.width

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features, "width": self.width, "initializer_range": self.initializer_range}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.down_proj(F.relu(self.up_proj(state)))
        return mapped


@register_module("mlp")
class MLPReplacement(nn.Module):
    """h ↦ h + hW + down(act(up(h))), the feed-forward network of LLM-Streamline (arXiv 2403.19135) on a residual path.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer, 4·d by default.
    activation : str
        As Transformers' configurations name it, such as ``"gelu"``, ``"relu"`` or ``"silu"``.
    bias : bool
        Whether the two layers have a bias each.
    linear : bool
        Whether the linear map W is there, which can hold a closed-form solution.

    Raises
    ------
    StreamlineError
        If the width is not positive or the activation unknown.

    Notes
    -----
    It starts at plain removal: W and the second layer are zero. It has 2·d·width parameters, d² more with the map and
    width + d more with biases, costs 2 FLOPs a token for each but the biases, and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> module = MLPReplacement(8)
    >>> module.to_config()["width"], module.flops_per_token == 2 * (2 * 8 * 32 + 8 * 8)
    (32, True)
    """

    last_projection = "down_proj"

    def __init__(
        self,
        features: int,
        width: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        linear: bool = True,
    ) -> None:
        from transformers.activations import ACT2FN  # late: it brings in much

        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of an MLP must be 1 or more.")
        if activation not in ACT2FN:
            raise StreamlineError(f"activation={activation!r} is unknown; expected one of {', '.join(sorted(ACT2FN))}.")
        self.features, self.width, self.activation, self.bias = features, width, activation, bias
        self.up_proj = nn.Linear(features, width, bias=bias)
        self.act_fn = ACT2FN[activation]
        self.down_proj = nn.Linear(width, features, bias=bias)
        self.linear = nn.Linear(features, features, bias=False) if linear else None
        for layer in (self.down_proj, self.linear):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.zeros_(parameter)

    def start_at(self, map_: Tensor) -> None:
        """Make the linear map W, of shape (features, features), and the last layer beside it zero.

        Raises
        ------
        StreamlineError
            If there is no linear map to hold it.
        """
        start_beside(self.linear, map_, self.down_proj)

    @property
    def holds_map(self) -> bool:
        """Whether there is a linear map to hold the closed-form solution."""
        return self.linear is not None

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.features * (2 * self.width + (self.features if self.linear is not None else 0))

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "width": self.width,
            "activation": self.activation,
            "bias": self.bias,
            "linear": self.linear is not None,
        }

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = state + self.down_proj(self.act_fn(self.up_proj(state)))
        return mapped if self.linear is None else mapped + self.linear(state)


def start_beside(linear: nn.Linear | None, map_: Tensor, last: nn.Linear) -> None:
    """Start a linear map at W, and the last layer of the network beside it at zero."""
    if linear is None:
        raise StreamlineError(
            "This network was built with linear=False: no linear map beside it can hold the closed-form solution."
        )
    with torch.no_grad():
        linear.weight.copy_(map_.T)
        for parameter in last.parameters():
            parameter.zero_()


_MULTIPLE = 64


@register_module("swiglu")
class SwiGLUReplacement(nn.Module):
    """h ↦ h + hW + down(silu(gate(n)) · up(n)) with n = norm(h), the gated MLP of arXiv 2002.05202.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer; by default 8·d/3 rounded up to a multiple of 64, as in LLaMA (arXiv 2302.13971).
    norm : bool
        Whether the gated layers see the state after an RMS norm (arXiv 1910.07467). A state with massive activations
        is hundreds of times as large as others, and would rule their gradients.
    linear : bool
        Whether the linear map W is there, which can hold a closed-form solution. It works on the state itself.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    It starts at plain removal: W and the last layer are zero. It has 3·d·width parameters, d² more with the map and d
    more with the norm, costs 2 FLOPs a token for each but the norm's, and takes no cache slot.

    Examples
    --------
    >>> module = SwiGLUReplacement(576)
    >>> module.width, sum(p.numel() for p in module.parameters()) == 3 * 576 * 1536 + 576**2 + 576
    (1536, True)
    """

    last_projection = "down_proj"

    def __init__(self, features: int, width: int | None = None, norm: bool = True, linear: bool = True) -> None:
        super().__init__()
        width = -(-8 * features // (3 * _MULTIPLE)) * _MULTIPLE if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of a SwiGLU must be 1 or more.")
        self.features, self.width = features, width
        self.norm = nn.RMSNorm(features, eps=1e-6) if norm else None
        self.gate_proj = nn.Linear(features, width, bias=False)
        self.up_proj = nn.Linear(features, width, bias=False)
        self.down_proj = nn.Linear(width, features, bias=False)
        nn.init.zeros_(self.down_proj.weight)
        self.linear = nn.Linear(features, features, bias=False) if linear else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)

    def start_at(self, map_: Tensor) -> None:
        """Make the linear map W, of shape (features, features), and the last layer beside it zero.

        Raises
        ------
        StreamlineError
            If there is no linear map to hold it.
        """
        start_beside(self.linear, map_, self.down_proj)

    @property
    def holds_map(self) -> bool:
        """Whether there is a linear map to hold the closed-form solution."""
        return self.linear is not None

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.features * (3 * self.width + (self.features if self.linear is not None else 0))

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "width": self.width,
            "norm": self.norm is not None,
            "linear": self.linear is not None,
        }

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        seen = state if self.norm is None else self.norm(state)
        mapped: Tensor = state + self.down_proj(F.silu(self.gate_proj(seen)) * self.up_proj(seen))
        return mapped if self.linear is None else mapped + self.linear(state)


MODEL_TYPE = "streamline_hooks"
CODE = "modeling_streamline_hooks"
FORMAT = 3  # 2 has no digest and no guard in quantization_config; 1 has splices in one stack only
_PREFIX = "Streamlined"
_WITH_DIGEST = 3
_MARK = "has_guard_axis"
_QUANTIZATION, _REQUIRES = "quantization_config", "requires"
_guarded: ContextVar[bool] = ContextVar("guarded", default=False)


class StreamlinedConfig(PretrainedConfig):
    """The entry under which Transformers finds configurations of models with splices."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of the architecture that the dictionary names.

        Raises
        ------
        StreamlineError
            If the dictionary was not written by this library, or by a later version of it.
        """
        from transformers import CONFIG_MAPPING

        base_type: Any = config_dict.get("base_model_type")
        _check_description(config_dict.get("streamline_hooks"), base_type)
        if base_type not in CONFIG_MAPPING:
            raise StreamlineError(
                f"This checkpoint is a compressed {base_type!r}, which the installed Transformers "
                f"{transformers.__version__} does not know. Upgrade Transformers, or, if the architecture is your own, "
                "register it with AutoConfig and AutoModelForCausalLM first."
            )
        config_base = CONFIG_MAPPING[base_type]
        config_class = streamlined_config_class(config_base)
        _register_models(config_base, config_class)
        return config_class.from_dict(config_dict, **kwargs)


class _ConfigWithSplices:
    """What a configuration of a model with splices does differently: it is written under another type."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from the content of ``config.json``.

        Raises
        ------
        StreamlineError
            If the content does not describe the splices as this library writes them.
        """
        said = config_dict.get("streamline_hooks")
        _check_description(said, config_dict.get("base_model_type", cls.model_type))
        settings = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        settings["streamline_hooks"] = {**said, "format": FORMAT}  # type: ignore[dict-item]
        if said["format"] >= _WITH_DIGEST:  # type: ignore[index]
            guarded = settings.pop(_QUANTIZATION, None)
            if not isinstance(guarded, dict) or guarded.get(_REQUIRES) != MODEL_TYPE:
                raise _changed(f"{_QUANTIZATION} beside it is {guarded!r}, without {_REQUIRES}={MODEL_TYPE!r}")
            settings |= {key: value for key, value in guarded.items() if key == _QUANTIZATION}
        return super().from_dict(settings, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write ``config.json`` with what makes the plain classes refuse it, and with a digest of the splices."""
        content = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        said = {**self.streamline_hooks, "format": FORMAT}  # type: ignore[attr-defined]
        content["streamline_hooks"] = {**said, "digest": _digest(said, type(self).model_type)}
        original = {_QUANTIZATION: content[_QUANTIZATION]} if content.get(_QUANTIZATION) else {}
        content[_QUANTIZATION] = {_REQUIRES: MODEL_TYPE, **original}
        Path(json_file_path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**written, "model_type": MODEL_TYPE, "base_model_type": type(self).model_type}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the configuration, unless a part of the model, which does not know of the guard, is being saved."""
        architectures = getattr(self, "architectures", None) or []
        if not any(str(name).startswith(_PREFIX) for name in architectures):
            raise StreamlineError(
                f"{', '.join(architectures) or 'This part'} shares the configuration of a model with spliced modules "
                "and would be saved without them. Save the model that was committed; to commit another one, open the "
                "LayerSurgeon on it."
            )
        if _can_stand_alone(self):
            classes = _classes_for(base_class(type(self)))
            self.auto_map = {"AutoConfig": f"{CODE}.StreamlinedConfig"} | {
                auto.__name__: f"{CODE}.{_PREFIX}{base.__name__}" for auto, base in classes
            }
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{CODE}.py").write_text(_standalone_code(), encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class _ModelWithSplices:
    """What a model with splices does differently: it builds them, and guards its checkpoint."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = config.streamline_hooks
        changed = said.get("digest") not in (None, _digest(said, type(config).model_type))
        for entry in said["splices"]:
            block = _block_of(self, entry.get("stack", said["stack"]), entry)
            try:
                modules = build_splices(entry)
            except (TypeError, RuntimeError) as error:
                if changed:
                    raise _changed(f"a replacement cannot be built from {entry['modules']} ({error})") from error
                raise
            set_splices(block, entry["place"], modules)
        if changed:
            raise _changed("the digest of its splices is not the stored one")
        self.register_load_state_dict_pre_hook(accept_guarded)  # type: ignore[attr-defined]
        if _guarded.get():
            _set_guard_axis(self, present=True)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        with _reading_a_guarded_checkpoint():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        lost = [key for key in info["missing_keys"] if {BEFORE, AFTER} & set(key.split("."))]
        _check_loading(model, info)
        if lost:
            raise StreamlineError(
                f"The checkpoint lacks the weights of spliced modules that its configuration lists, under the names "
                f"that {base_class(cls).__name__} has for them: {', '.join(lost)}. It is damaged, or was saved from a "
                "class that names its blocks otherwise. Save it again, or load it as the class that was saved."
            )
        model.config.streamline_hooks.pop("digest", None)  # it is of the file, and the modules may be changed
        _set_guard_axis(model, present=False)
        _fill_unsaved_buffers(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        said = self.config.streamline_hooks
        guard = own_path(self, said["guard"])
        said["splices"] = [_entry_now(self, entry) for entry in said["splices"]]
        unwritable = [m for m in said["splices"] if "modules" not in m]
        if unwritable:
            raise StreamlineError(unwritable[0]["error"])
        _tell_of_wider_ones(self)
        # A quantizer reads the weights from the model in any case, and so does what brings offloaded ones.
        offloaded = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]
        if getattr(self, "hf_quantizer", None) is not None or (offloaded and state_dict is None):
            with _guard_axis(self):
                return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        weights = dict(self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        if guard in weights and weights[guard].ndim == self.get_parameter(guard).ndim:  # type: ignore[attr-defined]
            weights[guard] = weights[guard].unsqueeze(0)
        return super().save_pretrained(save_directory, *args, state_dict=weights, **kwargs)  # type: ignore[misc]


_FIELDS: dict[str, type] = {"format": int, "stack": str, "guard": str, "splices": list}
_FIELDS_OF_ENTRY: dict[str, type] = {"block": int, "place": str, "modules": list}
_FIELDS_OF_MODULE: dict[str, type] = {"kind": str, "config": dict}


def _check_description(said: Any, base_type: Any) -> None:
    """Raise unless a configuration describes at least one splice, in a format that this version reads."""
    if not isinstance(said, dict) or base_type is None:
        raise StreamlineError(
            "This configuration has the model type 'streamline_hooks' but neither a plan nor a base_model_type; "
            "it was not written by streamline_hooks. Load a folder that streamline_hooks saved."
        )
    _check_fields(said, _FIELDS, "the entry")
    if said["format"] > FORMAT:
        raise StreamlineError(
            f"This checkpoint has the format {said['format']}; this version of streamline_hooks reads up to "
            f"{FORMAT}. Upgrade streamline_hooks."
        )
    if said["format"] >= _WITH_DIGEST:
        _check_fields(said, {"digest": str}, "the entry")
    elif said["format"] < 1 or "digest" in said:
        raise _changed(f"'format' is {said['format']}")
    if not said["splices"]:
        raise _changed("'splices' is empty")
    for number, entry in enumerate(said["splices"]):
        where = f"splices[{number}]"
        _check_fields(entry, _FIELDS_OF_ENTRY, where)
        if not entry["modules"]:
            raise _changed(f"'modules' of {where} is empty")
        for position, module in enumerate(entry["modules"]):
            _check_fields(module, _FIELDS_OF_MODULE, f"{where}.modules[{position}]")


def _check_fields(held: Any, fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        value = held.get(name) if isinstance(held, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _changed(f"{name!r} of {where} is {value!r}, not of the type {kind.__name__}")


def _changed(what: str) -> StreamlineError:
    return StreamlineError(
        f"config.json, streamline_hooks: {what}. The file was changed since it was written, and the model would lose "
        "its repair or be another one. Restore the file, or save the model again."
    )


def _digest(said: dict[str, Any], base_type: str) -> str:
    """The digest of everything from which the splices are built."""
    described = {name: said[name] for name in ("stack", "guard", "splices")}
    text = json.dumps([base_type, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_loading(model: Any, info: dict[str, Any]) -> None:
    """Raise if the configuration has no module for a stored splice, or a splice or the guard was not loaded."""
    guard = own_path(model, model.config.streamline_hooks["guard"])
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ()]
    wrong = [
        *(key for key in info.get("unexpected_keys") or () if {BEFORE, AFTER} & set(key.split("."))),
        *(key for key in mismatched if key == guard or {BEFORE, AFTER} & set(key.split("."))),
    ]
    if wrong:
        raise _changed(f"the stored weight {min(wrong)} does not fit the model that it describes")


_made: dict[Any, Any] = {}


def streamlined_config_class(base: Any) -> Any:
    """The configuration class for a model with splices of an architecture; made once a base."""
    if base not in _made:
        members = {"__module__": __name__, "__doc__": _ConfigWithSplices.__doc__, "model_type": base.model_type}
        _made[base] = type(f"{_PREFIX}{base.__name__}", (_ConfigWithSplices, base), members)
    return _made[base]


def streamlined_model_class(base: Any, config_base: Any) -> Any:
    """The class of a model with splices of an architecture; made once a base, and known to the Auto classes."""
    key = (base, config_base)  # several types of configuration can share one class of models
    if key in _made:
        return _made[key]

    def is_custom_code(cls: Any) -> bool:
        return bool(base.is_custom_code())

    members = {
        "__module__": __name__,
        "__doc__": _ModelWithSplices.__doc__,
        "config_class": streamlined_config_class(config_base),
        "is_custom_code": classmethod(is_custom_code),  # checkpoints convert as the architecture's own do
    }
    _made[key] = type(f"{_PREFIX}{base.__name__}", (_ModelWithSplices, base), members)
    _share_weight_conversion(base, _made[key])
    return _made[key]


def base_class(cls: type[Any]) -> type[Any]:
    """The architecture's own class of a model or a configuration, with or without splices."""
    if issubclass(cls, (_ModelWithSplices, _ConfigWithSplices)):
        return next(c for c in cls.__mro__[1:] if not issubclass(c, (_ModelWithSplices, _ConfigWithSplices)))
    return cls


def _register_models(config_base: type[Any], config_class: type[Any]) -> None:
    """Register the classes with splices with every Auto class that knows the architecture."""
    for auto, base in _classes_for(config_base):
        auto.register(config_class, streamlined_model_class(base, config_base), exist_ok=True)


def _classes_for(config_base: type[Any]) -> Iterator[tuple[Any, type[Any]]]:
    """Yield the Auto classes that know an architecture, each with the class that it gives for the plain model."""
    from transformers.models.auto import modeling_auto  # every table of classes: a quarter of a second

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or config_base not in mapping:
            continue
        base = mapping[config_base]
        if isinstance(base, type):
            yield auto, base


def _can_stand_alone(config: Any) -> bool:
    """Whether the model needs only Transformers' own classes and this library's."""
    kinds = [m["kind"] for entry in config.streamline_hooks["splices"] for m in entry.get("modules", [])]
    return base_class(type(config)).__module__.startswith("transformers.") and all(map(is_own, kinds))


def _standalone_code() -> str:
    """What reads a model where the library is not installed."""
    try:
        from streamline_hooks.surgery.standalone import standalone_code
    except ModuleNotFoundError:  # this is that code
        return Path(__file__).read_text(encoding="utf-8")
    return standalone_code()


def _share_weight_conversion(base: type[Any], made: type[Any]) -> None:
    """A conversion of checkpoints that Transformers keeps by class name holds for the class with splices too."""
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return
    from transformers import conversion_mapping

    conversion = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(made.__name__, conversion, overwrite=True)


def accept_guarded(module: Any, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Let ``load_state_dict`` take a checkpoint as it lies on disk, as a ``Trainer`` does when it resumes."""
    guard = own_path(module, module.config.streamline_hooks["guard"])
    stored = state_dict.get(prefix + guard)
    if stored is not None and stored.ndim == module.get_parameter(guard).ndim + 1:
        state_dict[prefix + guard] = stored.squeeze(0)


def _set_guard_axis(model: Any, present: bool) -> None:
    """Give the guard the leading axis with which it is stored, or take it away."""
    path, _, name = own_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters[name]
    if present and getattr(held, _MARK, False):
        return  # of a model in a model, such as that of a classifier, each is built as this class says
    data = held.data.unsqueeze(0) if present else held.data.squeeze(0)
    reshaped = nn.Parameter(data, requires_grad=held.requires_grad)
    vars(reshaped).update({**vars(held), _MARK: present})
    owner._parameters[name] = reshaped
    if held.is_meta:
        _reshape_offloaded(owner, name, reshaped.ndim)


def _reshape_offloaded(owner: Any, name: str, axes: int) -> None:
    """The same where accelerate has the values, and brings them as they lie: this one is kept in memory."""
    offloaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
    if offloaded is None:
        return  # nobody has the values: the model was made without
    kept = getattr(getattr(offloaded, "dataset", None), "state_dict", None)
    if kept is None:
        raise StreamlineError(
            f"{name} of a {type(owner).__name__} is offloaded in a way that is not known here. Keep that module in "
            "memory: give it a device in the device_map."
        )
    stored = offloaded[name]
    kept[f"{offloaded.prefix}{name}"] = stored.reshape(
        (1,) * (axes - stored.ndim) + stored.shape[max(0, stored.ndim - axes) :]
    )


@contextmanager
def _guard_axis(model: Any) -> Iterator[None]:
    """Give the guard its leading axis for a while. The same parameter comes back: an optimizer may hold it."""
    path, _, name = own_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters[name]
    try:
        _set_guard_axis(model, present=True)
        yield
    finally:
        owner._parameters[name] = held
        if held.is_meta:
            _reshape_offloaded(owner, name, held.ndim)


def splice_entries(blocks: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint says of the modules that are spliced beside blocks, in the order of the blocks."""
    return [
        _entry(number, place, spliced(block, place))
        for number, block in enumerate(blocks)
        for place in (BEFORE, AFTER)
        if spliced(block, place)
    ]


def _entry(number: int, place: str, modules: tuple[nn.Module, ...]) -> dict[str, Any]:
    try:
        kinds = [dict(zip(("kind", "config"), replacement_config(module), strict=True)) for module in modules]
    except StreamlineError as error:  # in memory it works all the same; saving says what is missing
        return {"block": number, "place": place, "error": str(error)}
    return {"block": number, "place": place, "modules": kinds}


def build_splices(entry: dict[str, Any]) -> list[nn.Module]:
    """Build the modules at one place that an entry of a checkpoint describes, in the order in which they run."""
    return [build_replacement(module["kind"], module["config"]) for module in entry["modules"]]


def _entry_now(model: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as the modules are by now, which may have been changed since the surgery."""
    block = _block_of(model, entry.get("stack", model.config.streamline_hooks["stack"]), entry)
    where = {"stack": entry["stack"]} if "stack" in entry else {}
    return {**where, **_entry(entry["block"], entry["place"], spliced(block, entry["place"]))}


def _tell_of_wider_ones(model: Any) -> None:
    """Warn where loading, which gives all weights one precision, would round what is spliced in."""
    spliced_in = (p for name, p in model.named_parameters() if {BEFORE, AFTER} & set(name.split(".")))
    wider = {p.dtype for p in spliced_in if p.is_floating_point() and p.dtype.itemsize > model.dtype.itemsize}
    if wider:
        warnings.warn(
            f"What is spliced in holds {', '.join(map(str, wider))} beside the model's {model.dtype}, as which all "
            f"comes back. Load it with dtype={next(iter(wider))} to have its values.",
            stacklevel=3,
        )


def _fill_unsaved_buffers(model: Any) -> None:
    """Give spliced modules the buffers that no checkpoint holds: they are built without values."""
    said = model.config.streamline_hooks
    for entry in said["splices"]:
        block = _block_of(model, entry.get("stack", said["stack"]), entry)
        placed = spliced(block, entry["place"])
        if not any(part._non_persistent_buffers_set for module in placed for part in module.modules()):
            continue
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            built = build_splices(entry)
        for module, other in zip(placed, built, strict=True):
            for part, whole in zip(module.modules(), other.modules(), strict=True):
                for name in part._non_persistent_buffers_set:
                    held, value = part._buffers[name], whole._buffers[name]
                    if held is not None and value is not None:
                        part._buffers[name] = value.to(held.device, held.dtype)


def _block_of(model: Any, stack: str, entry: dict[str, Any]) -> nn.Module:
    """The block that has the splices of an entry of the configuration.

    Raises
    ------
    StreamlineError
        If there is no such block or place: the configuration was changed since it was written.
    """
    try:
        blocks = list(model.get_submodule(own_path(model, stack)).children())
    except AttributeError:
        blocks = []
    if entry["place"] not in (BEFORE, AFTER) or not 0 <= entry["block"] < len(blocks):
        raise StreamlineError(
            f"config.json, streamline_hooks.splices: a module {entry['place']} block {entry['block']} of {stack!r}, "
            f"which has {len(blocks)} blocks in this {type(model).__name__}. Either this class lacks that stack, or "
            "the file was changed since it was written. Load the class that was saved, or save the model again."
        )
    return blocks[entry["block"]]


def own_path(model: Any, path: str) -> str:
    """A path that was written for the model with its head, or without it, in this model, which may be the other."""
    first, _, rest = path.partition(".")
    inside = getattr(model, "base_model_prefix", "")
    if hasattr(model, first):
        return path
    return f"{inside}.{path}" if hasattr(getattr(model, inside, None), first) else rest


@contextmanager
def _reading_a_guarded_checkpoint() -> Iterator[None]:
    token = _guarded.set(True)
    try:
        yield
    finally:
        _guarded.reset(token)


def __getattr__(name: str) -> Any:
    """Find a made class by its name again, which is what unpickling asks for."""
    base: Any = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return streamlined_config_class(base)
    config_base: Any = getattr(base, "config_class", None)
    if config_base is not None:
        return streamlined_model_class(base, config_base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

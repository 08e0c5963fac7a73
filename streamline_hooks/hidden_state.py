"""How a hidden state enters and leaves a block.

A block is read at run time and never by its annotations: several of Transformers' blocks declare a tuple and
return a tensor. Whatever travels beside the state stays exactly where it was.
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

from streamline_hooks.errors import StreamlineError

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
    """List the arguments of a block that may be its hidden state, by position or keyword.

    Tensors of the shape of `like`, which was read as the state, count, and those of three dimensions.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [
        (place, value) for place, value in given if _is_state(value) and (value.ndim == 3 or value.shape == like.shape)
    ]


def read_output(output: Any) -> Tensor:
    """Read the hidden state from a block's output: a tensor, or the first element of a container."""
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
    """Return the output with another hidden state; everything else in it is the same object as before."""
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
    """Pad a nested state with zeros to (batch, tokens, features).

    `nn.TransformerEncoder` builds one from a padded batch. A plain state is returned as it is. By default the longest
    sequence sets the number of tokens.
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
    """Whether a block is one of PyTorch's own with the layout (tokens, batch, features), its default."""
    own = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return own and not getattr(block.self_attn, "batch_first", True)


def require_batch_first(block: nn.Module) -> None:
    """Raise if a block is one of PyTorch's own with the layout (tokens, batch, features), its default."""
    if tokens_first(block):
        raise StreamlineError(
            f"A {type(block).__name__} without batch_first works on (tokens, batch, features), where real tokens and "
            "padding are not told apart. Build it with batch_first=True, or record all tokens."
        )


def token_mask(state: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the real tokens of a (batch, tokens, features) state as a boolean mask of shape (batch, tokens)."""
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

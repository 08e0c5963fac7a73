"""Read and write the hidden state in the arguments and the output of a block.

The position of the state is determined at run time, not from annotations: several blocks of Transformers declare a
tuple and return a tensor. All other arguments and outputs remain unchanged.
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

from streamline_hooks.core import StreamlineError, UnsupportedSurgery

DECLARATION = "hidden_state_argument"
_KEYWORDS = ("hidden_states", "hidden_state", "x", "input", "src", "inputs")
# First parameters that take the hidden state although other arguments are tensors too (torch's decoder, XLNet).
_FIRST_PARAMETERS = frozenset({*_KEYWORDS, "tgt", "output_h"})
# Names that fit any tensor. A state read from them can be verified; a state written to the wrong one is not noticed.
_GENERIC_PARAMETERS = frozenset({"x", "input", "inputs"})


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], block: nn.Module | None = None) -> Tensor:
    """Return the hidden state in the arguments of a block.

    The state is the first positional argument if that is a floating-point tensor, else one of the usual keywords such
    as ``hidden_states``. A block that takes the state elsewhere names the parameter, or its position, in an attribute
    ``hidden_state_argument`` of its class or instance.

    Parameters
    ----------
    args, kwargs : tuple and mapping
        The arguments of the block's forward.
    block : torch.nn.Module, optional
        The block. Needed for its ``hidden_state_argument``, and to detect ambiguous calls.

    Returns
    -------
    torch.Tensor
        The state itself, not a copy; usually (batch, tokens, features).

    Raises
    ------
    StreamlineError
        If no argument, or with `block` more than one argument, may be the state.

    Examples
    --------
    >>> class Conditioned(nn.Module):
    ...     hidden_state_argument = "x"
    ...
    ...     def forward(self, cond, x): ...
    >>> read_input((torch.zeros(1, 2, 3), torch.zeros(1, 5, 4)), {}, Conditioned()).shape
    torch.Size([1, 5, 4])
    """
    key = _state_argument(args, kwargs, block)
    return args[key] if isinstance(key, int) else kwargs[key]  # type: ignore[no-any-return]


def write_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Tensor, block: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with another hidden state.

    Parameters
    ----------
    args, kwargs : tuple and mapping
        The arguments of the block's forward.
    state : torch.Tensor
        The new hidden state.
    block : torch.nn.Module, optional
        See `read_input`.

    Returns
    -------
    tuple and dict
        New arguments. Every argument except the state is the same object as before.

    Raises
    ------
    StreamlineError
        As `read_input`. Also if the parameter has a generic name (``x``, ``input``, ``inputs``) and another argument
        may be the state, because a change of the wrong argument would not be noticed.

    Examples
    --------
    >>> args, kwargs = write_input((torch.zeros(1, 2, 4), None), {"use_cache": False}, torch.ones(1, 2, 4))
    >>> args[0].sum().item(), args[1], kwargs
    (8.0, None, {'use_cache': False})
    """
    key = _state_argument(args, kwargs, block)
    if block is not None and getattr(block, DECLARATION, None) is None:
        others = _other_candidates(args, kwargs, key)
        if others and parameter_name(block, key) in _GENERIC_PARAMETERS:
            raise _ambiguous_state_error(block, [key, *others])
    if isinstance(key, int):
        return (*args[:key], state, *args[key + 1 :]), dict(kwargs)
    return args, {**kwargs, key: state}


def candidate_states(args: Sequence[Any], kwargs: Mapping[str, Any], like: Tensor) -> list[tuple[int | str, Tensor]]:
    """Return the arguments of a block that may be its hidden state, with their positions or keywords.

    Candidates are floating-point tensors with three dimensions or with the shape of `like`, the state read before.
    """
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [
        (key, value) for key, value in arguments if _is_state(value) and (value.ndim == 3 or value.shape == like.shape)
    ]


def read_output(output: Any) -> Tensor:
    """Return the hidden state in the output of a block: the output itself, or the first element of a container."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    elif is_dataclass(output):
        first = getattr(output, fields(output)[0].name)
    if not _is_state(first):
        raise StreamlineError(
            f"A block returned {_describe(output)}. Expected a floating-point tensor with at least two dimensions, or "
            "a tuple, list, mapping or dataclass whose first element is one. Change what the block returns."
        )
    state: Tensor = first
    return state


def write_output(output: Any, state: Tensor) -> Any:
    """Return the output of a block with another hidden state.

    Parameters
    ----------
    output : Any
        The output of the block, see `read_output`.
    state : torch.Tensor
        The new hidden state.

    Returns
    -------
    Any
        An output of the same type. Every element except the state is the same object as before.

    Examples
    --------
    >>> write_output((torch.zeros(1, 1, 2), "cache"), torch.ones(1, 1, 2))
    (tensor([[[1., 1.]]]), 'cache')
    """
    read_output(output)
    if isinstance(output, Tensor):
        return state
    if isinstance(output, Mapping):
        mapping: Any = copy(output)
        mapping[next(iter(output))] = state
        return mapping
    if isinstance(output, list):
        return [state, *output[1:]]
    if isinstance(output, tuple):
        elements = (state, *output[1:])
        return type(output)(*elements) if hasattr(output, "_fields") else elements
    return replace(output, **{fields(output)[0].name: state})


def padded(state: Tensor, tokens: int | None = None) -> Tensor:
    """Pad a nested state on the right to (batch, tokens, features); return any other state unchanged.

    ``nn.TransformerEncoder`` builds nested states from padded batches. `tokens` defaults to the longest sequence.
    """
    if not state.is_nested:
        return state
    return state.to_padded_tensor(0.0, None if tokens is None else (state.size(0), tokens, state.size(-1)))


def nested_mask(state: Tensor, tokens: int | None = None) -> Tensor:
    """Return the mask of real tokens of a nested state after `padded`: boolean, of shape (batch, tokens)."""
    lengths = torch.tensor([len(row) for row in state.unbind()], device=state.device)
    return torch.arange(int(lengths.max()) if tokens is None else tokens, device=state.device) < lengths[:, None]


def nested_like(state: Tensor, other: Tensor) -> Tensor:
    """Return a padded state as a nested tensor if `other`, a state of the same sequences, is nested."""
    if not other.is_nested:
        return state
    rows = [row[: len(other_row)] for row, other_row in zip(state.unbind(), other.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=other.layout)


def tokens_first(block: nn.Module) -> bool:
    """Whether a block is a PyTorch encoder or decoder layer with the layout (tokens, batch, features)."""
    is_torch_layer = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return is_torch_layer and not getattr(block.self_attn, "batch_first", True)


def require_batch_first(block: nn.Module) -> None:
    """Raise if a block is a PyTorch encoder or decoder layer with the layout (tokens, batch, features)."""
    if tokens_first(block):
        raise StreamlineError(
            f"A {type(block).__name__} with batch_first=False has states of layout (tokens, batch, features), where "
            "padding is not excluded. Expected (batch, tokens, features). Build it with batch_first=True, or record "
            "all tokens."
        )


def require_whole_state(block: nn.Module) -> None:
    """Raise if a block passes the residual stream in two parts, whose sum is the hidden state."""
    if "residual" in inspect.signature(block.forward).parameters:
        raise UnsupportedSurgery(
            f"A {type(block).__name__} ({type(block).__module__}) takes and returns the hidden state in two parts, one "
            "of them named residual. Expected blocks that return the hidden state. In vLLM, load the model with "
            "LLM(..., model_impl='transformers', enforce_eager=True)."
        )


def token_mask(state: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the boolean mask of real tokens, (batch, tokens), of a state (batch, tokens, features)."""
    if state.ndim != 3:
        raise StreamlineError(
            f"A hidden state has the shape {tuple(state.shape)}. Expected (batch, tokens, features). Other layouts are "
            "not inferred from a shape."
        )
    if attention_mask is None:
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    if attention_mask.shape != state.shape[:2]:
        raise StreamlineError(
            f"The attention mask has the shape {tuple(attention_mask.shape)}. Expected that of the hidden states, "
            f"{tuple(state.shape[:2])} (batch, tokens). Pass a mask with one entry per token."
        )
    return attention_mask.to(state.device).bool()


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _state_argument(args: Sequence[Any], kwargs: Mapping[str, Any], block: nn.Module | None) -> int | str:
    """Return the position or the keyword of the hidden state in a block's call."""
    declared = getattr(block, DECLARATION, None)
    if declared is not None:
        return _declared_argument(args, kwargs, block, declared)
    if not (args and _is_state(args[0])):
        for keyword in _KEYWORDS:
            if _is_state(kwargs.get(keyword)):
                return keyword
        raise StreamlineError(
            f"A block was called with ({_call(args, kwargs)}). Expected the hidden state as the first positional "
            f"argument or as one of the keywords {', '.join(_KEYWORDS)}. For another parameter set the attribute "
            f"{DECLARATION} of the block's class to its name."
        )
    if block is not None:
        others = _other_candidates(args, kwargs, 0)
        name = parameter_name(block, 0) if others else None
        if name is not None and name not in _FIRST_PARAMETERS:
            raise _ambiguous_state_error(block, [0, *others])
    return 0


def _other_candidates(args: Sequence[Any], kwargs: Mapping[str, Any], key: int | str) -> list[int | str]:
    state = args[key] if isinstance(key, int) else kwargs[key]
    return [candidate for candidate, _ in candidate_states(args, kwargs, state) if candidate != key]


def _ambiguous_state_error(block: nn.Module, keys: Sequence[int | str]) -> StreamlineError:
    listed = ", ".join(repr(parameter_name(block, key)) for key in keys)
    return StreamlineError(
        f"{type(block).__name__} was called with several tensors that may be the hidden state: {listed}. "
        f"{declaration_advice(block)}"
    )


def _declared_argument(args: Sequence[Any], kwargs: Mapping[str, Any], block: Any, declared: Any) -> int | str:
    names = _parameters(type(block).forward)
    name = names[declared] if type(declared) is int and 0 <= declared < len(names) else declared
    key = name if name in kwargs else names.index(name) if name in names else None
    value = args[key] if isinstance(key, int) and key < len(args) else kwargs.get(str(name))
    if key is None or not _is_state(value):
        raise StreamlineError(
            f"{type(block).__name__}.{DECLARATION} is {declared!r}, but the block was called with "
            f"({_call(args, kwargs)}). Expected the name or position of a parameter that receives a floating-point "
            f"tensor with at least two dimensions. Set it to one of: {', '.join(names)}."
        )
    return key


def parameter_name(block: nn.Module, key: int | str) -> str | None:
    """Return the name of an argument of a block's forward; None for an argument passed to ``*args``."""
    if isinstance(key, str):
        return key
    names = _parameters(type(block).forward)
    return names[key] if key < len(names) else None


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional parameters of a forward, without ``self``."""
    return _read_parameters(forward) if torch.compiler.is_compiling() else _cached_parameters(forward)


def _read_parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


_cached_parameters = functools.cache(_read_parameters)


def declaration_advice(block: nn.Module, argument: int | str = "...") -> str:
    """Return the sentence of an error that explains how to declare the hidden state argument of a block."""
    kind = type(block).__name__
    return (
        f"Declare the parameter that takes the hidden state: {kind}.{DECLARATION} = {argument!r} (on the class, or "
        "on each block)."
    )


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(_describe(a) for a in args), *(f"{k}={_describe(v)}" for k, v in kwargs.items())])


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__

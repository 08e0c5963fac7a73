"""How a hidden state enters and leaves a block.

A block is read at run time and never by its annotations: several of Transformers' blocks declare a tuple and
return a tensor. Whatever travels beside the state stays exactly where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError

_KEYWORDS = ("hidden_states", "hidden_state", "x", "input", "src", "inputs")


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Read the hidden state from a block's call.

    Parameters
    ----------
    args, kwargs
        What the block was called with.

    Returns
    -------
    torch.Tensor
        The state, usually of shape (batch, tokens, features).

    Raises
    ------
    StreamlineError
        If no argument holds a state.

    Examples
    --------
    >>> import torch
    >>> read_input((torch.zeros(1, 2, 3), None), {}).shape
    torch.Size([1, 2, 3])
    """
    if args and _is_state(args[0]):
        return args[0]
    return kwargs[_keyword(args, kwargs)]


def write_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put a hidden state in the place that `read_input` reads.

    Returns
    -------
    args, kwargs
        New containers; everything else in them is the same object as before.
    """
    if args and _is_state(args[0]):
        return (state, *args[1:]), dict(kwargs)
    return args, {**kwargs, _keyword(args, kwargs): state}


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


def _keyword(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    for name in _KEYWORDS:
        if _is_state(kwargs.get(name)):
            return name
    given = ", ".join([*(_describe(a) for a in args), *(f"{k}={_describe(v)}" for k, v in kwargs.items())])
    raise StreamlineError(
        f"A block was called with ({given}); expected its hidden state as the first positional argument or under "
        f"one of the keywords {', '.join(_KEYWORDS)}."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__

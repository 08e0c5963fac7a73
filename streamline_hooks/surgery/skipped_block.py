"""Run a block for some tokens, and store the keys and values of all of them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling import read_input, read_output, write_input, write_output

if TYPE_CHECKING:
    from streamline_hooks.surgery.prompt_skip import PromptSkip

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")


@dataclass(eq=False)
class SkippingPass:
    """A forward pass of the model."""

    is_needed: bool = False
    """Whether tokens may be skipped."""
    cached: int = 0
    mask: Any = None
    positions: Any = None
    skipped: Tensor | None = None
    """Tokens that skip the window, (batch, tokens); None if there are none."""
    boundary: Tensor | None = None
    """State that enters the window."""
    columns: Tensor | None = None
    """Indices of the tokens that run in at least one sequence."""


class SkippedBlock:
    """The forward of a skipped block."""

    def __init__(self, skip: PromptSkip, number: int, block: nn.Module) -> None:
        self._skip, self._number, self._block = skip, number, block
        self._original: Any = None  # an attribute of the instance, instead of a method
        self._signature = inspect.signature(block.forward)
        self._cache_name = cache_name(block)
        self._token_axes: dict[str, list[int]] = {}  # by argument and position in it; at most one
        self._queries: dict[nn.Linear, int] = {}  # modules that keys and values do not depend on, with a width

    def install(self) -> Callable[[], None]:
        """Let the block run this call, and return a function that undoes it."""
        self._original = vars(self._block).get("forward")
        return set_attribute(self._block, "forward", self)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's own forward."""
        if self._original is not None:
            return self._original(*args, **kwargs)
        return type(self._block).forward(self._block, *args, **kwargs)

    @property
    def has_axes(self) -> bool:
        """Whether `learn_axes` was called."""
        return bool(self._token_axes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; for a prompt, only the tokens that do not skip it."""
        if not self._skip._pass.is_needed:
            return self._forward(*args, **kwargs)
        return self._run(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block, present = self._block, self._skip._pass
        state = read_input(args, kwargs, block)
        if self._number == 0:
            self._skip._begin(state)
        skipped, boundary, columns = present.skipped, present.boundary, present.columns
        if self._number == len(self._skip.window) - 1:
            self._skip._pass = SkippingPass()  # frees the boundary
        if skipped is None or boundary is None or columns is None:
            return self._forward(*args, **kwargs)
        values = named_arguments(self._signature, args, kwargs)
        keys = values[self._cache_name] = KeyStore(values.get(self._cache_name))
        self._store_keys(keys, values)
        after = self._skip._estimate(self._number, boundary, state)
        chosen = {
            name: value if value is state else self._columns_of(name, value, columns, state.shape[1])
            for name, value in values.items()
        }
        if chosen.get("attention_mask") is None and "attention_mask.0" in self._token_axes:
            chosen["attention_mask"] = _causal_mask(columns + present.cached, keys.length)
        _, chosen = write_input((), chosen, state[:, columns], block)
        output = self._forward(**chosen)
        columns = columns.to(after.device)
        run = torch.where(skipped.to(after.device)[:, columns, None], after[:, columns], read_output(output))
        return write_output(output, after.index_copy(1, columns, run.to(after.dtype)))

    def _store_keys(self, keys: KeyStore, values: dict[str, Any]) -> None:
        """Run the block until it updates its cache, with a constant in place of its queries."""
        try:
            self._run_to_keys(values)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a number of tokens for which one head of queries has no valid shape
            widths = {module: module.out_features for module in self._queries}
            if widths == self._queries or keys.stored is not None:
                raise
            self._queries = widths
            self._run_to_keys(values)

    def _run_to_keys(self, values: dict[str, Any], query: float = 0.0) -> None:
        with ExitStack() as undo:
            for module, width in self._queries.items():
                undo.callback(set_attribute(module, "forward", partial(_constant, width, query)))
            try:
                self._forward(**values)
            except _KeysStoredError:
                return
        raise UnsupportedSurgery(
            f"{type(self._block).__name__} does not store keys and values in its cache. Expected blocks with keys and "
            "values of their own, without a recurrent state. Choose other blocks.",
            "prompt-skip",
        )

    def learn_queries(self, args: tuple[Any, ...], kwargs: dict[str, Any], heads: int) -> None:
        """Find linear modules that run before the cache is updated, but that keys and values do not depend on."""
        values = named_arguments(self._signature, args, kwargs)
        cache = values.get(self._cache_name)

        def stored() -> tuple[Tensor, Tensor]:
            keys = values[self._cache_name] = KeyStore(copy.deepcopy(cache))
            # Not zero, which would also leave the keys unchanged behind a module whose weights are zero now.
            self._run_to_keys(dict(values), math.nan)
            assert keys.stored is not None
            return keys.stored

        called: list[nn.Linear] = []
        linear = [module for module in self._block.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in linear]
        try:
            expected = stored()
        finally:
            for handle in handles:
                handle.remove()
        for module in called:
            # One head, if the block accepts that: rotary positions of all heads take 2 % of a prompt (SmolLM2).
            for width in (module.out_features // heads, module.out_features):
                self._queries[module] = width
                with suppress(Exception):  # a block that needs the output runs it
                    if all(torch.equal(a, b) for a, b in zip(stored(), expected, strict=True)):
                        break
                del self._queries[module]

    def learn_axes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the axis of tokens of each argument: the axis that has their number in all calls of the probe."""
        state = read_input(args, kwargs, self._block)
        for name, value in named_arguments(self._signature, args, kwargs).items():
            for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(part, Tensor) and part is not state:
                    axes = [axis for axis in range(-part.ndim, 0) if part.shape[axis] == state.shape[1]]
                    key = f"{name}.{number}"
                    self._token_axes[key] = [axis for axis in self._token_axes.get(key, axes) if axis in axes]

    def require_causal_masks(self) -> None:
        """Raise if a mask in a buffer hides earlier tokens (GPT-Neo), because it is read by the number of queries."""
        for name, mask in self._block.named_buffers():
            square = mask.dtype == torch.bool and mask.ndim >= 2 and mask.shape[-1] == mask.shape[-2] > 1
            if square and bool(mask.any()) and not bool((mask | ~torch.ones_like(mask).tril()).all()):
                raise UnsupportedSurgery(
                    f"PromptSkip: the mask {name} of {type(self._block).__name__} hides earlier tokens. Expected "
                    "masks that the model passes to its blocks. Choose other blocks.",
                    "prompt-skip",
                )

    def _columns_of(self, name: str, value: Any, columns: Tensor, tokens: int) -> Any:
        """Return the part of an argument that belongs to some of the tokens."""
        parts = value if isinstance(value, tuple) else (value,)
        chosen = [self._columns_of_part(f"{name}.{n}", part, columns, tokens) for n, part in enumerate(parts)]
        return tuple(chosen) if isinstance(value, tuple) else chosen[0]

    def _columns_of_part(self, key: str, part: Any, columns: Tensor, tokens: int) -> Any:
        if not isinstance(part, Tensor) or part.ndim == 0:
            return part
        if key not in self._token_axes:
            if tokens not in part.shape:
                return part
            raise UnsupportedSurgery(
                f"PromptSkip: a call of {type(self._block).__name__} has the argument {key.split('.')[0]} of shape "
                f"{tuple(part.shape)}, which the probe did not have. Expected the arguments of a forward pass with "
                "input_ids and attention_mask. Leave the argument out.",
                "prompt-skip",
            )
        for axis in self._token_axes[key]:
            part = part.index_select(axis, columns.to(part.device)) if part.shape[axis] == tokens else part
        return part


class _KeysStoredError(Exception):
    """The keys and values of a block are in the cache."""


class KeyStore:
    """A cache that stores all keys and values once, and returns them to the tokens that run."""

    def __init__(self, cache: Any) -> None:
        self._cache = getattr(cache, "self_attention_cache", cache)
        self.stored: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of keys."""
        assert self.stored is not None
        return int(self.stored[0].shape[-2])

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values and interrupt the block; in later calls, return what is stored."""
        if self.stored is None:
            self.stored = (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)
            raise _KeysStoredError
        return self.stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    bound: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


def _constant(width: int, value: float, state: Tensor) -> Tensor:
    """Return a constant in place of the output of a linear module, without allocating it."""
    return state.new_full((), value).expand(*state.shape[:-1], width)


def cache_name(module: nn.Module) -> str:
    """Return the name of the cache among the arguments of a block or model."""
    parameters = inspect.signature(module.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedSurgery(
        f"{type(module).__name__} takes no cache of keys and values. Expected blocks with one. Choose other blocks, or "
        "another model.",
        "prompt-skip",
    )


def first_tokens(mask: Any, cached: int, state: Tensor, positions: Any = None) -> Tensor:
    """Return which tokens of a call are the first real token of their sequence or packed document, (batch, tokens)."""
    first, tokens = _first_real_tokens(mask, cached, state), state.shape[1]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == tokens:
        restarts = positions.to(state.device).diff(dim=1) != 1
        if isinstance(mask, Tensor) and mask.ndim == 2:  # the positions of padding do not count
            restarts = restarts & mask[:, cached + 1 : cached + tokens].to(state.device).bool()
        first = first.clone()
        first[:, 1:] |= restarts
    return first


def _first_real_tokens(mask: Any, cached: int, state: Tensor) -> Tensor:
    batch, tokens = state.shape[:2]
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        first = torch.zeros(batch, tokens, dtype=torch.bool, device=state.device)
        first[:, 0] = cached == 0
        return first
    if isinstance(mask, Tensor) and mask.ndim == 2 and (mask.shape[1] >= cached + tokens or cached == 0):
        real = mask[:, : cached + tokens].to(state.device).bool()
        return (real & (real.cumsum(dim=1) == 1))[:, -tokens:].expand(batch, -1)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2] == tokens:
        allowed = mask == 0 if mask.is_floating_point() else mask.bool()
        return (allowed[:, 0].sum(dim=-1) == 1).to(state.device).expand(batch, -1)  # it attends only to itself
    raise StreamlineError(
        f"PromptSkip: the attention mask of the call does not show the first token of each of {batch} sequences with "
        f"{cached} cached and {tokens} new tokens. Expected None or a mask of shape {(batch, cached + tokens)}. Pass "
        "such a mask."
    )


def _causal_mask(positions: Tensor, length: int) -> Tensor:
    """Return the mask (1, 1, tokens, keys) of tokens at these positions, True where a token attends."""
    return (torch.arange(length, device=positions.device)[None] <= positions[:, None])[None, None]


def set_attribute(owner: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an instance, and return a function that restores its value or its absence."""
    attributes = vars(owner)
    absent, before = name not in attributes, attributes.get(name)
    attributes[name] = value

    def restore() -> None:
        if absent:
            attributes.pop(name, None)
        else:
            attributes[name] = before

    return restore

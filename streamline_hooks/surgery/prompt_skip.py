"""Skip blocks for the tokens of a prompt, which only get keys and values there.

The method is that of POP (arXiv 2602.03295) and SwiftKV (arXiv 2410.03960): generation needs the keys and values of the
prompt in every block, but not the rest of a block's computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    describe_blocks,
    device_of,
    padding_mask_of_call,
    refuse_compiled,
    refuse_wrapped,
    validate_arguments,
)
from streamline_hooks.modeling import (
    OutermostCall,
    find_stack,
    isolated_inference,
    read_input,
    read_output,
    write_input,
    write_output,
)
from streamline_hooks.surgery.layout import checked_window
from streamline_hooks.surgery.probe import probe_logits_allclose
from streamline_hooks.surgery.save_guard import transformers_ancestors
from streamline_hooks.surgery.session import mark_skipping, refuse_open_surgery

_CACHES = ("cache", "past_key_values", "layer_past", "past_key_value")
_PROMPT, _CONTINUATION = 7, 2  # tokens of the probe


class PromptSkip:
    """Skip a window of blocks for the tokens of a prompt inside a ``with`` statement.

    In a skipped block, a token of the prompt only gets keys and values. They are computed from an estimate of the state
    that enters the block, which `maps` compute from the state that enters the window. The first token of a sequence,
    which carries massive activations, the last token of the prompt and all generated tokens run every block. `generate`
    determines the prompt: all tokens that it is given and that are not in its cache, except the last. A plain forward
    pass skips only the tokens that `marked` names. When the ``with`` statement ends, the model is what it was.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model with a cache of keys and values.
    window : range
        Consecutive blocks to skip.
    maps : sequence of torch.nn.Module or None
        For each block of the window, a map from the state that enters the window, (batch, tokens, features), to an
        estimate of the state that leaves the block. None takes the estimate of the block before. By default, all are
        None. The map of the last block of the model has no effect on other tokens.
    stack : str, optional
        Path of the stack, if the model has several; see `find_stack`.
    probe : bool
        Compare the model on a few tokens with a full forward pass in which the outputs of the skipped blocks are
        replaced, and refuse it unless they are equal; default True.

    Raises
    ------
    UnsupportedSurgery
        If blocks of the window have no cache of keys and values of their own (recurrent states, shared keys), or the
        probe finds a difference.
    StreamlineError
        If the model is compiled or wrapped, a surgeon is open on it, or the numbers of blocks and maps differ.

    Notes
    -----
    Hooks on a skipped block see the states of all tokens. Hooks on modules inside it see two calls: for the keys and
    values of all tokens, and for the tokens that run. The context is for one thread.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model, prompt = tiny_model("llama"), torch.tensor([[3, 4, 5, 6, 7, 8]])
    >>> with PromptSkip(model, range(5, 8)):
    ...     model.generate(prompt, max_new_tokens=2, do_sample=False).shape
    torch.Size([1, 8])
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        window: range,
        maps: Sequence[nn.Module | None] | None = None,
        *,
        stack: str | None = None,
        probe: bool = True,
    ) -> None:
        refuse_compiled(model, "skip blocks of")
        refuse_wrapped(model)
        self.model = model
        self.stack = find_stack(model, stack)
        refuse_open_surgery(self.stack, "PromptSkip")
        self.window = checked_window(window, len(self.stack))
        self.maps = list(maps) if maps is not None else [None] * len(self.window)
        if len(self.maps) != len(self.window):
            raise StreamlineError(
                f"PromptSkip: {len(self.maps)} maps were given for {describe_blocks(self.window)}. Expected one, or "
                "None, for each block. Fit the maps for this window."
            )
        _require_dense_masks(model)
        self._calls = [_BlockCall(self, number, self.stack[k]) for number, k in enumerate(self.window)]
        self._pass = _Pass()
        self._marks: Tensor | None = None  # (batch, tokens), from `marked`
        self._pending = 0  # tokens of the prompt that `generate` has not run yet
        self._is_generating = False
        self._outermost = OutermostCall()
        self._undo = ExitStack()
        self._is_open = False
        _learn_and_verify(self, verify=probe)

    def __enter__(self) -> Self:
        if self._is_open:
            raise StreamlineError("This PromptSkip is open already. Expected one with statement. Close it first.")
        refuse_open_surgery(self.stack, "PromptSkip")
        with ExitStack() as undo:
            undo.callback(mark_skipping(self.stack))
            self._open(undo)
            for owner in transformers_ancestors(self.stack):
                undo.callback(_set_attribute(owner, "save_pretrained", _refuse_saving))
            generate: Any = getattr(self.model, "generate", None)
            if callable(generate):
                undo.callback(_set_attribute(self.model, "generate", partial(self._generate, generate)))
            self._undo, self._is_open = undo.pop_all(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._undo.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StreamlineError(
            f"A {type(self.model).__name__} was copied or pickled inside an open PromptSkip, which the copy could not "
            "close. Expected a model outside of the with statement. Copy it before."
        )

    @contextmanager
    def marked(self, tokens: Tensor) -> Iterator[None]:
        """Skip the blocks for the marked tokens of each forward pass inside a ``with`` statement.

        Parameters
        ----------
        tokens : torch.Tensor
            Boolean mask, (batch, tokens) of the forward pass. The first real token of a sequence runs every block,
            marked or not.

        Raises
        ------
        StreamlineError
            In the forward pass, if it has another number of sequences or tokens.

        Examples
        --------
        >>> from streamline_hooks.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5, 6]])
        >>> with torch.no_grad(), PromptSkip(model, range(5, 8)) as skip:
        ...     with skip.marked(torch.tensor([[True, True, False, False]])):
        ...         skipped = model(ids).logits
        ...     torch.equal(skipped[:, 0], model(ids).logits[:, 0])
        True
        """
        self._marks = tokens.bool()
        try:
            yield
        finally:
            self._marks = None

    def _open(self, undo: ExitStack) -> None:
        """Register the hooks of the model and the calls of the blocks."""
        for handle in self._outermost.hooks(self.stack.ancestors):
            undo.callback(handle.remove)
        for module in self.stack.ancestors:
            hook = module.register_forward_pre_hook(self._enter_model, with_kwargs=True)
            undo.callback(hook.remove)
        for call in self._calls:
            undo.callback(call.install())

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        inputs = args[0] if args and isinstance(args[0], Tensor) else next((v for v in named if v is not None), None)
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        cached = 0 if cache is None else int(cache.get_seq_length())
        self._pending = 0 if inputs is None else max(0, inputs.shape[1] - cached - 1)
        self._is_generating = True
        try:
            return original(*args, **kwargs)
        finally:
            self._pending, self._is_generating = 0, False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost.begins(module):
            self._pass = _Pass(is_needed=self._marks is not None or self._pending > 0)
            if not self._pass.is_needed:
                return
            arguments = _named_arguments(inspect.signature(module.forward), args, kwargs)
            cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
            if cache is None and self._is_generating:
                raise StreamlineError(
                    "PromptSkip: generate runs the model without a cache of keys and values, so every step would run "
                    "the prompt again. Expected use_cache=True. Change the generation config."
                )
            if arguments.get("output_attentions"):
                raise StreamlineError(
                    "PromptSkip: output_attentions=True was given, but skipped tokens have no attention. Expected "
                    "False. Leave it out, or run the model outside of the with statement."
                )
            self._pass.cached = 0 if cache is None else int(cache.get_seq_length())
        if self._pass.is_needed:
            self._pass.mask = padding_mask_of_call(module, args, kwargs, self._pass.mask)

    def _begin(self, state: Tensor) -> None:
        """Determine which tokens of a forward pass skip the window that it enters."""
        tokens = state.shape[1]
        if self._marks is not None:
            if self._marks.shape != state.shape[:2]:
                raise StreamlineError(
                    f"PromptSkip: the mask of marked() has the shape {tuple(self._marks.shape)}, but the forward pass "
                    f"has {tuple(state.shape[:2])} (batch, tokens). Expected the same. Pass a mask for this batch."
                )
            marks = self._marks.to(state.device)
        else:
            marks = (torch.arange(tokens, device=state.device) < self._pending).expand(state.shape[:2])
            self._pending = max(0, self._pending - tokens)
        marks = marks & ~_first_tokens(self._pass.mask, self._pass.cached, state)
        if bool(marks.any()):
            self._pass.skipped, self._pass.boundary = marks, state
            self._pass.columns = (~marks).any(dim=0).nonzero().flatten()

    def _estimate(self, number: int, boundary: Tensor, state: Tensor) -> Tensor:
        """Return the estimate of the state that leaves a block of the window."""
        map_ = self.maps[number]
        return state if map_ is None else map_(boundary).to(state.dtype)


@dataclass(eq=False)
class _Pass:
    """A forward pass of the model."""

    is_needed: bool = False
    """Whether tokens may be skipped."""
    cached: int = 0
    mask: Any = None
    skipped: Tensor | None = None
    """Tokens that skip the window, (batch, tokens); None if there are none."""
    boundary: Tensor | None = None
    """State that enters the window."""
    columns: Tensor | None = None
    """Indices of the tokens that run in at least one sequence."""


class _BlockCall:
    """The forward of a skipped block."""

    def __init__(self, skip: PromptSkip, number: int, block: nn.Module) -> None:
        self._skip, self._number, self._block = skip, number, block
        self._forward: Callable[..., Any] = block.forward
        self._signature = inspect.signature(block.forward)
        self._cache_name = _cache_name(block)
        self._token_axes: dict[str, list[int]] = {}  # by argument and position in it; at most one
        self._queries: list[nn.Module] = []  # modules that keys and values do not depend on

    def install(self) -> Callable[[], None]:
        """Let the block run this call, and return a function that undoes it."""
        self._forward = self._block.forward
        return _set_attribute(self._block, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
            self._skip._pass = _Pass()  # frees the boundary
        if skipped is None or boundary is None or columns is None:
            return self._forward(*args, **kwargs)
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise StreamlineError(
                "PromptSkip: gradient checkpointing would run the skipped blocks again without their marks. Expected "
                "a model without it. Call model.gradient_checkpointing_disable()."
            )
        values = _named_arguments(self._signature, args, kwargs)
        keys = values[self._cache_name] = _KeyStore(values.get(self._cache_name))
        self._store_keys(keys, values)
        after = self._skip._estimate(self._number, boundary, state)
        if not len(columns):
            return after
        chosen = {
            name: value if value is state else self._columns_of(name, value, columns, state.shape[1])
            for name, value in values.items()
        }
        if chosen.get("attention_mask") is None and "attention_mask.0" in self._token_axes:
            chosen["attention_mask"] = _causal_mask(columns + present.cached, keys.length)
        _, chosen = write_input((), chosen, state[:, columns], block)
        output = self._forward(**chosen)
        run = torch.where(skipped[:, columns, None], after[:, columns], read_output(output))
        return write_output(output, after.index_copy(1, columns, run.to(after.dtype)))

    def _store_keys(self, keys: _KeyStore, values: dict[str, Any]) -> None:
        """Run the block until it updates its cache."""
        with ExitStack() as undo:
            for module in self._queries:
                undo.callback(_set_attribute(module, "forward", partial(_zeros, module)))
            try:
                self._forward(**values)
            except _KeysStoredError:
                return
        raise UnsupportedSurgery(
            f"{type(self._block).__name__} does not store keys and values in its cache. Expected blocks with keys and "
            "values of their own, without a recurrent state. Choose other blocks.",
            "prompt-skip",
        )

    def learn_axes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the axis of tokens of each argument: the axis that has their number in all calls of the probe."""
        state = read_input(args, kwargs, self._block)
        for name, value in _named_arguments(self._signature, args, kwargs).items():
            for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(part, Tensor) and part is not state:
                    axes = [axis for axis in range(-part.ndim, 0) if part.shape[axis] == state.shape[1]]
                    key = f"{name}.{number}"
                    self._token_axes[key] = [axis for axis in self._token_axes.get(key, axes) if axis in axes]

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
            part = part.index_select(axis, columns) if part.shape[axis] == tokens else part
        return part


class _KeysStoredError(Exception):
    """The keys and values of a block are in the cache."""


class _KeyStore:
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


def _named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    bound: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise StreamlineError(
        "save_pretrained was called inside an open PromptSkip, whose maps it would not save. Expected a closed one. "
        "Leave the with statement to save the original."
    )


def _zeros(module: Any, state: Tensor) -> Tensor:
    """Return zeros in place of the output of a linear module."""
    return state.new_zeros(()).expand(*state.shape[:-1], module.out_features)


def _cache_name(module: nn.Module) -> str:
    """Return the name of the cache among the arguments of a block or model."""
    parameters = inspect.signature(module.forward).parameters
    for name in _CACHES:
        if name in parameters:
            return name
    raise UnsupportedSurgery(
        f"{type(module).__name__} takes no cache of keys and values. Expected blocks with one. Choose other blocks, or "
        "another model.",
        "prompt-skip",
    )


def _require_dense_masks(model: nn.Module) -> None:
    """Raise if the attention of a model does not take masks by query and key."""
    name = str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")
    if name.startswith(("flash", "flex", "paged", "sage")):
        raise UnsupportedSurgery(
            f"PromptSkip: the attention {name!r} takes no mask by query and key. Expected 'sdpa' or 'eager'. Call "
            "model.set_attn_implementation('sdpa').",
            "prompt-skip",
        )


def _first_tokens(mask: Any, cached: int, state: Tensor) -> Tensor:
    """Return which tokens of a call are the first real token of their sequence, (batch, tokens)."""
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


def _set_attribute(owner: nn.Module, name: str, value: Any) -> Callable[[], None]:
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


def _learn_and_verify(skip: PromptSkip, verify: bool) -> None:
    """Learn the arguments of the skipped blocks, and compare the model with the masked full forward pass."""
    model, total = skip.model, _PROMPT + _CONTINUATION
    generator = torch.Generator().manual_seed(0)
    text_config = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[union-attr, operator]
    vocabulary = min(int(getattr(text_config, "vocab_size", 50)), 50)
    ids = torch.randint(3 % vocabulary, vocabulary, (2, total), generator=generator).to(device_of(model))
    padded = torch.ones_like(ids)
    padded[1, :2] = 0
    prompt = (torch.arange(total, device=ids.device) < _PROMPT - 1).expand(2, -1)
    with isolated_inference(model):
        for mask in (padded, None):
            try:
                if mask is not None:
                    _learn(skip, ids, mask)
                if not verify:
                    return
                expected = _masked_forward(skip, ids, mask, prompt)
                computed = _skipped_forward(skip, ids, mask, prompt)
            except (StreamlineError, UnsupportedSurgery):
                raise
            except Exception as error:
                raise UnsupportedSurgery(
                    f"PromptSkip: {type(model).__name__} fails when prompts skip {describe_blocks(skip.window)} "
                    f"({type(error).__name__}: {error}). Expected a causal language model with a cache of keys and "
                    "values. Choose other blocks, or another model.",
                    "prompt-skip",
                ) from error
            compared = ~prompt if mask is None else ~prompt & mask.bool()
            if not probe_logits_allclose(computed[compared], expected[compared]):
                raise UnsupportedSurgery(
                    f"PromptSkip: with {describe_blocks(skip.window)} skipped for prompts, {type(model).__name__} does "
                    "not give the logits of a full forward pass in which these blocks' outputs are replaced. Expected "
                    "equal logits. Choose other blocks, or another model.",
                    "prompt-skip",
                )


def _learn(skip: PromptSkip, ids: Tensor, mask: Tensor) -> None:
    """Find the axes of tokens of the arguments of the skipped blocks, in two calls with different numbers of tokens."""
    with ExitStack() as undo:
        for call, k in zip(skip._calls, skip.window, strict=True):

            def learn(block: nn.Module, args: Any, kwargs: Any, call: _BlockCall = call) -> None:
                call.learn_axes(args, kwargs)

            undo.callback(skip.stack[k].register_forward_pre_hook(learn, with_kwargs=True).remove)
        half, name = ids.shape[1] // 2, _cache_name(skip.model)
        output = skip.model(input_ids=ids[:, :half], attention_mask=mask[:, :half], use_cache=True)
        rest: dict[str, Any] = {"input_ids": ids[:, half:], "attention_mask": mask, name: output[name]}
        skip.model(**rest, use_cache=True)


def _masked_forward(skip: PromptSkip, ids: Tensor, mask: Tensor | None, prompt: Tensor) -> Tensor:
    """Return the logits of a full forward pass in which the outputs of skipped blocks are replaced by estimates."""
    marks = prompt & ~_first_tokens(mask, 0, ids)
    boundary: list[Tensor] = []

    def replace(number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = read_input(args, kwargs, block)
        if number == 0:
            boundary[:] = [state]
        estimate = skip._estimate(number, boundary[0], state)
        return write_output(output, torch.where(marks[..., None], estimate, read_output(output)))

    with ExitStack() as undo:
        for number, k in enumerate(skip.window):
            hook = skip.stack[k].register_forward_hook(partial(replace, number), with_kwargs=True)
            undo.callback(hook.remove)
        logits: Tensor = skip.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits


def _skipped_forward(skip: PromptSkip, ids: Tensor, mask: Tensor | None, prompt: Tensor) -> Tensor:
    """Return the logits of two parts of a prompt, whose tokens skip the window, and of a continuation."""
    logits: list[Tensor] = []
    name, cache = _cache_name(skip.model), None
    with ExitStack() as undo:
        skip._open(undo)
        for part in (slice(0, 3), slice(3, _PROMPT), slice(_PROMPT, None)):
            arguments: dict[str, Any] = {"input_ids": ids[:, part], "use_cache": True}
            if mask is not None:
                arguments["attention_mask"] = mask[:, : part.stop]
            if cache is not None:
                arguments[name] = cache
            with skip.marked(prompt[:, part]):
                output = skip.model(**arguments)
            cache = output[name]
            logits.append(output.logits)
    return torch.cat(logits, dim=1)

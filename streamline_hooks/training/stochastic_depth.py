"""Skip blocks at random during training."""

from __future__ import annotations

import operator
import random
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    block_indices,
    refuse_compiled,
    refuse_wrapped,
    validate_arguments,
)
from streamline_hooks.modeling import BlockStack, ChangeHook, find_stack, modules_of
from streamline_hooks.surgery import (
    ConfigCopies,
    Edits,
    LayerSurgeon,
    StackLayout,
    bypass,
    config_for_blocks,
    find_config_copies,
    find_hazards,
    find_mismatch,
    find_prompt_skip,
    run_reference_with_hooks,
    saved_model_depth,
)

Rule = Literal["linear", "constant"]
_CACHES = ("past_key_values", "cache_params", "cache")


class StochasticDepth:
    """Skip blocks at random during training: stochastic depth (arXiv 1603.09382) or LayerDrop (arXiv 1909.11556).

    Inside the context, each forward in training mode draws the blocks to skip for the whole batch, and does not compute
    them. The forward runs the model from which `LayerSurgeon` has removed these blocks; afterwards all blocks are
    restored. In evaluation mode no block is skipped.

    Parameters
    ----------
    model : torch.nn.Module
        The model to train, neither compiled nor wrapped. Under DDP, pass the module inside the wrapper, and use
        ``find_unused_parameters=True``.
    rate : float or sequence of float
        Probability of skipping a block, in [0, 1): a single value, distributed by `rule`, or one value per block.
    rule : {"linear", "constant"}, optional
        Distribution of a single rate. "linear" (default) increases with depth: block k of L is skipped with probability
        rate · (k + 1) / L (eq. 4 of stochastic depth). "constant" is LayerDrop.
    protect : iterable of int
        Blocks that are never skipped. The rates of other blocks do not change.
    seed : int
        Seed of the draws. The global random state is neither used nor changed.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Attributes
    ----------
    skipped : tuple of int
        The blocks skipped by the latest forward in training mode.

    Raises
    ------
    StreamlineError
        If the rates do not fit the model. On entering the context, if the model is compiled or wrapped, or another
        `StochasticDepth` is open on it.
    UnsupportedSurgery
        On entering the context, if a block with a rate above 0 cannot be skipped. This is tested once with about twenty
        forwards of 16 tokens.

    Notes
    -----
    Blocks are not scaled, as in LayerDrop. Stochastic depth multiplies the contribution of a block by its survival
    probability after training (eq. 5 of that paper); this is not done here, because the weights are not changed. A draw
    that would skip all blocks is repeated.

    Ranks with the same seed skip the same blocks if they run the same number of forwards; no rank waits for another
    rank, and a skipped block has no gradient in that step. For independent draws pass ``seed=seed + rank``; gradients
    are then averaged over all ranks, including those that skipped the block.

    Gradient checkpointing of each block, as in Transformers, works in both variants. A checkpoint around the whole
    model would draw again in the backward, and raises. A checkpoint around several blocks of the list would run all of
    them in the backward: with ``use_reentrant=False`` torch raises; with ``use_reentrant=True`` the gradients are wrong
    and no error is raised.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=4).train()
    >>> inputs = tiny_inputs(model)
    >>> with StochasticDepth(model, rate=0.5, protect=[0], seed=3) as depth:
    ...     print(depth.rates)
    ...     for _ in range(3):
    ...         model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ...         print(depth.skipped)
    (0.0, 0.25, 0.375, 0.5)
    (2,)
    (1, 2)
    (1, 3)
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        rate: float | Sequence[float] = 0.2,
        *,
        rule: Rule | None = None,
        protect: Iterable[int] = (),
        seed: int = 0,
        stack: str | None = None,
    ) -> None:
        self.model = model
        self.stack = find_stack(model, stack)
        self.skipped: tuple[int, ...] = ()
        self._rates: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
        self._set_rates(_rates(rate, rule, protect, len(self.stack)))
        self._random = random.Random(operator.index(seed))
        self._handles: list[RemovableHandle] = []
        self._running: nn.Module | None = None  # the module whose forward currently runs with skipped blocks

    def __enter__(self) -> Self:
        refuse_compiled(self.model, "skip blocks of")
        refuse_wrapped(self.model)
        hooks = (hook for module in self.stack.ancestors for hook in module._forward_pre_hooks.values())
        if any(isinstance(hook, _BeginHook) and hook.is_live for hook in hooks):
            raise StreamlineError(
                f"Another StochasticDepth is open on this {type(self.model).__name__}. Expected at most one. Leave "
                "that context first, and pass all rates to one StochasticDepth."
            )
        self._refuse_prompt_skip()
        self._skipping = BlockSkipper(self.model, self.stack)
        if self._skipping.follow():
            self.stack = self._skipping.stack
        _require_skippable(self._skipping, [k for k, rate in enumerate(self.rates) if rate > 0])
        try:
            for module in self.stack.ancestors:  # the ancestor called first draws: some losses call an inner model
                begin = _BeginHook(module, partial(self._begin, module))
                end = ChangeHook(module, partial(self._end, module))
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(end, always_call=True))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the probability of skipping each block; 0 for blocks that were inserted later."""
        self._find_stack()
        return self._rates_of_stack()

    def _find_stack(self) -> None:
        """Find the stack again between two forwards, because blocks may have been removed since the last one."""
        if self._running is None:
            self.stack = find_stack(self.model, self.stack.path)

    def _refuse_prompt_skip(self) -> None:
        if any(find_prompt_skip(module) is not None for module in (self.model, *self.stack.ancestors)):
            raise StreamlineError(
                f"The prompts of this {type(self.model).__name__} skip blocks. Expected a model without a PromptSkip: "
                "a forward that drops the first block of its window would not skip the others. Train the original."
            )

    def _rates_of_stack(self) -> tuple[float, ...]:
        return tuple(self._rates.get(block, 0.0) for block in self.stack.blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return the rates and the random state as JSON values, to resume with the same draws.

        Returns
        -------
        dict
            To be passed to `load_state_dict`.
        """
        version, words, _ = self._random.getstate()
        return {"rates": list(self.rates), "random": [version, list(words)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the rates and the random state.

        Parameters
        ----------
        state : mapping
            The result of `state_dict`.

        Raises
        ------
        StreamlineError
            If the state is invalid or belongs to a model with another number of blocks.
        """
        try:
            rates = [float(rate) for rate in state["rates"]]
            version, words = state["random"]
            drawing = random.Random()
            drawing.setstate((version, tuple(words), None))
        except (KeyError, TypeError, ValueError) as error:
            raise StreamlineError(
                f"The state is invalid ({type(error).__name__}: {error}). Expected the result of "
                "StochasticDepth.state_dict()."
            ) from error
        self._find_stack()
        if len(rates) != len(self.stack):
            raise StreamlineError(
                f"The state has rates for {len(rates)} blocks. Expected {len(self.stack)}, the number of blocks of "
                "this model. Load the model of the same checkpoint."
            )
        self._set_rates(rates)
        self._random = drawing

    def _set_rates(self, rates: Sequence[float]) -> None:
        self._rates.update(zip(self.stack.blocks, rates, strict=True))

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._restore()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._running is module:  # the previous forward was interrupted by an exception
            self._restore()
        if self._running is not None or not module.training:
            return
        _refuse_traced(module)
        self._refuse_prompt_skip()
        caches = [name for name in _CACHES if kwargs.get(name) is not None]
        if caches:
            raise StreamlineError(
                f"{type(module).__name__} was called with a cache ({caches[0]}) in training mode. Expected no cache: "
                "skipped blocks store no keys, and other blocks would use their slots in the next forward. Call "
                "model.eval() to generate."
            )
        if self._skipping.follow():
            self.stack = self._skipping.stack
        self.skipped = self._draw()
        self._running = module
        if self.skipped:
            self._skipping.skip_blocks(self.skipped)

    def _end(self, module: nn.Module, *args: Any) -> None:
        if self._running is module:
            self._restore()

    def _restore(self) -> None:
        if self._running is not None:
            self._skipping.restore()
            self._running = None

    def _draw(self) -> tuple[int, ...]:
        rates = self._rates_of_stack()
        while True:
            skipped = tuple(k for k, rate in enumerate(rates) if self._random.random() < rate)
            if len(skipped) < len(rates):
                return skipped


def _refuse_traced(module: nn.Module) -> None:
    """Raise if the model is compiled, or if its forward runs again in a backward."""
    if torch.compiler.is_compiling() or module._compiled_call_impl is not None:
        raise StreamlineError(
            f"{type(module).__name__} was compiled while its blocks are skipped at random: the compiled code would "
            "always skip the same blocks. Train without torch.compile, or without StochasticDepth."
        )
    if torch._C._current_graph_task_id() != -1:
        raise StreamlineError(
            f"{type(module).__name__} runs inside a backward: a checkpoint around the whole model would run other "
            "blocks in the backward than in the forward. Checkpoint each block (gradient_checkpointing_enable) instead."
        )


def _rates(rate: float | Sequence[float], rule: Rule | None, protect: Iterable[int], length: int) -> list[float]:
    """Return the probability of skipping each block."""
    if isinstance(rate, (int, float)):
        rates = [float(rate) if rule == "constant" else rate * (k + 1) / length for k in range(length)]
    else:
        rates = [float(value) for value in rate]
        if rule is not None:
            raise StreamlineError(
                f"rule={rule!r} was given with a list of rates. Expected rule only with a single rate. Leave rule out."
            )
        if len(rates) != length:
            raise StreamlineError(
                f"rate has {len(rates)} values, and the stack has {length} blocks. Expected one value per block."
            )
    wrong = [value for value in ([rate] if isinstance(rate, (int, float)) else rates) if not 0 <= value < 1]
    if wrong:
        raise StreamlineError(
            f"The probability {wrong[0]} of skipping a block is invalid. Expected 0 <= rate < 1. Use LayerSurgeon to "
            "remove blocks permanently."
        )
    for k in block_indices(protect, length, "protect"):
        rates[k] = 0.0
    return rates


class _BlockEdits(Edits):
    """Edits of a `LayerSurgeon` that repeatedly removes blocks, with cached look-ups."""

    def __init__(self, configs: ConfigCopies) -> None:
        super().__init__(configs, uuid.uuid4().hex)
        self._numbers = {id(block): k for k, block in enumerate(self.stack.blocks)}
        self._described: list[Any] | None = None
        self._copying: list[nn.Module] = []

    def source(self, module: nn.Module) -> int | None:
        """Return the number of a block."""
        return self._numbers[id(module)]

    def apply_layout(self, *arranged: Any) -> None:
        """Apply a layout; the first call, while the model has all blocks, finds the copies of the configuration."""
        if self._described is None:
            config, count, everything = self.stack.config, self.stack.count_attribute, range(len(self.stack))
            if config is not None and count is not None:
                names = {count, *config_for_blocks(config, count, len(everything), everything, self.stack.stage)}
                values = {name: vars(config)[name] for name in names if name in vars(config)}
                copies = find_config_copies(self.stack, values, values, everything)
                self._copying = list(dict.fromkeys(module for module, _, _ in copies))
            self._described = super()._descriptions()
        super().apply_layout(*arranged)

    def _descriptions(self) -> list[Any]:
        return self._described or []

    def _copies(
        self, old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[int]
    ) -> Iterator[tuple[nn.Module, str, Any]]:
        return find_config_copies(self.stack, old, new, sources, self._copying)


class BlockSkipper:
    """Repeatedly remove blocks from a model and restore them, with the look-ups of a `LayerSurgeon` done once."""

    def __init__(self, model: nn.Module, stack: BlockStack) -> None:
        self.model = model
        self._follow(stack)

    def _follow(self, stack: BlockStack) -> None:
        self.stack = stack
        self._configs = ConfigCopies(stack)
        self._edits = _BlockEdits(self._configs)

    def follow(self) -> bool:
        """Find the stack again if its blocks or configuration changed; return whether the blocks changed."""
        same = modules_of(self.stack.container) == self.stack.blocks
        if not same or not self.stack.has_its_config():
            self._follow(find_stack(self.model, self.stack.path))
        return not same

    def skip_blocks(self, blocks: Collection[int]) -> None:
        """Remove blocks from the complete model."""
        layout = StackLayout(list(self.stack.blocks))
        for k in blocks:
            layout.replace_window(range(k, k + 1), None)
        try:
            self._configs.apply()
            self._edits.apply_layout(*layout.arrange())
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Restore the model bit for bit; a second call has no effect."""
        try:
            self._close()
        except BaseException:  # finish after an interrupt; every step can be repeated
            self._close()
            raise

    def _close(self) -> None:
        self._edits.close()
        self._configs.restore(search=False)


class _BeginHook(ChangeHook):
    """A pre-hook that raises in a replica of the model, where it would have no effect."""

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)
        self.is_live = change is not None

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Call the hook; raise if a replica of the model runs."""
        if self.is_live and getattr(module, "_is_replica", False):
            raise StreamlineError(
                f"A replica of {type(module).__name__} is running (nn.DataParallel), in which no block can be skipped. "
                "Use DistributedDataParallel, or one device."
            )
        return super().__call__(module, *args)


def _require_skippable(skipping: BlockSkipper, blocks: Sequence[int]) -> None:
    """Raise `UnsupportedSurgery` unless skipping the blocks is equivalent to bypassing them.

    The blocks with even positions are skipped together, then those with odd positions. If a test fails, blocks are
    tested one by one to name the block that fails.
    """
    stack = skipping.stack
    if len(stack) < 2 and blocks:
        raise StreamlineError(
            f"{stack.path} has one block, which cannot be skipped. Expected at least two blocks. Name it in protect=."
        )
    for k in blocks:
        hazards = find_hazards(stack, range(k, k + 1))
        if hazards:
            raise _not_skippable(k, f"{'; '.join(map(str, hazards))}.", hazards[0].cause)
    for group in (blocks[::2], blocks[1::2]):
        wrong = _wrong_without(skipping, group) if group else None
        if wrong is not None:
            for k in group:
                with LayerSurgeon(stack.model, stack) as surgeon:
                    try:
                        surgeon.remove([k])
                    except UnsupportedSurgery as error:
                        reason = str(error).split(": ", 1)[-1].partition(" Choose other")[0]
                        raise _not_skippable(k, reason, error.cause) from None
            raise UnsupportedSurgery(
                f"Blocks {', '.join(map(str, group))} cannot be skipped in one forward: without them {wrong}, although "
                "each single block can be skipped. Name some of them in protect=.",
                "probe",
            )


def _wrong_without(skipping: BlockSkipper, blocks: Sequence[int]) -> str | None:
    """Return how the model without these blocks differs from bypassing them; None if equal or not comparable."""
    stack, model = skipping.stack, skipping.model
    called: set[int] = set()

    def attach() -> list[RemovableHandle]:
        called.clear()
        watching = [stack[k].register_forward_pre_hook(lambda *args, k=k: called.add(k)) for k in blocks]
        return [*watching, *(handle for k in blocks for handle in bypass(stack[k], stack[k]))]

    message = f"Skipping blocks of this {type(model).__name__} is not compared with bypassing the same blocks"
    is_whole_model = saved_model_depth(stack) == 0
    reference = run_reference_with_hooks(model, attach, message, runs=stack[blocks[0]]) if is_whole_model else None
    if reference is not None and len(called) < len(blocks):
        inputs = " and ".join(reference.inputs)
        return f"the model cannot be verified, because a forward of {inputs} alone does not run all of these blocks"
    parameter_ids = {id(parameter) for parameter in model.parameters()}
    skipping.skip_blocks(blocks)
    try:
        copies = [name for name, parameter in model.named_parameters() if id(parameter) not in parameter_ids]
        if copies:
            raise UnsupportedSurgery(
                f"Blocks of {type(model).__name__} cannot be skipped at random: {' and '.join(copies)} would be copies "
                "without the parts of these blocks, and updates of the copies would be lost. Train this model with all "
                "its blocks.",
                "per-layer-embeddings",
            )
        return None if reference is None else find_mismatch(reference, model)
    finally:
        skipping.restore()


def _not_skippable(k: int, reason: str, cause: str) -> UnsupportedSurgery:
    return UnsupportedSurgery(f"Block {k} cannot be skipped: {reason} Name it in protect=.", cause)

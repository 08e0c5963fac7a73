"""Skip blocks at random while a model trains."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.arguments import block_numbers, checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.in_training.skipping import BeginHook, Skipping, require_skippable
from streamline_hooks.read_hook import ChangeHook
from streamline_hooks.stack import find_stack
from streamline_hooks.wrapping import refuse_compiled, refuse_wrapped

Rule = Literal["linear", "constant"]
_CACHES = ("past_key_values", "cache_params", "cache")


class StochasticDepth:
    """Train with blocks skipped at random: stochastic depth (arXiv 1603.09382), or LayerDrop (arXiv 1909.11556).

    Inside the context each forward in training mode draws which blocks it goes without, for the whole batch at once,
    so that their time is saved. It runs the model that `LayerSurgeon` makes by removing them, and has all blocks again
    when it returns. In evaluation mode nothing is skipped.

    Parameters
    ----------
    model : torch.nn.Module
        Neither compiled nor wrapped; under DDP the module inside, with ``find_unused_parameters=True``.
    rate : float or sequence of float
        The probability with which a block is skipped, 0 or more and below 1: one for all, by `rule`, or one a block.
    rule : {"linear", "constant"}, optional
        How one rate is given to the blocks. "linear", which is taken where nothing is said, lets it rise with the
        depth: block k of L is skipped with the probability rate · (k + 1) / L (eq. 4 of stochastic depth). "constant"
        is LayerDrop.
    keep : iterable of int
        Blocks that are never skipped. The rates of the others stay what they are.
    seed : int
        Of the draws. The global random state is neither used nor changed.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Attributes
    ----------
    skipped : tuple of int
        The blocks that the latest forward in training mode went without.

    Raises
    ------
    StreamlineError
        If the rates do not fit the model; on entering, if it is compiled or wrapped, or another one is open on it.
    UnsupportedSurgery
        On entering, if a block that may be skipped cannot go; the text says why. This is tried once, in about
        twenty forwards of 16 tokens.

    Notes
    -----
    No block is scaled, neither in training nor afterwards, as in LayerDrop. Stochastic depth multiplies what a block
    adds by its probability to be there when the training is over (its eq. 5); that is not done here, since the weights
    are the model's own.

    A draw that leaves no block at all is drawn again.

    Processes of a distributed training draw the same with the same seed, as long as they run as many forwards: all of
    them are done earlier then, where with draws of their own each step lasts as long as the slowest, and a skipped
    block is out of the step's gradient altogether. For draws of their own give each its seed (``seed=seed + rank``);
    the gradients are averaged over all processes then, also over those that skipped the block.

    Gradient checkpointing of each block, as Transformers does it, is good in both of its ways. A checkpoint around the
    whole model would draw anew in the backward, and raises. One around a function that runs through several blocks of
    the list would find all of them there in the backward: with ``use_reentrant=False`` torch raises, with
    ``use_reentrant=True`` the gradients are wrong and nobody says so.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=4).train()
    >>> inputs = tiny_inputs(model)
    >>> with StochasticDepth(model, rate=0.5, keep=[0], seed=3) as depth:
    ...     print(depth.rates)
    ...     for _ in range(3):
    ...         model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ...         print(depth.skipped)
    (0.0, 0.25, 0.375, 0.5)
    (2,)
    (1, 2)
    (1, 3)
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        rate: float | Sequence[float] = 0.2,
        *,
        rule: Rule | None = None,
        keep: Iterable[int] = (),
        seed: int = 0,
        stack: str | None = None,
    ) -> None:
        self.model = model
        self.stack = find_stack(model, stack)
        self.skipped: tuple[int, ...] = ()
        self._rates: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
        self._set_rates(_rates(rate, rule, keep, len(self.stack)))
        self._random = random.Random(operator.index(seed))
        self._handles: list[RemovableHandle] = []
        self._running: nn.Module | None = None  # whose forward goes without blocks now

    def __enter__(self) -> Self:
        refuse_compiled(self.model, "skip blocks of")
        refuse_wrapped(self.model)
        hooks = (hook for module in self.stack.ancestors for hook in module._forward_pre_hooks.values())
        if any(isinstance(hook, BeginHook) and hook.is_live for hook in hooks):
            raise StreamlineError(
                f"Blocks of this {type(self.model).__name__} are skipped at random already. Leave that context first, "
                "and give one StochasticDepth all rates."
            )
        self._skipping = Skipping(self.model, self.stack)
        if self._skipping.follow():
            self.stack = self._skipping.stack
        require_skippable(self._skipping, [k for k, rate in enumerate(self.rates) if rate > 0])
        try:
            for module in self.stack.ancestors:  # the first that is called draws: some losses call an inner one
                begin, end = (
                    BeginHook(module, partial(self._begin, module)),
                    ChangeHook(module, partial(self._end, module)),
                )
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(end, always_call=True))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @property
    def rates(self) -> tuple[float, ...]:
        """The probability with which each block of the model is skipped; 0 for those that were put in meanwhile."""
        return tuple(self._rates.get(block, 0.0) for block in self.stack.blocks)

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs to draw the same: JSON values.

        Returns
        -------
        dict
            The rates of the blocks, and the state of the random numbers.
        """
        version, words, _ = self._random.getstate()
        return {"rates": list(self.rates), "random": [version, list(words)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Parameters
        ----------
        state : mapping
            Its rates take the place of those that were given.

        Raises
        ------
        StreamlineError
            If it is of a model with another number of blocks, or of something else.
        """
        try:
            rates = [float(rate) for rate in state["rates"]]
            version, words = state["random"]
            drawing = random.Random()
            drawing.setstate((version, tuple(words), None))
        except (KeyError, TypeError, ValueError) as error:
            raise StreamlineError(
                f"This is no state of a StochasticDepth: {type(error).__name__}: {error}. Expected what its state_dict "
                "gives."
            ) from error
        if len(rates) != len(self.stack):
            raise StreamlineError(
                f"This state has rates for {len(rates)} blocks; the model has {len(self.stack)}. Load the model of the "
                "same step."
            )
        self._set_rates(rates)
        self._random = drawing

    def _set_rates(self, rates: Sequence[float]) -> None:
        self._rates.update(zip(self.stack.blocks, rates, strict=True))

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._put_back()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._running is module:  # Ctrl-C in the forward before
            self._put_back()
        if self._running is not None or not module.training:
            return
        _refuse_traced(module)
        _refuse_cache(module, kwargs)
        if self._skipping.follow():
            self.stack = self._skipping.stack
        self.skipped = self._draw()
        self._running = module
        if self.skipped:
            self._skipping.leave_out(self.skipped)

    def _end(self, module: nn.Module, *given: Any) -> None:
        if self._running is module:
            self._put_back()

    def _put_back(self) -> None:
        if self._running is not None:
            self._skipping.put_back()
            self._running = None

    def _draw(self) -> tuple[int, ...]:
        rates = self.rates
        while True:
            drawn = tuple(k for k, rate in enumerate(rates) if self._random.random() < rate)
            if len(drawn) < len(rates):
                return drawn


def _refuse_traced(module: nn.Module) -> None:
    """Raise where a draw would be of no effect, or another one in the backward than in the forward."""
    if torch.compiler.is_compiling() or module._compiled_call_impl is not None:
        raise StreamlineError(
            f"{type(module).__name__} was compiled while its blocks are skipped at random: the blocks of one draw "
            "would be compiled in. Train it without torch.compile, or leave StochasticDepth away."
        )
    if torch._C._current_graph_task_id() != -1:
        raise StreamlineError(
            f"{type(module).__name__} runs inside a backward: a checkpoint around the whole model would run other "
            "blocks there than in the forward. Checkpoint each block (gradient_checkpointing_enable) instead."
        )


def _refuse_cache(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    given = [name for name in _CACHES if kwargs.get(name) is not None]
    if given:
        raise StreamlineError(
            f"{type(module).__name__} was given a cache ({given[0]}) in training mode: blocks that are skipped at "
            "random leave no keys in it, and its slots are those of other blocks in the next forward. Call "
            "model.eval() to generate."
        )


def _rates(rate: float | Sequence[float], rule: Rule | None, keep: Iterable[int], length: int) -> list[float]:
    """The probability with which each block is skipped."""
    if isinstance(rate, (int, float)):
        rates = [float(rate) if rule == "constant" else rate * (k + 1) / length for k in range(length)]
    else:
        rates = [float(value) for value in rate]
        if rule is not None:
            raise StreamlineError(f"rule={rule!r} says how one rate is given to the blocks; rate is a list. Leave one.")
        if len(rates) != length:
            raise StreamlineError(f"rate has {len(rates)} values; the stack has {length} blocks. Give one for each.")
    wrong = [value for value in ([rate] if isinstance(rate, (int, float)) else rates) if not 0 <= value < 1]
    if wrong:
        raise StreamlineError(
            f"A block cannot be skipped with the probability {wrong[0]}: expected 0 or more and below 1. What is to go "
            "in every forward is to be removed with LayerSurgeon."
        )
    for k in block_numbers(keep, length, "keep"):
        rates[k] = 0.0
    return rates

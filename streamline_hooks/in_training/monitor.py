"""Measure what each block does to the hidden state during training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.arguments import checked
from streamline_hooks.batch import mask_of_call
from streamline_hooks.distributed import here
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input, read_output, token_mask, write_input, write_output
from streamline_hooks.in_training.measurement import Measurement, MeasurementFile
from streamline_hooks.in_training.place_probes import PlaceProbes, device_of_block
from streamline_hooks.in_training.state_sums import ChangeSums, NormSums, norms_of, summed
from streamline_hooks.layouts import by_token
from streamline_hooks.read_hook import ChangeHook, OutermostCall, ReadHook, in_backward
from streamline_hooks.stack import find_stack, members
from streamline_hooks.wrapping import refuse_compiled, refuse_replicated, refuse_tensor_parallel


@runtime_checkable
class Log(Protocol):
    """What a monitor hands its values to: the ``log`` of accelerate and wandb, the ``log_metrics`` of Lightning."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> Any:
        """Take the values of a step."""


class HiddenStateMonitor:
    """Measure the hidden states of every N-th step of a training loop.

    Three calls put it into any loop: `open` before the first step (or ``with``), `step` after each optimiser step,
    `close` at the end. In a step that is measured each block's influence, change, norms, gradients and massive
    activations are summed over all of its forwards that build a graph, so that an evaluation in between does not
    count; in the others its hooks return at once. The model computes what it computes without: outputs and gradients
    are equal to the bit.

    It works under gradient checkpointing and accumulation, autocast, DDP and FSDP, and in a model that is compiled
    *after* it was opened (as a whole: a compiler that is given single blocks compiles the hooks of each anew, which
    ``fullgraph=True`` refuses). After a surgery between two steps it goes on with the blocks that are there then; where
    a step ran others than those that were watched, the next one is measured instead. Where several processes train,
    each with its own batches, the sums are those of all of them, and each must make the same calls.

    Parameters
    ----------
    model : torch.nn.Module
        The model that is trained, also one inside DDP or FSDP, but not compiled yet.
    every : int
        Measure steps 1, 1 + every, 1 + 2·every and so on.
    file : str or Path, optional
        JSON Lines, one `Measurement` a line; what is there already is kept. The first process writes it.
    log : callable, optional
        Called in the first process as ``log(values, step=step)`` with the numbers by name; see `Measurement.scalars`.
    tokens : {"real", "all"}
        Leave the padding out, by the mask that the model is called with, or count every token.
    gradients : bool
        Measure the gradients too. Each state is copied once for it.
    dead : float
        Up to which mean ‖leaving − entering‖/‖entering‖ a block counts as dead.
    group : torch.distributed.ProcessGroup, optional
        The processes that have batches of their own; all by default. Needed under tensor parallelism.
    stack : str, optional
        The path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If an argument is wrong, or the model has no stack of blocks.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=3).train()
    >>> optimizer, batch = torch.optim.AdamW(model.parameters()), tiny_inputs(model)
    >>> with HiddenStateMonitor(model, every=2) as monitor:
    ...     for _ in range(4):
    ...         loss = model(**batch, labels=batch["input_ids"]).loss
    ...         loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         measured = monitor.step()
    ...         print(None if measured is None else (measured.step, measured.tokens, len(measured.influence)))
    (1, 24, 3)
    None
    (3, 24, 3)
    None
    """

    @checked(every=1, dead=0)
    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        file: str | Path | None = None,
        log: Log | Callable[..., Any] | None = None,
        tokens: Literal["real", "all"] = "real",
        gradients: bool = True,
        dead: float = 1e-3,
        group: Any = None,
        stack: str | None = None,
    ) -> None:
        self.model, self.every, self.dead, self.group = model, every, dead, group
        self.stack = find_stack(model, stack)
        self.log = log
        self._file = None if file is None else MeasurementFile(file)
        self._heed_padding, self._with_gradients = tokens == "real", gradients
        self._handles: list[RemovableHandle] = []
        self._done = 0
        self._due = False  # whether the step that runs is measured
        self._counting = False  # whether its forward that runs is
        self._mask: Any = None
        self._call = OutermostCall()
        self._entered: list[Tensor | None] = []

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, done: int = 0) -> Self:
        """Register the hooks.

        Parameters
        ----------
        done : int
            Optimiser steps that were made before, where a training goes on.

        Returns
        -------
        HiddenStateMonitor
            Itself.

        Raises
        ------
        StreamlineError
            If it is open already, or the model is compiled, or its tensors are divided among processes and no group
            was given.
        """
        if self._handles:
            raise StreamlineError("This monitor is open already; close it first, or make a second one.")
        refuse_compiled(self.model, "monitor the hidden states of")
        refuse_replicated(self.model, "monitor the hidden states of")
        if self.group is None:
            refuse_tensor_parallel(self.model)
        self.stack = find_stack(self.model, self.stack.path)
        self._done, self._due = done, done % self.every == 0
        devices = [device_of_block(block) for block in self.stack.blocks]
        self._norms = [NormSums(device) for device in (devices[0], *devices)]
        self._changes = [ChangeSums(device) for device in devices]
        self._probes = PlaceProbes(self.stack)
        self._entered = [None] * len(self.stack)
        try:
            self._handles += self._call.hooks(self.stack.ancestors)
            for module in self.stack.ancestors:
                begin = ReadHook(module, partial(self._begin, module))
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            for k, block in enumerate(self.stack.blocks):
                enter, leave = ReadHook(block, partial(self._enter, k)), ReadHook(block, partial(self._leave, k))
                self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(block.register_forward_hook(leave))
                if self._with_gradients:
                    before = ChangeHook(block, partial(self._probe_input, k))
                    after = ChangeHook(block, partial(self._probe_output, k))
                    self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                    self._handles.append(block.register_forward_hook(after))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Take the hooks away; what was measured in a step that has not ended is forgotten."""
        while self._handles:
            self._handles.pop().remove()
        self._due = self._counting = False
        self._entered, self._mask = [], None

    def step(self, done: int | None = None, *, grad_scale: float = 1.0) -> Measurement | None:
        """Say that an optimiser step has been made.

        Parameters
        ----------
        done : int, optional
            Steps made so far, by the loop's own count; counted here by default.
        grad_scale : float
            What the loss was multiplied by, for instance by a ``GradScaler``: its ``get_scale()`` before the step.

        Returns
        -------
        Measurement or None
            Of a step that was measured.

        Raises
        ------
        StreamlineError
            If the monitor is not open, or if no block was called in a step that was to be measured.
        """
        if not self._handles:
            raise StreamlineError("The monitor is not open; use it in a with statement, or call open() first.")
        self._done = self._done + 1 if done is None else done
        now = members(self.stack.container)
        others = now != self.stack.blocks  # a surgery: what was block 7 may be 5 now
        postponed = self._due and others and self._ran_others(now)
        found = self._measured(grad_scale) if self._due and not postponed else None
        if others:
            self.close()
            self.open(self._done)
        self._due = postponed or self._done % self.every == 0
        if found is not None and here().rank == 0:
            if self._file is not None:
                self._file.append(found)
            if self.log is not None:
                self.log(found.scalars(), step=found.step)
        return found

    def _ran_others(self, now: tuple[nn.Module, ...]) -> bool:
        """Whether the step that ends ran other blocks than those that are watched."""
        gone = [k for k, block in enumerate(self.stack.blocks) if block not in now]
        new = any(block not in self.stack.blocks for block in now)
        return new or any(not self._changes[k].added[0] for k in gone)

    def _measured(self, grad_scale: float) -> Measurement:
        squares = self._probes.take()
        about = {"step": self._done, "grad_scale": grad_scale, "dead": self.dead, "group": self.group}
        found = summed(self._norms, self._changes, squares, **about)
        for norms in self._norms:
            norms.zero()
        for changes in self._changes:
            changes.zero()
        return found

    def _begin(self, watched: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outermost = self._call.begins(watched)
        if not self._due:
            return
        # Asked here and not at the blocks, which one kind of gradient checkpointing runs without a graph at first.
        self._counting = torch.is_grad_enabled()
        self._probes.begin()
        if outermost:
            self._mask = None
        if self._heed_padding:
            self._mask = mask_of_call(watched, args, kwargs, self._mask)

    def _enter(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._due and self._counting:
            with torch.no_grad():
                # A copy: some blocks work on their input in place.
                state = read_input(args, kwargs, self.stack[k])
                self._entered[k] = self._tokens_of(k, state).to(torch.float32, copy=True)

    def _leave(self, k: int, args: tuple[Any, ...], output: Any) -> None:
        entering = self._entered[k] if self._due and self._counting else None
        if entering is None:
            return
        self._entered[k] = None
        with torch.no_grad():
            leaving = self._tokens_of(k, read_output(output)).to(torch.float32)
            real = token_mask(leaving, self._real(leaving))
            if k == 0:
                self._norms[0].update(norms_of(entering), real)
            self._norms[k + 1].update(norms_of(leaving), real)
            self._changes[k].update(entering, leaving, real)

    def _probe_input(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._probing():
            return None
        state = read_input(args, kwargs, self.stack[k])
        probed = self._probes.enter(k, state)
        return None if probed is state else write_input(args, kwargs, probed, self.stack[k])

    def _probe_output(self, k: int, args: tuple[Any, ...], output: Any) -> Any:
        if not self._probing():
            return None
        state = read_output(output)
        probed = self._probes.leave(k, state)
        return None if probed is state else write_output(output, probed)

    def _probing(self) -> bool:
        # A block that is run again in a backward is of a forward that counted, whatever was called since.
        return self._due and (self._counting or in_backward())

    def _tokens_of(self, k: int, state: Tensor) -> Tensor:
        return by_token(state.detach(), self.stack[k])

    def _real(self, state: Tensor) -> Tensor | None:
        mask = self._mask
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            return None if mask is None else mask[:, -state.shape[1] :]
        raise StreamlineError(
            "The padding is left out by a mask of shape (batch, tokens); the model was called with "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. Give tokens='all' to count "
            "every token."
        )

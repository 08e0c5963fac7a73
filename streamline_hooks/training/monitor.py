"""Measure how each block changes the hidden state during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import (
    Bound,
    Config,
    StreamlineError,
    current_processes,
    forget_compiled_graphs,
    padding_mask_of_call,
    refuse_compiled,
    refuse_replicated,
    refuse_tensor_parallel,
    validate_arguments,
    widest_float,
)
from streamline_hooks.modeling import (
    ChangeHook,
    OutermostCall,
    ReadHook,
    by_token,
    find_stack,
    in_backward,
    modules_of,
    read_input,
    read_output,
    token_mask,
    write_input,
    write_output,
)
from streamline_hooks.training.gradient_probes import BoundaryProbes, device_of_block
from streamline_hooks.training.measurement import (
    Measurement,
    MeasurementFile,
    NormSums,
    change_sums,
    norms_of,
    reduce_sums,
)


@dataclass(frozen=True)
class MonitorConfig(Config):
    """Quantities that a `HiddenStateMonitor` measures.

    Attributes
    ----------
    tokens : {"real", "all"}
        "real" (default) excludes padding according to the attention mask of the call; "all" counts all tokens.
    gradients : bool
        Whether to measure gradients, which copies each state once. True by default.
    dead : float
        A block is dead if its mean relative change ‖leaving − entering‖/‖entering‖ is at most this value. 0.001 by
        default.

    Examples
    --------
    >>> from streamline_hooks.training import MonitorConfig
    >>> MonitorConfig(gradients=False).tokens
    'real'
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"dead": 0}

    tokens: Literal["real", "all"] = "real"
    gradients: bool = True
    dead: float = 1e-3


class HiddenStateMonitor:
    """Measure the hidden states of every N-th step of a training loop.

    Call `open` before the first step (or use a ``with`` statement), `step` after each optimizer step, and `close` at
    the end. In a measured step the cosine, change, norms, gradients and massive activations of each block are
    accumulated over all forwards with gradients; evaluations without gradients are not counted. In other steps the
    hooks return immediately. Outputs and gradients of the model do not change by a single bit.

    The monitor works with gradient checkpointing and accumulation, autocast, DDP and FSDP, and with a model that is
    compiled *after* `open`. Compile the whole model: blocks that are compiled one by one recompile for the hooks of
    each block, which ``fullgraph=True`` refuses. After a surgery between two steps the remaining blocks are measured;
    if a step ran other blocks than the watched ones, the next step is measured instead. In a distributed run the sums
    cover all ranks, and each rank must make the same calls.

    Parameters
    ----------
    model : torch.nn.Module
        The model to train; it may be wrapped in DDP or FSDP, but must not be compiled yet.
    every : int
        Measure steps 1, 1 + every, 1 + 2·every and so on.
    file : str or Path, optional
        JSON Lines file to which rank 0 appends each `Measurement`.
    log : callable, optional
        Called on rank 0 as ``log(values, step=step)`` with `Measurement.scalars`. The ``log`` of Accelerate and wandb
        and the ``log_metrics`` of Lightning have this signature.
    config : MonitorConfig, optional
        What is measured. By default real tokens, with gradients.
    group : torch.distributed.ProcessGroup, optional
        The ranks with different batches. Default: all ranks. Required under tensor parallelism.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If an argument is invalid, or the model has no stack of blocks.

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

    @validate_arguments(every=1)
    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        file: str | Path | None = None,
        log: Callable[..., Any] | None = None,
        config: MonitorConfig | None = None,
        group: Any = None,
        stack: str | None = None,
    ) -> None:
        self.model, self.every, self.group = model, every, group
        self.config = config or MonitorConfig()
        self.stack = find_stack(model, stack)
        self.log = log
        self._file = None if file is None else MeasurementFile(file)
        self._handles: list[RemovableHandle] = []
        self._done = 0
        self._due = False  # whether the current step is measured
        self._counting = False  # whether the current forward is measured
        self._mask: Any = None
        self._call = OutermostCall()
        self._entered: list[Tensor | None] = []

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, done: int = 0) -> Self:
        """Register the hooks.

        Parameters
        ----------
        done : int
            Number of optimizer steps so far, if training is resumed.

        Returns
        -------
        HiddenStateMonitor

        Raises
        ------
        StreamlineError
            If the monitor is already open, the model is compiled, or the tensors of the model are divided among ranks
            and no group was given.
        """
        if self._handles:
            raise StreamlineError("This monitor is already open. Call close() first, or create a second monitor.")
        refuse_compiled(self.model, "monitor the hidden states of")
        refuse_replicated(self.model, "monitor the hidden states of")
        if self.group is None:
            refuse_tensor_parallel(self.model)
        self.stack = find_stack(self.model, self.stack.path)
        self._done, self._due = done, done % self.every == 0
        devices = [device_of_block(block) for block in self.stack.blocks]
        self._norms = [NormSums(device) for device in (devices[0], *devices)]
        self._changes = [torch.zeros(3, dtype=widest_float(device), device=device) for device in devices]
        self._probes = BoundaryProbes(self.stack)
        self._entered = [None] * len(self.stack)
        try:
            self._handles += self._call.hooks(self.stack.ancestors)
            for module in self.stack.ancestors:
                begin = ReadHook(module, partial(self._begin, module))
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            for k, block in enumerate(self.stack.blocks):
                enter, leave = ChangeHook(block, partial(self._enter, k)), ChangeHook(block, partial(self._leave, k))
                self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(block.register_forward_hook(leave))
            forget_compiled_graphs()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Remove the hooks, and discard the sums of an unfinished step."""
        while self._handles:
            self._handles.pop().remove()
        self._due = self._counting = False
        self._entered, self._mask = [], None

    def step(self, done: int | None = None, *, grad_scale: float = 1.0) -> Measurement | None:
        """Finish an optimizer step.

        Parameters
        ----------
        done : int, optional
            Number of optimizer steps so far. Default: counted by the monitor.
        grad_scale : float
            Factor of the loss, for example ``get_scale()`` of a ``GradScaler`` before the step.

        Returns
        -------
        Measurement or None
            None if the step was not measured.

        Raises
        ------
        StreamlineError
            If the monitor is not open, or no forward ran the blocks in a step to measure.
        """
        if not self._handles:
            raise StreamlineError("This monitor is not open. Use a with statement, or call open() first.")
        self._done = self._done + 1 if done is None else done
        blocks = modules_of(self.stack.container)
        has_changed = blocks != self.stack.blocks  # after a surgery block 7 may be block 5
        postponed = self._due and has_changed and self._ran_unwatched(blocks)
        measured = self._measured(grad_scale) if self._due and not postponed else None
        if has_changed:
            self.close()
            self.open(self._done)
        self._due = postponed or self._done % self.every == 0
        if measured is not None and current_processes().rank == 0:
            if self._file is not None:
                self._file.append(measured)
            if self.log is not None:
                self.log(measured.scalars(), step=measured.step)
        return measured

    def _ran_unwatched(self, blocks: tuple[nn.Module, ...]) -> bool:
        """Whether the current step ran other blocks than the watched ones."""
        removed = [k for k, block in enumerate(self.stack.blocks) if block not in blocks]
        is_extended = any(block not in self.stack.blocks for block in blocks)
        return is_extended or any(not self._changes[k][0] for k in removed)

    def _measured(self, grad_scale: float) -> Measurement:
        options = {"step": self._done, "grad_scale": grad_scale, "dead": self.config.dead, "group": self.group}
        measured = reduce_sums(self._norms, self._changes, self._probes.pop(), **options)
        for sums in self._norms:
            for tensor in (sums.added, sums.largest, sums.histogram):
                tensor.zero_()
        for change in self._changes:
            change.zero_()
        return measured

    def _begin(self, watched: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outermost = self._call.begins(watched)
        if not self._due:
            return
        # Reentrant gradient checkpointing first runs the blocks without gradients, so the outer model decides.
        self._counting = torch.is_grad_enabled()
        self._probes.begin()
        if outermost:
            self._mask = None
        if self.config.tokens == "real":
            self._mask = padding_mask_of_call(watched, args, kwargs, self._mask)

    def _enter(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recomputed = self._is_recomputed()
        if not (self._due and (self._counting or recomputed)):
            return None
        state = read_input(args, kwargs, self.stack[k])
        if not recomputed:
            with torch.no_grad():
                # A copy, because some blocks modify their input in place.
                self._entered[k] = by_token(state.detach(), self.stack[k]).to(torch.float32, copy=True)
        probed = self._probes.enter(k, state, recomputed) if self.config.gradients else state
        return None if probed is state else write_input(args, kwargs, probed, self.stack[k])

    def _leave(self, k: int, args: tuple[Any, ...], output: Any) -> Any:
        recomputed = self._is_recomputed()
        if not (self._due and (self._counting or recomputed)):
            return None
        state, entering = read_output(output), None if recomputed else self._entered[k]
        if entering is not None:
            self._entered[k] = None
            with torch.no_grad():
                leaving = by_token(state.detach(), self.stack[k]).to(torch.float32)
                real = token_mask(leaving, self._real(leaving))
                if k == 0:
                    self._norms[0].update(norms_of(entering), real)
                self._norms[k + 1].update(norms_of(leaving), real)
                self._changes[k].add_(change_sums(entering, leaving, real))
        probed = self._probes.leave(k, state, recomputed) if self.config.gradients else state
        return None if probed is state else write_output(output, probed)

    def _is_recomputed(self) -> bool:
        """Whether gradient checkpointing runs a block again, in the backward of a measured forward."""
        return in_backward() or not self._call.is_running

    def _real(self, state: Tensor) -> Tensor | None:
        mask = self._mask
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            return None if mask is None else mask[:, -state.shape[1] :]
        raise StreamlineError(
            f"The model was called with a mask of {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask)}. "
            "Expected the shape (batch, tokens) to exclude padding. Give tokens='all' to count all tokens."
        )

"""Remove blocks from a model at given steps of a training run, and record the removals in the model's history."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    describe_blocks,
    refuse_compiled,
    refuse_wrapped,
    validate_arguments,
)
from streamline_hooks.modeling import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon, SurgeryPlan, checked_window, saved_model_depth
from streamline_hooks.surgery import committed_surgeries as plain_history

RemovalWindow = range | Callable[[nn.Module], range]
"""A window numbered as at the start of training, or a function that returns a window in the current numbering."""

_NOTE = "progressive_removal"
_FIRST = "first_since_the_start_of"  # names of the runs that started just before this surgery


@dataclass(frozen=True)
class Removal:
    """A removal of blocks during a training run.

    Attributes
    ----------
    step : int
        The optimizer step after which the blocks were removed.
    blocks : tuple of int or None
        The removed blocks, numbered as at the start of training; None for a block that was inserted later.
    plan : SurgeryPlan
        The surgery, in the numbering just before the removal.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> removal = ProgressiveRemoval(tiny_model("llama", blocks=6), {1: range(1, 2)}).step(1)
    >>> removal.step, removal.blocks, removal.plan.removed
    (1, (1,), (1,))
    """

    step: int
    blocks: tuple[int | None, ...]
    plan: SurgeryPlan


class ProgressiveRemoval:
    """Remove windows of blocks permanently at given steps of a training run.

    Each removal is a committed `LayerSurgeon`: the model is changed in place and saved as the shorter model. The
    optimizer keeps the remaining parameters and their state.

    Parameters
    ----------
    model : torch.nn.Module
        The model to train, neither compiled nor wrapped. Under DDP or FSDP, unwrap the model, call `step`, and wrap the
        model again; the old wrapper would still use the removed parameters.
    schedule : mapping of int to range or callable
        The window to remove after each optimizer step, counted from 1. A range is numbered as at the start of training
        (when this object was created, unless training is resumed), regardless of later surgeries. A function receives
        the model and returns a window in the current numbering.
    optimizer : torch.optim.Optimizer, optional
        Optimizer from which to drop the removed parameters; may be wrapped by Accelerate. Default: no optimizer is
        changed.
    run : str
        Name of the training run. It is stored in the model's configuration with each removal, and at the first `step`
        after another surgery, so that a resumed run recognizes its start and its removals.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the model is compiled or wrapped, the schedule does not fit the model, or the optimizer has none of its
        parameters.
    UnsupportedSurgery
        If a range of the schedule cannot be removed or committed. All ranges are tried when the object is created.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=6).train()
    >>> optimizer, inputs = torch.optim.AdamW(model.parameters()), tiny_inputs(model)
    >>> removal = ProgressiveRemoval(model, {1: range(1, 2), 3: range(3, 5)}, optimizer)
    >>> for step in range(1, 5):
    ...     model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ...     optimizer.step()
    ...     done = removal.step(step)
    ...     print(len(model.model.layers), done.blocks if done else "")
    ...     optimizer.zero_grad()
    5 (1,)
    5
    3 (3, 4)
    3
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        schedule: Mapping[int, RemovalWindow],
        optimizer: Optimizer | None = None,
        *,
        run: str = "training",
        stack: str | None = None,
    ) -> None:
        refuse_compiled(model, "remove blocks of")
        try:
            refuse_wrapped(model)
        except StreamlineError as error:
            raise StreamlineError(
                f"{error} During training: unwrap the model, call step, and wrap the model again."
            ) from None
        self.model, self.optimizer, self.run = model, optimizer, run
        block_stack = find_stack(model, stack)
        self._stack_path, history = block_stack.path, _history_of(block_stack)
        self._start = _start_of(history, run)  # number of surgeries committed before
        self._resumed = self._start < len(history)
        self._length: int = history[self._start]["old_length"] if self._resumed else len(block_stack)
        self._follow()
        self._done = [
            Removal(entry[_NOTE]["step"], tuple(entry[_NOTE]["blocks"]), SurgeryPlan.from_dict(entry))
            for entry in history
            if _belongs_to_run(entry, run)
        ]
        self._at: int | None = None
        if not schedule:
            raise StreamlineError(
                "The schedule is empty. Expected a window for at least one optimizer step, such as {100: range(3, 5)}."
            )
        self.schedule: dict[int, RemovalWindow] = {}
        for step in sorted(map(operator.index, schedule)):
            if step < 1:
                raise StreamlineError(f"The schedule has step {step}. Expected steps >= 1: steps are counted from 1.")
            window = schedule[step]
            self.schedule[step] = window if callable(window) else checked_window(window, self._length)
        parameters = set(model.parameters())
        if optimizer is not None and not any(
            p in parameters for group in optimizer.param_groups for p in group["params"]
        ):
            raise StreamlineError(
                f"This {type(optimizer).__name__} has no parameter of this {type(model).__name__}: it belongs to "
                "another model, or updates copies of the parameters (DeepSpeed, master weights). Create the optimizer "
                "from the parameters of this model."
            )
        self._try_windows()

    @property
    def done(self) -> tuple[Removal, ...]:
        """Return the removals of this training run so far, including those before it was resumed."""
        return tuple(self._done)

    def resume(self, steps: int) -> None:
        """Set the number of optimizer steps so far; by default the first `step` infers it.

        Parameters
        ----------
        steps : int
            0 at the start of training.

        Raises
        ------
        StreamlineError
            If the model does not belong to this step: an earlier removal is missing, a later removal was already made,
            or `steps` is 0 and the model was changed since the start of training.
        """
        steps = operator.index(steps)
        past = {step: window for step, window in self.schedule.items() if step <= steps}
        removals = {removal.step: removal for removal in self._done}
        for step, window in past.items():
            if step not in removals:
                raise StreamlineError(
                    f"{steps} steps are done, and the schedule removes blocks after step {step}, but this "
                    f"{type(self.model).__name__} of {len(self._numbers)} blocks has no record of this removal. "
                    "Expected the model of the checkpoint: weights of a shortened model in a model with all blocks end "
                    "up in the wrong blocks. Load it with from_pretrained(checkpoint). Save a module without a "
                    "configuration with streamline_hooks.save and load it with load(folder, into=...), which keep the "
                    "record; or give a schedule of the remaining removals in the current numbering, and count the "
                    "steps from here."
                )
            if isinstance(window, range) and removals[step].blocks != tuple(window):
                raise StreamlineError(
                    f"According to the record of this model, the blocks {_listed(removals[step].blocks)} were removed "
                    f"after step {step} of {self.run!r}; the schedule removes {_listed(window)}. Give the schedule "
                    "with which the training run was started."
                )
        early = sorted(set(removals) - set(past))
        if early or (self._resumed and not steps):
            lost = f"lost the blocks scheduled after step {early[0]}" if early else "was changed since the start"
            raise StreamlineError(
                f"{steps} steps are done, but according to its record this model already {lost} of {self.run!r}. "
                "Expected the model of the checkpoint that has this step count. Load that model with from_pretrained, "
                "or give a new training run another name: run=..."
            )
        self._at = steps

    def step(self, n: int) -> Removal | None:
        """Remove the window scheduled after an optimizer step. Call this after each step.

        Parameters
        ----------
        n : int
            Number of optimizer steps so far, 1 after the first step.

        Returns
        -------
        Removal or None
            None if no removal is scheduled after this step.

        Raises
        ------
        StreamlineError
            If `n` is not larger than in the previous call, if a removal was skipped, or if the model is wrapped,
            compiled, inside an open surgeon or does not belong to this step (see `resume`).
        UnsupportedSurgery
            If the window cannot be removed or committed. The model and the optimizer are then unchanged.
        """
        n = operator.index(n)
        if self._at is None:
            self.resume(n - 1)
        self._marked_history(find_stack(self.model, self._stack_path))
        assert self._at is not None
        if n <= self._at:
            raise StreamlineError(
                f"step({n}) was called after step({self._at}). Expected the number of optimizer steps so far, which "
                "increases. Create a new ProgressiveRemoval for a new training run."
            )
        missed = [step for step in self.schedule if self._at < step < n]
        if missed:
            raise StreamlineError(
                f"step({n}) was called after step({self._at}), which skips the removal scheduled after step "
                f"{missed[0]}. Expected a call after each optimizer step. Call step() in every iteration."
            )
        removed = self._remove(n, self.schedule[n]) if n in self.schedule else None
        self._at = n
        return removed

    def _follow(self) -> None:
        """Map each current block to its number at the start of training, from all committed surgeries."""
        stack = find_stack(self.model, self._stack_path)
        self._numbers: list[int | None] = list(range(self._length))
        for plan in map(SurgeryPlan.from_dict, self._marked_history(stack)[self._start :]):
            _require_length(self._numbers, plan.old_length)
            self._numbers = [None if slot.source is None else self._numbers[slot.source] for slot in plan.slots]
        _require_length(self._numbers, len(stack))

    def _marked_history(self, stack: BlockStack) -> list[dict[str, Any]]:
        """Return the committed surgeries, and mark the first surgery since the start with the name of the run."""
        history = _history_of(stack)
        if self._start < _start_of(history, self.run):
            first = history[self._start]
            first[_FIRST] = [*first.get(_FIRST, ()), self.run]
        return history

    def _remove(self, n: int, window: RemovalWindow) -> Removal:
        self._follow()
        present = self._present(window) if isinstance(window, range) else window(self.model)
        chosen = checked_window(present, len(self._numbers))
        before = _names(self.model)
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            surgeon.remove(chosen)
            self._refuse_new_parameters(before)
            note: dict[str, Any] = {"run": self.run, "step": n, "blocks": [self._numbers[k] for k in chosen]}
            removal = Removal(n, tuple(note["blocks"]), surgeon.commit(**{_NOTE: note}))
        self._done.append(removal)
        if self.optimizer is not None:
            left = _names(self.model)
            drop_parameters(self.optimizer, [parameter for parameter in before if parameter not in left])
            _rename_parameters(self.optimizer, before, left)
        return removal

    def _present(self, window: range) -> list[int]:
        """Return the current numbers of the blocks of a window."""
        removed = [k for k in window if k not in self._numbers]
        if removed:
            raise StreamlineError(
                f"Cannot remove blocks {_listed(window)} (numbered as at the start of training): {_listed(removed)} "
                "were already removed, by hand or by an earlier entry of the schedule. Give disjoint windows."
            )
        return [self._numbers.index(k) for k in window]

    def _try_windows(self) -> None:
        """Remove all remaining windows of the schedule in order, and restore the model."""
        completed_steps = {removal.step for removal in self._done}
        before = list(self.model.parameters())
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            for step, window in self.schedule.items():
                if step in completed_steps or not isinstance(window, range):
                    continue
                present = self._present(window)
                hazards = surgeon.check(present)
                if hazards:
                    raise UnsupportedSurgery(
                        f"{describe_blocks(window).capitalize()} cannot be removed: {'; '.join(map(str, hazards))}. "
                        "Choose other blocks.",
                        hazards[0].cause,
                    )
                surgeon.remove(present)
                self._refuse_new_parameters(before)

    def _refuse_new_parameters(self, before: Collection[nn.Parameter]) -> None:
        known = set(before)
        new = [name for name, parameter in self.model.named_parameters() if parameter not in known]
        if new and self.optimizer is not None:
            raise UnsupportedSurgery(
                f"Blocks of {type(self.model).__name__} cannot be removed during training: {' and '.join(new)} would "
                "become new parameters without the parts of these blocks, and the optimizer does not have them. Remove "
                "the blocks before training.",
                "per-layer-embeddings",
            )


def drop_parameters(optimizer: Optimizer, removed: Collection[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimizer and from the optimizers that it wraps.

    Empty parameter groups are kept, because learning-rate schedules count the groups. Parameter names stay aligned.
    """
    removed_set = set(removed)
    for inner in _wrapped_optimizers(optimizer):
        for group in inner.param_groups:
            left = [k for k, parameter in enumerate(group["params"]) if parameter not in removed_set]
            for key in {"params", "param_names"} & set(group):
                group[key][:] = [group[key][k] for k in left]
        for parameter in removed_set:
            inner.state.pop(parameter, None)


def _rename_parameters(
    optimizer: Optimizer, before: Mapping[nn.Parameter, str], now: Mapping[nn.Parameter, str]
) -> None:
    """Update the parameter names stored in an optimizer, if any; prefixes of wrappers are kept."""
    for inner in _wrapped_optimizers(optimizer):
        for group in inner.param_groups:
            names: list[str] = group.get("param_names", [])
            for k, (parameter, name) in enumerate(zip(group["params"], names, strict=False)):
                old = before.get(parameter)
                if old is not None and parameter in now and name.endswith(old):
                    names[k] = name.removesuffix(old) + now[parameter]


def _wrapped_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer, and the optimizers that it wraps."""
    inner: object = optimizer
    while isinstance(inner, Optimizer):
        yield inner
        inner = getattr(inner, "optimizer", None)


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _listed(blocks: Iterable[int | None]) -> str:
    return ", ".join("new" if k is None else str(k) for k in blocks)


def _history_of(stack: BlockStack) -> list[dict[str, Any]]:
    """Return the surgeries committed on a stack, from the model's configuration or from a plain module."""
    depth = saved_model_depth(stack)
    if depth is None:
        history = plain_history(stack.model)
    else:
        model: Any = stack.ancestors[depth]
        history = (getattr(getattr(model, "config", None), "streamline_hooks", None) or {}).get("history", [])
    return [entry for entry in history if _same_stack(entry["stack"], stack.path)]


def _same_stack(path: str, other: str) -> bool:
    """Whether two paths, relative to different ancestors, name the same stack."""
    return f".{path}".endswith(f".{other}") or f".{other}".endswith(f".{path}")


def _start_of(history: Sequence[dict[str, Any]], run: str) -> int:
    """Return the number of surgeries committed before a training run; all if the run is not recorded."""
    return next(
        (k for k, entry in enumerate(history) if _belongs_to_run(entry, run) or run in entry.get(_FIRST, ())),
        len(history),
    )


def _belongs_to_run(entry: dict[str, Any], run: str) -> bool:
    return bool((entry.get(_NOTE) or {}).get("run") == run)


def _require_length(numbers: Sequence[int | None], present: int) -> None:
    if len(numbers) != present:
        raise StreamlineError(
            f"According to the surgeries committed since the start of training this model has {len(numbers)} blocks, "
            f"but {present} were found. Change blocks only with LayerSurgeon and commit() on the model given to "
            "ProgressiveRemoval, and load a shortened model with from_pretrained(checkpoint)."
        )

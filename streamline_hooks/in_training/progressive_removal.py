"""Remove blocks from a model at given steps of a training run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.in_training.removal_record import (
    NOTE,
    Removal,
    history_of,
    numbers_at_start,
    remember_start,
    removals_in,
    start_of,
)
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.layout import window_of
from streamline_hooks.surgery.saving import saver_depth
from streamline_hooks.wrapping import refuse_compiled, refuse_wrapped

Window = range | Callable[[nn.Module], range]
"""A window in the numbering when the training started, or a function that chooses one in the model's present one."""


class ProgressiveRemoval:
    """Remove windows of blocks for good at given steps of a training.

    Each removal is one of `LayerSurgeon`, committed: what is left trains on in place, and is saved as the shorter model
    that it is. The optimiser goes on with the parameters that are left and with all that it kept for them.

    Parameters
    ----------
    model : torch.nn.Module
        Neither compiled nor wrapped. Under DDP or FSDP call `step` on the model itself between unwrapping it and
        wrapping it again; a wrapper that is left around it goes on with the parameters that are gone.
    schedule : mapping of int to range or callable
        By the optimiser step, counted from 1, after which it is due: a window in the model's numbering as it was when
        the training started (when this object was made, unless it is resumed), whatever was committed since, whoever
        did; or a function that is given the model and gives a window in its present numbering.
    optimizer : torch.optim.Optimizer, optional
        From which the parameters that are gone are taken; also one of accelerate. Without it nothing is done about
        optimisers.
    run : str
        A name for the training, which is kept in the model's configuration with each removal, and with the first
        surgery by another hand since the start, at the next `step`: by it a training that is resumed knows its own
        start and removals from those of an earlier one.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the model is compiled or wrapped, the schedule does not fit it, or the optimiser holds none of its
        parameters.
    UnsupportedSurgery
        If a window that is given as a range cannot be removed or committed: at once, and not when it is due.

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

    @checked()
    def __init__(
        self,
        model: nn.Module,
        schedule: Mapping[int, Window],
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
                f"{error} In the middle of a training: unwrap it, call step, wrap it again."
            ) from None
        self.model, self.optimizer, self.run = model, optimizer, run
        found = find_stack(model, stack)
        self._stack_path, history = found.path, history_of(found)
        self._start = start_of(history, run)  # how many surgeries were committed before
        self._goes_on = self._start < len(history)
        self._length: int = history[self._start]["old_length"] if self._goes_on else len(found)
        self._follow()
        self._done = removals_in(history, run)
        self._at: int | None = None
        self.schedule = _checked(schedule, self._length)
        if optimizer is not None:
            require_own_parameters(optimizer, model)
        self._require_possible()

    @property
    def done(self) -> tuple[Removal, ...]:
        """The removals of this training so far, those before it was resumed included."""
        return tuple(self._done)

    def resume(self, steps: int) -> None:
        """Say how many optimiser steps were done; the first `step` says it where nobody does.

        Parameters
        ----------
        steps : int
            0 at the start of a training.

        Raises
        ------
        StreamlineError
            If the model is not the one of that step: a removal that is past was not done to it, or one that is to
            come was, or no step is done and it was changed since the training's start.
        """
        steps = operator.index(steps)
        past = {step: window for step, window in self.schedule.items() if step <= steps}
        made = {removal.step: removal for removal in self._done}
        for step, window in past.items():
            if step not in made:
                raise StreamlineError(self._not_done(step, steps))
            if isinstance(window, range) and made[step].blocks != tuple(window):
                raise StreamlineError(
                    f"After step {step} of {self.run!r} the blocks {_listed(made[step].blocks)} were removed from this "
                    f"model, by its own record; the schedule says {_listed(window)}. Give the schedule that the "
                    "training was started with."
                )
        early = sorted(set(made) - set(past))
        if early or (self._goes_on and not steps):
            lost = f"lost what was removed after step {early[0]}" if early else "was changed since the start"
            raise StreamlineError(
                f"{steps} steps are done, but by its own record this model already {lost} of {self.run!r}. Load the "
                "model of the same checkpoint as the step count, with the schedule that the training was started with. "
                "Where that was an earlier training, give this one another name: run=..."
            )
        self._at = steps

    def step(self, n: int) -> Removal | None:
        """Carry out what is due after an optimiser step. Call it after each.

        Parameters
        ----------
        n : int
            The number of optimiser steps so far, 1 after the first.

        Returns
        -------
        Removal or None
            What was removed, None where nothing was due.

        Raises
        ------
        StreamlineError
            If the step is not behind the one before, if a removal was due in between, or if the model is wrapped,
            compiled, inside an open surgeon or not the one of this step (see `resume`).
        UnsupportedSurgery
            If the window cannot be removed or committed. The model and the optimiser are as before then.
        """
        n = operator.index(n)
        if self._at is None:
            self.resume(n - 1)
        self._said(find_stack(self.model, self._stack_path))
        assert self._at is not None
        if n <= self._at:
            raise StreamlineError(
                f"step({n}) after step({self._at}): expected the number of optimiser steps so far, which grows. Make a "
                "new ProgressiveRemoval for a training that starts again."
            )
        missed = [step for step in self.schedule if self._at < step < n]
        if missed:
            raise StreamlineError(
                f"step({n}) after step({self._at}) passes over step {missed[0]}, when a removal was due. Call it after "
                "each optimiser step."
            )
        removed = self._carry_out(n, self.schedule[n]) if n in self.schedule else None
        self._at = n
        return removed

    def _follow(self) -> None:
        """Read what the blocks that are there now were called at the start, whoever removed others meanwhile."""
        stack = find_stack(self.model, self._stack_path)
        self._numbers = numbers_at_start(self._said(stack)[self._start :], self._length, len(stack))

    def _said(self, stack: BlockStack) -> list[dict[str, Any]]:
        """What was committed so far, in which the start is marked from now on."""
        history = history_of(stack)
        remember_start(history, self._start, self.run)
        return history

    def _carry_out(self, n: int, window: Window) -> Removal:
        self._follow()
        present = self._present(window) if isinstance(window, range) else window(self.model)
        chosen = window_of(present, len(self._numbers))
        before = _names(self.model)
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            surgeon.remove(chosen)
            self._refuse_new_parameters(before)
            note: dict[str, Any] = {"run": self.run, "step": n, "blocks": [self._numbers[k] for k in chosen]}
            removal = Removal(n, tuple(note["blocks"]), surgeon.commit(**{NOTE: note}))
        self._done.append(removal)
        if self.optimizer is not None:
            left = _names(self.model)
            drop_parameters(self.optimizer, [parameter for parameter in before if parameter not in left])
            rename_parameters(self.optimizer, before, left)
        return removal

    def _present(self, window: range) -> list[int]:
        """Where the blocks of a window are now."""
        gone = [k for k in window if k not in self._numbers]
        if gone:
            raise StreamlineError(
                f"Blocks {_listed(window)} of the start cannot go: {_listed(gone)} went already, by somebody's "
                "hand or by a function of the schedule. Give windows that do not overlap."
            )
        return [self._numbers.index(k) for k in window]

    def _require_possible(self) -> None:
        """Remove every window that is still to come, in order, and take it back."""
        made = {removal.step for removal in self._done}
        to_come = [window for step, window in self.schedule.items() if isinstance(window, range) and step not in made]
        before = list(self.model.parameters())
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            for window in to_come:
                present = self._present(window)
                hazards = surgeon.check(present)
                if hazards:
                    raise UnsupportedSurgery(
                        f"Blocks {_listed(window)} cannot go: {'; '.join(map(str, hazards))}. Choose others.",
                        hazards[0].cause,
                    )
                surgeon.remove(present)
                self._refuse_new_parameters(before)

    def _refuse_new_parameters(self, before: Iterable[nn.Parameter]) -> None:
        own = {id(parameter) for parameter in before}
        new = [name for name, parameter in self.model.named_parameters() if id(parameter) not in own]
        if new and self.optimizer is not None:
            raise UnsupportedSurgery(
                f"Blocks of {type(self.model).__name__} cannot go while it trains: {' and '.join(new)} would be new "
                "parameters without the parts of those blocks, unknown to the optimiser. Remove them before the "
                "training.",
                "per-layer-embeddings",
            )

    def _not_done(self, step: int, steps: int) -> str:
        what = f"{steps} steps are done, and after step {step} blocks were to go, but this"
        if saver_depth(find_stack(self.model, self._stack_path)) is None:
            return (
                f"{what} {type(self.model).__name__} of {len(self._numbers)} blocks does not carry that they did. Save "
                "it with streamline_hooks.save and load it with load(folder, into=...), which keep what was done; or "
                "give a schedule of what is still to come, in the present numbering, and count the steps from here."
            )
        return (
            f"{what} model of {len(self._numbers)} blocks does not say in its configuration that they did. Weights of "
            "a shortened model that are loaded into one with all blocks end up in the wrong ones: load the "
            "checkpoint's own model, with from_pretrained(checkpoint). Call step after each optimiser step."
        )


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _checked(schedule: Mapping[int, Window], length: int) -> dict[int, Window]:
    """The schedule by growing steps, once it is sure that it can be."""
    checked: dict[int, Window] = {}
    for step in sorted(map(operator.index, schedule)):
        window = schedule[step]
        if step < 1:
            raise StreamlineError(f"The schedule has step {step}; optimiser steps are counted from 1.")
        if callable(window):
            checked[step] = window
            continue
        checked[step] = window_of(window, length)
    if not checked:
        raise StreamlineError("The schedule is empty; give a window for an optimiser step, such as {100: range(3, 5)}.")
    return checked


def _listed(blocks: Iterable[int | None]) -> str:
    return ", ".join("new" if k is None else str(k) for k in blocks)


def require_own_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise if an optimiser holds none of a model's own parameters, only copies or those of another model."""
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise StreamlineError(
            f"This {type(optimizer).__name__} holds no parameter of this {type(model).__name__}: it was made for "
            "another model, or works on copies (DeepSpeed, master weights). Make it from the model's own parameters."
        )


def drop_parameters(optimizer: Optimizer, gone: Collection[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimiser, also from one that accelerate wraps.

    Emptied groups stay, since a learning-rate schedule counts the groups. Parameter names are kept in step.
    """
    numbers = {id(parameter) for parameter in gone}
    for one in _chain(optimizer):
        for group in one.param_groups:
            left = [k for k, parameter in enumerate(group["params"]) if id(parameter) not in numbers]
            for kept in {"params", "param_names"} & set(group):
                group[kept][:] = [group[kept][k] for k in left]
        for parameter in gone:
            one.state.pop(parameter, None)


def rename_parameters(
    optimizer: Optimizer, before: Mapping[nn.Parameter, str], now: Mapping[nn.Parameter, str]
) -> None:
    """Update the parameter names that an optimiser keeps, if any; a prefix before a name, as of a wrapper, stays."""
    for one in _chain(optimizer):
        for group in one.param_groups:
            names: list[str] = group.get("param_names", [])
            for k, (parameter, name) in enumerate(zip(group["params"], names, strict=False)):
                old = before.get(parameter)
                if old is not None and parameter in now and name.endswith(old):
                    names[k] = name.removesuffix(old) + now[parameter]


def _chain(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimiser, and those that it wraps."""
    inner: object = optimizer
    while isinstance(inner, Optimizer):
        yield inner
        inner = getattr(inner, "optimizer", None)

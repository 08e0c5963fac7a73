"""The model with its stand-ins, beside the original, which usually shares every other weight with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import resume
from streamline_hooks.recorder import ForwardStopped, HiddenStateRecorder
from streamline_hooks.repair.folded import Folded
from streamline_hooks.repair.stand_in import StandIn, place
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.splice import AFTER, BEFORE, remember_splices, set_splices, spliced
from streamline_hooks.task import Task


class Student:
    """What is trained: stand-ins for windows, and copies of blocks that stay.

    Outside `opened` the model is the original, so that one set of weights serves as teacher and as student, and an
    error leaves nothing behind. From the student's first change on both are run on the same states.

    Parameters
    ----------
    model : torch.nn.Module
        The original.
    stand_ins : sequence of (range, StandIn)
        Windows, in their order, and what stands in the place of each; see `place`.
    copies : mapping of int to torch.nn.Module, optional
        Copies of blocks that stay, which are trained while the teacher has the originals; see `healing`.
    outside : mapping of str to torch.nn.Module, optional
        Copies of modules outside the stack, such as the LM head, by their path in the model.
    rate : float
        Share of the learning rate at which what stays is trained.
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        What the model is for, and so what is compared of what it says; by default see `Task.of`.
    teacher : torch.nn.Module, optional
        What the student is compared with, where that is another model of the same vocabulary, such as one from before
        an earlier surgery; by default the model itself. It is not changed.

    Raises
    ------
    StreamlineError
        If nothing would change, or what is trained is a part of the original.

    Examples
    --------
    >>> from streamline_hooks import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> student = Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
    >>> student.start, sorted(student.parameters())
    (2, ['2-3.0.projection.weight'])
    """

    def __init__(
        self,
        model: nn.Module,
        stand_ins: Sequence[tuple[range, StandIn]],
        *,
        copies: Mapping[int, nn.Module] | None = None,
        outside: Mapping[str, nn.Module] | None = None,
        rate: float = 1.0,
        stack: str | None = None,
        task: Task | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.teacher = model if teacher is None else teacher
        self._task = task
        self.stack = find_stack(model, stack)
        self.stand_ins = sorted(stand_ins, key=lambda one: one[0].start)
        self.copies = dict(sorted((copies or {}).items()))
        self.outside = dict(outside or {})
        self.rate = rate
        if not (self.stand_ins or self.copies or self.outside):
            raise StreamlineError("There is nothing to train: give a window with its stand-in, or copies of blocks.")
        _require_apart(self.windows)
        self._require_one_vocabulary()
        self._require_own()
        self.training = True
        first = [window.start - isinstance(stand_in, Folded) for window, stand_in in self.stand_ins]
        self.start = min([*first, *self.copies, len(self.stack) - 1])
        with self.opened():
            pass  # so that the modules are known

    @property
    def task(self) -> Task:
        """Task of the model."""
        return self._task or Task.of(self.model)

    @property
    def teacher_stack(self) -> BlockStack:
        """Block stack of the teacher."""
        return self.stack if self.teacher is self.model else find_stack(self.teacher, self.stack.path)

    @property
    def windows(self) -> list[range]:
        """Removed windows."""
        return [window for window, _ in self.stand_ins]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        found = {}
        for place_, modules in self.modules.items():
            for number, module in enumerate(modules):
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        found[f"{place_}.{number}.{name}"] = parameter
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers of the trained modules by name, such as running means."""
        return {
            f"{place_}.{number}.{name}": buffer
            for place_, modules in self.modules.items()
            for number, module in enumerate(modules)
            for name, buffer in _kept_buffers(module).items()
        }

    def rate_of(self, name: str) -> float:
        """Return the share of the learning rate for a parameter of this name."""
        stays = {*map(str, self.copies), *self.outside}
        return self.rate if any(name.startswith(f"{place_}.") for place_ in stays) else 1.0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the model be the student."""
        with ExitStack() as exits:
            surgeon = exits.enter_context(LayerSurgeon(self.model, self.stack, probe=False))
            self.carry_out(surgeon)
            for path, module in self.outside.items():
                exits.callback(self.model.set_submodule, path, self.model.get_submodule(path))
                self.model.set_submodule(path, module)
                self.modules[path] = [module]
            self._ends = self._places_after()
            for modules in self.modules.values():
                for module in modules:  # what is put in takes the mode of the blocks around it
                    module.train(self.training)
            yield

    def carry_out(self, surgeon: LayerSurgeon) -> None:
        """Put replacements and block copies into the stack."""
        self.modules: dict[str, list[nn.Module]] = {}
        for window, stand_in in self.stand_ins:
            self.modules[f"{window.start}-{window.stop - 1}"] = place(surgeon, window, stand_in)
        for k, block in self.copies.items():
            self.modules[str(k)] = [surgeon.exchange(k, block)]

    def merge(self) -> None:
        """Merge adapters into the weights of their copies, so that every copy is a plain block."""
        for block in self.copies.values():
            merge_adapters(block)

    def settle(self) -> None:
        """Copy trained and merged values into the original modules; windows are removed by a committed surgeon."""
        pairs = [(self.stack[k], copy) for k, copy in self.copies.items()]
        pairs += [(self.model.get_submodule(path), copy) for path, copy in self.outside.items()]
        with torch.no_grad():
            for module, copy in pairs:
                # With what is spliced in beside it, which is no copy.
                held: dict[str, Tensor] = {**dict(module.named_parameters()), **_kept_buffers(module)}
                for name, trained in [*copy.named_parameters(), *_kept_buffers(copy).items()]:
                    held[name].copy_(trained)

    @contextmanager
    def trained_alone(self) -> Iterator[None]:
        """Freeze all parameters of the original and the teacher, until the context ends."""
        mine = {id(parameter) for modules in self.modules.values() for m in modules for parameter in m.parameters()}
        original = dict.fromkeys([*self.model.parameters(), *self.teacher.parameters()])
        others = [p for p in original if p.requires_grad and id(p) not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def run(self, entrance: Tensor, batch: Batch | Tensor, *, logits: bool, states: bool) -> tuple[Any, list[Tensor]]:
        """Run the student from block `start` on the states `entrance`, of shape (batch, tokens, features).

        `batch` gives masks and positions. Return the model's output, None without `logits`, and with `states` the
        states after each window; without `logits` nothing runs after the last window.
        """
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if checkpointed and torch.is_grad_enabled():
            # A reentrant checkpoint has no graph where its input has none, and would train nothing inside.
            entrance = entrance.detach().requires_grad_()
        given = entrance.clone()  # what is put in may work on its input in place
        with self.opened(), self._without_earlier_splices(), ExitStack() as exits:
            entering = [k for k, at_end in self._ends if not at_end]
            leaving = len(entering) < len(self._ends)
            records: list[HiddenStateRecorder] = []
            record = partial(HiddenStateRecorder, self.model, detach=False, stack=self.stack.path)
            if states and entering:
                records.append(record(entering, outputs=False, stop=not (logits or leaving)))
            if states and leaving:
                records.append(record([-1], inputs=False, stop=not logits))
            for one in records:
                exits.enter_context(one)
            try:
                output = resume(self.model, self.start, given, batch, stack=self.stack.path, before_splices=True)
            except ForwardStopped:
                output = None
            found = [
                next(iter(records[-1].outputs.values()))[0] if at_end else records[0].inputs[k][0]
                for k, at_end in (self._ends if states else ())
            ]
        return (output if logits else None), found

    def original_answers(self, exit_: Tensor, batch: Batch | Tensor) -> Tensor:
        """Return the teacher's answers (`Task.answers`) from the state that leaves its last block, without a graph."""
        with torch.no_grad():
            stack = self.teacher_stack
            output = resume(self.teacher, len(stack), exit_.clone(), batch, stack=stack.path)
        return self.task.answers(output, batch)

    @contextmanager
    def _without_earlier_splices(self) -> Iterator[None]:
        """Leave out what earlier surgery put before block `start`, which the entrance has passed."""
        earlier = {id(module) for module in spliced(self.stack[self.start], BEFORE)}
        if not earlier:
            yield
            return
        present = find_stack(self.model, self.stack.path).blocks
        block, where = (present[self.start], BEFORE) if self.start < len(present) else (present[-1], AFTER)
        put_back = remember_splices(block, where)
        set_splices(block, where, [module for module in spliced(block, where) if id(module) not in earlier])
        try:
            yield
        finally:
            put_back()

    def _require_one_vocabulary(self) -> None:
        """Raise if the teacher has another vocabulary."""
        both: list[Any] = [self.model, self.teacher]
        heads = [head() for one in both if callable(head := getattr(one, "get_output_embeddings", None))]
        sizes = [head.weight.shape[0] for head in heads if head is not None]
        if len(set(sizes)) > 1:
            raise StreamlineError(
                f"The teacher speaks of {sizes[1]:,} tokens, and {type(self.model).__name__} of {sizes[0]:,}; expected "
                "one vocabulary. Give the model that this one was made from."
            )

    def _require_own(self) -> None:
        """Raise if training would change the original, or a module is in two places."""
        modules = [stand_in for _, stand_in in self.stand_ins if isinstance(stand_in, nn.Module)]
        original = set(self.model.parameters())
        taken = set(original)
        for module in (*modules, *self.copies.values(), *self.outside.values()):
            own = set(module.parameters())
            if own & taken:
                where = "has weights of the original" if own & original else "is in two places"
                raise StreamlineError(
                    f"A {type(module).__name__} that is to be trained {where}; expected one with weights of its own. "
                    "Give a copy (copy.deepcopy)."
                )
            taken |= own

    def _places_after(self) -> list[tuple[int, bool]]:
        """Return for each window the present block its output enters, and whether it is the end of the stack."""
        present = list(find_stack(self.model, self.stack.path).blocks)
        ends = []
        for window in self.windows:
            if window.stop == len(self.stack):
                ends.append((len(present), True))
                continue
            copied = self.modules.get(str(window.stop))
            block = copied[0] if copied else self.stack[window.stop]
            ends.append((next(k for k, module in enumerate(present) if module is block), False))
        return ends


def _kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers by path."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    }


def _require_apart(windows: Sequence[range]) -> None:
    for one, next_ in pairwise(windows):
        if next_.start <= one.stop:
            raise StreamlineError(
                f"The windows {one.start} to {one.stop - 1} and {next_.start} to {next_.stop - 1} touch; expected a "
                "block between two. Give one window for both."
            )


def merge_adapters(block: nn.Module) -> None:
    """Merge LoRA adapters of a copy into weights of its own."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without peft there is none
        return
    for path, layer in list(block.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            layer.merge()
            block.set_submodule(path, base)

"""A state machine that operates on a small model at random and knows what must come out.

Every rule is one step; after each step everything is compared: the plan, the structure, every tensor, the logits,
cached generation, and all other models.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import streamline_hooks
from streamline_hooks import (
    HiddenStateRecorder,
    LayerSurgeon,
    StreamlineError,
    UnsupportedSurgery,
    find_stack,
    load,
    save,
)
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import AFTER, BEFORE, SurgeryPlan
from streamline_hooks.surgery.edits import ORIGIN
from tests.state_machine.expected_model import Entry, Level, Reference, owns_bias
from tests.state_machine.models import FAMILIES, NEW_TOKENS, PROMPT, WIDTH, tiny_model
from tests.state_machine.snapshot import Snapshot

STEPS_PER_EXAMPLE = 30
MOST_SLOTS, MOST_COPIES = 6, 1
SETTINGS = settings(
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    max_examples=5,
    stateful_step_count=STEPS_PER_EXAMPLE,
    suppress_health_check=list(HealthCheck),
)
_PACKAGE = str(Path(streamline_hooks.__file__).parent)
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_SPLICED = (BEFORE, AFTER)

numbers = st.integers(0, MOST_SLOTS)
lines = st.one_of(*[st.just(0)] * 7, st.integers(1, 60), st.integers(1, 900))  # 0: no interrupt
kinds = st.sampled_from(["linear", "linear", "linear", "copy", "block", "identity"])


@contextmanager
def refusal() -> Iterator[None]:
    """Expect a StreamlineError. (``pytest.raises`` raises what Hypothesis cannot shrink.)"""
    try:
        yield
    except StreamlineError:
        return
    raise AssertionError("This was not refused.")


@contextmanager
def interrupt_at(line: int) -> Iterator[None]:
    """Raise KeyboardInterrupt when the package has run this many lines; never for 0."""
    left = line

    def trace_lines(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace_lines

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(_PACKAGE) else None

    before = sys.gettrace()
    if line:
        sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def own_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a block without those of what is spliced beside it."""
    found = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in found if not name.startswith(_SPLICED)}


def own_modes(block: nn.Module) -> dict[str, bool]:
    return {n: m.training for n, m in block.named_modules() if not n.startswith(_SPLICED)}


def running(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules that run in the stack, in order."""
    found: list[nn.Module] = []
    for block in model.get_submodule(path).children():
        found += [*getattr(block, _SPLICED[0], ()), block, *getattr(block, _SPLICED[1], ())]
    return found


def described(model: Any) -> dict[str, Any]:
    """Return a model's configuration without what ``save_pretrained`` itself writes into it."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    return {key: value for key, value in config.items() if key not in ("dtype", "architectures")}


def linear(seed: int) -> LinearReplacement:
    generator = torch.Generator().manual_seed(seed)
    return LinearReplacement.from_map(0.2 * torch.randn(WIDTH, WIDTH, generator=generator))


@dataclass
class Other:
    """A model that nothing is done to, and what it said at first."""

    model: Any
    logits: Tensor
    blocks: int
    config: Any
    reference: Reference | None = None
    history: tuple[SurgeryPlan, ...] = ()
    settled: bool = True
    mixed_modes: bool = False


@dataclass
class OpenSurgeon:
    """A surgeon that is open, how to leave it, and the model as it was before."""

    surgeon: LayerSurgeon
    leave: ExitStack
    before: Snapshot
    cast: bool = False


def meanwhile(condition: Callable[[Machine], object] = lambda self: True) -> Any:
    """Allow a rule that is no surgery where not several of them came just before."""
    return precondition(lambda self: self.idle < 2 and bool(condition(self)))


class Machine(RuleBasedStateMachine):
    """Operate on one model of a family; see `machine_of`."""

    family: ClassVar[str]
    steps: ClassVar[int] = 0

    @initialize()
    def build(self) -> None:
        self.kind = FAMILIES[self.family]
        self.model: Any = tiny_model(self.family)
        self.path = find_stack(self.model, self.kind.stack or None).path
        self.reference = Reference(deepcopy(self.model), self.path)
        self.layer_types = {*(getattr(getattr(self.model, "config", None), "layer_types", None) or ())}
        self.open: list[OpenSurgeon] = []
        self.history: tuple[SurgeryPlan, ...] = ()
        self.settled = True  # not copied inside an open surgeon
        self.mixed_modes = False
        self.rounded = self.narrowed = False  # by a cast: at any time; inside an open surgeon
        self.batch = self.kind.batch()
        self.others = [self.other(deepcopy(self.model))]
        if hasattr(self.model, "config"):
            self.others.append(self.other(type(self.model)(self.model.config).eval()))
        self.changed, self.idle = True, 0
        self.forward(self.model)  # installs what Transformers installs at the first call
        if self.kind.generates:
            self.generate()

    def teardown(self) -> None:
        for opened in reversed(getattr(self, "open", [])):
            opened.leave.close()

    # Running a model

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def forward(self, model: Any, batch: dict[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            out = model(**self.inputs(batch or self.batch, next(model.parameters()).dtype))
        return getattr(out, "logits", out)

    def inputs(self, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        given: dict[str, Any] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        if self.family.startswith("t5"):
            given.setdefault("decoder_input_ids", torch.tensor([[0, 7, 9], [0, 5, 8]]))
        if self.kind.generates:
            given["use_cache"] = False
            if not self.family.startswith("t5"):
                given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return given

    def generate(self) -> Any:
        return self.model.generate(
            **self.batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    def other(self, model: Any, reference: Reference | None = None) -> Other:
        config = described(model)
        blocks = len(list(model.get_submodule(self.path).children()))
        logits = self.forward(model)
        return Other(model, logits, blocks, config, reference, self.history, self.settled, self.mixed_modes)

    # Opening and closing

    def level(self) -> Level:
        return self.reference.levels[-1]

    @precondition(lambda self: not self.open or (len(self.open) < 3 and self.level().is_changed))
    @rule(probe=st.sampled_from([False, False, False, True]), line=lines)
    def open_surgeon(self, probe: bool, line: int) -> None:
        self.idle = 0
        before = Snapshot(self.model)
        leave = ExitStack()
        surgeon = LayerSurgeon(self.model, stack=self.path, probe=probe)
        try:
            with interrupt_at(line):
                leave.enter_context(surgeon)
        except KeyboardInterrupt:
            before.require_unchanged()
            return
        self.open.append(OpenSurgeon(surgeon, leave, before))
        self.reference.levels.append(Level(self.reference.entries))

    def require_surgeon(self) -> None:
        """Open a surgeon where none is: a run in which Hypothesis leaves `open_surgeon` out would do nothing else."""
        if not self.open:
            self.open_surgeon(probe=False, line=0)

    @precondition(lambda self: self.open)
    @rule(error=st.sampled_from([None, None, ValueError, KeyboardInterrupt]), line=lines)
    def close(self, error: type[BaseException] | None, line: int) -> None:
        self.idle = 0
        opened = self.open.pop()
        self.reference.levels.pop()
        self.changed = True
        try:
            with interrupt_at(line), opened.leave:
                if error is not None:
                    raise error("left by an error")
        except (ValueError, KeyboardInterrupt) as left:
            assert error is not None or isinstance(left, KeyboardInterrupt)
        marked = not self.open and any(ORIGIN in vars(module) for module in self.model.modules())
        if line and (marked or opened.before.changes(buffers=not opened.cast)):  # interrupted before it had begun
            opened.surgeon.__exit__(None, None, None)
        opened.before.require_unchanged(buffers=not opened.cast)
        if opened.cast and self.open:
            self.open[-1].cast = True

    @precondition(lambda self: len(self.open) == 1)
    @rule(line=lines)
    def commit(self, line: int) -> None:
        self.idle = 0
        opened, level = self.open[-1], self.level()
        expected = opened.surgeon.plan
        before = Snapshot(self.model)
        committed = False
        try:
            with interrupt_at(line):
                plan = opened.surgeon.commit(note="state machine")
            committed = True
            assert plan == expected
        except UnsupportedSurgery:
            assert not self.rebuilds(level), "a commit was refused that nothing speaks against"
            before.require_unchanged()
        except KeyboardInterrupt:
            committed = self.committed(opened.surgeon)
        if committed:
            self.open.pop()
            self.reference.base = self.reference.entries
            self.reference.levels.pop()
            self.history = (*self.history, expected)
            self.settled = self.settled or hasattr(self.model, "config")
            opened.leave.close()
        self.changed = True

    def committed(self, surgeon: LayerSurgeon) -> bool:
        try:
            surgeon.insert(99, nn.Identity())
        except StreamlineError as error:
            return "not open" in str(error)
        raise AssertionError("a module was inserted behind the end")

    def rebuilds(self, level: Level) -> bool:
        """Whether the class, built from a shorter configuration, gives these blocks: T5 alone gives block 0 more."""
        slots = [p.entry for p in level.placed() if p.entry.source is not None]
        return [k for k, slot in enumerate(slots) if owns_bias(slot.module)] in ([], [0])

    # Operations

    def operate(self, operation: Callable[[], object], after: Level | None, line: int = 0) -> None:
        """Run an operation that must come to `after`, or be refused where that is None."""
        self.idle = 0
        self.changed = True
        if after is None:
            with refusal():
                operation()
            return
        try:
            with interrupt_at(line), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                operation()
        except KeyboardInterrupt:
            if self.plan_of(after) != self.told(self.open[-1].surgeon.plan):
                return  # as before, which the invariants show
        self.reference.levels[-1] = after

    def module(self, what: str, j: int, leaving: tuple[int, ...] = ()) -> tuple[nn.Module, Entry, int | None]:
        """Return what is put in, its entry, and its number where the model's own block is put in itself."""
        level, stack = self.level(), self.open[-1].surgeon.stack
        training, dtype = self.model.training, self.dtype
        if what == "copy":
            live = running(self.model, self.path)
            slots = [(m, e) for m, e in zip(live, self.reference.entries, strict=True) if e.source is not None]
            module, entry = slots[j % len(slots)]
            return deepcopy(module), Entry(deepcopy(entry.module), entry.source, added=True), None
        if what == "block":
            j %= len(level)
            entry = level.block(j) if j in level.numbers() else level.slots[j]
            if j not in level.numbers(leaving):
                return stack[j], level.slots[j], j
            return stack[j], Entry(deepcopy(entry.module), entry.source, added=True), None
        module = nn.Identity() if what == "identity" else linear(j)
        return module, Entry(deepcopy(module).to(dtype).train(training), None, added=True), None

    def window(self, start: int, length: int) -> tuple[int, int]:
        start %= len(self.level())
        return start, min(start + length, len(self.level()))

    def depended_on(self, start: int, stop: int) -> bool:
        """Whether blocks of a window own the position bias that others use (T5)."""
        owners = [k for k, slot in enumerate(self.level().slots) if owns_bias(slot.module)]
        return bool({*owners} & {*range(start, stop)}) and len(owners) < len(self.level())

    @rule(start=numbers, length=st.sampled_from([1, 1, 2, 3, 6]), line=lines)
    def remove(self, start: int, length: int, line: int) -> None:
        self.require_surgeon()
        start, stop = self.window(start, length)
        after = None if self.depended_on(start, stop) else self.level().replace(start, stop, None)
        self.operate(lambda: self.open[-1].surgeon.remove(range(start, stop)), after, line)

    @rule(start=numbers, length=st.integers(1, 2), what=kinds,
          j=numbers, line=lines)  # fmt: skip
    def replace(self, start: int, length: int, what: str, j: int, line: int) -> None:
        self.require_surgeon()
        start, stop = self.window(start, length)
        module, entry, number = self.module(what, j, tuple(range(start, stop)))
        itself = number == start and stop == start + 1
        after = None
        if itself or not self.depended_on(start, stop):
            after = self.level().replace(start, stop, (entry, number), itself)
        if itself:
            line = 0  # the plan would not say whether it was done
        self.operate(lambda: self.open[-1].surgeon.replace(range(start, stop), module), after, line)

    @rule(k=numbers, what=kinds, j=numbers, line=lines)
    def insert(self, k: int, what: str, j: int, line: int) -> None:
        self.require_surgeon()
        k %= len(self.level()) + 1
        if len(self.slots()) >= MOST_SLOTS and what in ("copy", "block"):
            what = "linear"
        module, entry, number = self.module(what, j)
        after = self.level().insert(k, entry, number)
        if entry.source is not None and k == 0 and owns_bias(self.level().slots[0].module):
            after = None  # the first block of a T5 makes the position bias of all others
        self.operate(lambda: self.open[-1].surgeon.insert(k, module), after, line)

    @rule(k=numbers, j=numbers, line=lines)
    def exchange(self, k: int, j: int, line: int) -> None:
        self.require_surgeon()
        k %= len(self.level())
        module, entry, _ = self.module("copy", j)
        with torch.no_grad():
            for block in (module, entry.module):
                for tensor in own_tensors(block).values():
                    if tensor.is_floating_point():
                        tensor.mul_(1.5)
        after = None if self.depended_on(k, k + 1) else self.level().replace(k, k + 1, (entry, None), True)
        self.operate(lambda: self.open[-1].surgeon.exchange(k, module), after, line)

    @rule(k=numbers, branch=st.sampled_from(["attention", "mlp"]), line=lines)
    def zero_branch(self, k: int, branch: str, line: int) -> None:
        self.require_surgeon()
        k, level, after = k % len(self.level()), self.level(), None
        unused_bias = k > 0 and owns_bias(level.slots[k].module)  # a copy of T5's first block, behind it
        if branch in self.kind.branches and k in level.numbers() and not unused_bias:
            block = dict(level.slots[k].module.named_modules())
            after = level.zero_branch(k, branch, [path for path in self.kind.branches[branch] if path in block])
        batch = {} if hasattr(self.model, "config") else {"batch": self.inputs(self.batch, self.dtype)}
        self.operate(lambda: self.open[-1].surgeon.zero_branch(k, branch, **batch), after, line)

    REFUSED: ClassVar[dict[str, Callable[[Machine], object]]] = {
        "empty window": lambda m: m.open[-1].surgeon.remove([]),
        "out of range": lambda m: m.open[-1].surgeon.remove([99]),
        "negative": lambda m: m.open[-1].surgeon.remove([-1]),
        "not consecutive": lambda m: m.open[-1].surgeon.remove([0, 2]),
        "everything": lambda m: m.open[-1].surgeon.remove(range(len(m.level()))),
        "no module": lambda m: m.open[-1].surgeon.insert(0, "module"),
        "inserted out of range": lambda m: m.open[-1].surgeon.insert(99, nn.Identity()),
        "exchanged for no block": lambda m: m.open[-1].surgeon.exchange(0, nn.Identity()),
        "unknown branch": lambda m: m.open[-1].surgeon.zero_branch(0, "norm"),
        "opened twice": lambda m: m.open[-1].surgeon.__enter__(),
        "notes": lambda m: m.open[-1].surgeon.commit(note=object()),
        "saved": lambda m: m.save_to_new_folder(),
        "outer": lambda m: m.open[0].surgeon.insert(0, nn.Identity()),
        "committed inside": lambda m: m.open[-1].surgeon.commit(),
    }

    @meanwhile()
    @rule(what=st.sampled_from(sorted(REFUSED)))
    def refused(self, what: str) -> None:
        self.require_surgeon()
        self.idle += 1
        if len(self.open) == 1 and what in ("outer", "committed inside"):
            what = "saved"
        if what == "everything" and len(self.slots()) > len(self.level().numbers()):
            what = "negative"  # blocks that were inserted stay
        with refusal():
            self.REFUSED[what](self)

    # What a user does meanwhile

    @meanwhile()
    @rule(stop=st.booleans())
    def record(self, stop: bool) -> None:
        self.idle += 1
        before = Snapshot(self.model)
        inputs = self.inputs(self.batch, self.dtype)
        with HiddenStateRecorder(self.model, stack=self.path, stop=stop) as record:
            with torch.no_grad():
                record(**inputs)
        before.require_unchanged()
        _, states = self.reference.run(inputs)
        at = [p for p, entry in enumerate(self.reference.entries) if entry.source is not None]
        for k, p in enumerate(at):
            self.same(record.inputs[k][0], states[p], f"input of block {k}")
            self.same(record.outputs[k][0], states[-1 if p == at[-1] else p + 1], f"output of block {k}")

    @meanwhile()
    @rule(sign=st.sampled_from([-1, 1]))
    def train_a_step(self, sign: int) -> None:
        self.idle += 1
        inputs = self.inputs(self.batch, self.dtype)
        out = self.model(**inputs)
        out = getattr(out, "logits", out)
        if out.requires_grad:
            out.float().square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * sign * parameter.grad.sign()
        self.model.zero_grad(set_to_none=True)
        for live, expected in self.pairs():
            for name, tensor in live.items():
                if expected[name].requires_grad:
                    expected[name].data.copy_(tensor.data)
        self.changed = True

    @meanwhile()
    @rule(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.idle += 1
        self.model.train(training)
        for module in self.reference.modules():
            module.train(training)
        self.mixed_modes = False

    @meanwhile()
    @rule(wanted=st.booleans())
    def set_requires_grad(self, wanted: bool) -> None:
        self.idle += 1
        self.model.requires_grad_(wanted)
        for module in self.reference.modules():
            module.requires_grad_(wanted)

    @meanwhile(lambda self: not self.open)
    @rule(k=numbers)
    def change_the_mode_of_one_block(self, k: int) -> None:
        self.idle += 1
        slots = [i for i, entry in enumerate(self.reference.base) if entry.source is not None]
        i = slots[k % len(slots)]
        for module in (running(self.model, self.path)[i], self.reference.base[i].module):
            module.train(not self.model.training)
        self.mixed_modes = True

    @meanwhile()
    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.idle += 1
        self.narrowed = bool(self.open) and (self.narrowed or dtype.itemsize < self.dtype.itemsize)
        if self.narrowed and dtype.itemsize > self.dtype.itemsize:
            return  # what is out of the model goes from the first precision to the last one, and is not rounded
        self.model.to(dtype)
        for module in self.reference.modules():
            module.to(dtype)
        self.rounded = self.rounded or dtype == torch.bfloat16
        for opened in self.open:
            opened.cast = True
        self.changed = True

    @meanwhile(lambda self: len(self.others) < 2 + MOST_COPIES)
    @rule()
    def copy(self) -> None:
        self.idle += 1
        copied = self.other(deepcopy(self.model), self.reference.committed())
        copied.settled = self.settled and not self.open
        own = {id(thing) for thing in (*self.model.modules(), *self.model.parameters())}
        shared = [thing for thing in (*copied.model.modules(), *copied.model.parameters()) if id(thing) in own]
        assert not shared, f"the copy shares {[type(thing).__name__ for thing in shared]} with the model"
        self.others.append(copied)

    @meanwhile(lambda self: not self.open and self.others[-1].reference is not None)
    @rule()
    def go_on_with_the_copy(self) -> None:
        self.idle += 1
        copied = self.others.pop()
        assert copied.reference is not None
        self.others.append(self.other(self.model, self.reference))
        self.model, self.reference, self.settled = copied.model, copied.reference, copied.settled
        self.history, self.mixed_modes = copied.history, copied.mixed_modes
        self.changed = True

    @meanwhile(lambda self: not self.open and self.dtype != torch.bfloat16)
    @rule(go_on=st.booleans())
    def save_and_load(self, go_on: bool) -> None:
        self.idle += 1
        plain = not hasattr(self.model, "config")
        with tempfile.TemporaryDirectory(dir=_MEMORY) as folder, redirect_stderr(io.StringIO()):  # progress bars
            if plain and not self.settled:  # a commit settles it, for a model of the length that it was copied with
                return
            if not self.settled or (plain and not self.history) or not self.storable():
                with refusal():
                    save(self.model, folder)
                return
            self.forward(self.model)
            save(self.model, folder)
            loaded = load(folder, into=tiny_model(self.family) if plain else None)
        assert all(parameter.dtype == self.dtype for parameter in loaded.parameters())
        loaded.to(self.dtype)  # what is not saved but computed anew, such as rotary frequencies
        if self.rounded:
            buffers = dict(self.model.named_buffers())
            for name, buffer in loaded.named_buffers():
                buffer.copy_(buffers[name])
        self.same(self.forward(loaded), self.forward(self.model), "logits after loading")
        if self.history:
            assert tuple(read_plans(loaded)) == self.history
        if go_on:
            self.model = loaded
            self.reference = self.reference.committed()
            for module in self.reference.modules():
                module.eval().requires_grad_(True)
            self.mixed_modes = False
            self.forward(self.model)
            self.changed = True

    def save_to_new_folder(self) -> None:
        with tempfile.TemporaryDirectory(dir=_MEMORY) as folder, redirect_stderr(io.StringIO()):
            save(self.model, folder)

    def storable(self) -> bool:
        """Whether each spliced module says how to build it again."""
        return not any(isinstance(entry.module, nn.Identity) for entry in self.reference.entries)

    # What holds after each step

    def slots(self) -> list[Entry]:
        return [entry for entry in self.reference.entries if entry.source is not None]

    def same(self, got: Tensor, expected: Tensor, what: str) -> None:
        assert got.shape == expected.shape and got.dtype == expected.dtype, what
        mask = self.batch.get("attention_mask")
        if mask is not None and got.ndim == 3 and not self.family.startswith("t5_decoder"):
            real = torch.cat([mask, torch.ones(2, NEW_TOKENS).long()], dim=1)[:, : got.shape[1]].bool()
            if self.family != "t5_encoder" or got.shape[-1] == WIDTH:
                got, expected = got[real], expected[real]
        assert torch.equal(got, expected), f"{what}: {(got - expected).abs().max().item():g} apart"

    def pairs(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the tensors of the model with those of the reference."""
        for live, entry in zip(running(self.model, self.path), self.reference.entries, strict=True):
            yield own_tensors(live), own_tensors(entry.module)
        yield self.outside(self.model), self.outside(self.reference.model)

    def outside(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what is outside the stack, but the rotary buffers of a type that no block has: loaded, there are none.

        Gemma 3 has such buffers for each of its ``layer_types``.
        """
        used = getattr(getattr(self.model, "config", None), "layer_types", None)
        gone = tuple(f".{kind}_" for kind in self.layer_types - {*used}) if used is not None else ()
        tensors = own_tensors(model).items()
        return {n: t for n, t in tensors if not (n.startswith(f"{self.path}.") or any(kind in n for kind in gone))}

    def told(self, plan: SurgeryPlan) -> tuple[Any, ...]:
        splices = [(s.before, s.old_before, s.replaces, s.module) for s in plan.splices]
        return plan.old_length, [(s.source, s.module, s.zeroed) for s in plan.slots], splices

    def plan_of(self, level: Level) -> tuple[Any, ...]:
        slots: list[Any] = []
        splices: list[Any] = []
        for placed in level.placed():
            name, number = type(placed.entry.module).__name__, placed.number
            if placed.entry.source is None:
                splices.append((len(slots), placed.boundary, placed.window, name))
            else:
                slots.append((number, name, level.zeroed.get(number, ()) if number is not None else ()))
        return len(level), slots, splices

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "model"):
            return
        type(self).steps += 1
        for opened, level in zip(self.open, self.reference.levels, strict=True):
            assert self.told(opened.surgeon.plan) == self.plan_of(level)
        self.structure_holds()
        self.tensors_hold()
        self.logits_hold()
        for k, other in enumerate(self.others):
            assert len(list(other.model.get_submodule(self.path).children())) == other.blocks, f"blocks of model {k}"
            assert described(other.model) == other.config, f"configuration of model {k}"
            assert torch.equal(self.forward(other.model), other.logits), f"logits of other model {k}"

    def structure_holds(self) -> None:
        if self.settled and not self.open:
            assert not any(ORIGIN in vars(module) for module in self.model.modules())
        slots = self.slots()
        blocks = list(self.model.get_submodule(self.path).children())
        assert len(blocks) == len(slots)
        assert list(dict(self.model.get_submodule(self.path).named_children())) == [str(k) for k in range(len(blocks))]
        for k, block in enumerate(blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    assert module.layer_idx == k
        config = getattr(self.model, "config", None)
        if config is not None:
            assert getattr(config, str(self.kind.count)) == len(slots)
            types = getattr(self.reference.model.config, "layer_types", None)
            if types is not None:
                assert config.layer_types == [types[slot.source] for slot in slots if slot.source is not None]

    def tensors_hold(self) -> None:
        for live, expected in self.pairs():
            assert list(live) == list(expected)
            for name, tensor in live.items():
                other = expected[name]
                assert tensor.dtype == other.dtype and tensor.requires_grad == other.requires_grad, name
                assert torch.equal(tensor, other), name
        for module, entry in zip(running(self.model, self.path), self.reference.entries, strict=True):
            assert type(module) is type(entry.module)
            if not (self.mixed_modes and entry.added):
                assert own_modes(module) == own_modes(entry.module)

    def logits_hold(self) -> None:
        batch = self.batch
        if self.changed and self.kind.generates:
            out = self.generate()
            if self.family.startswith("t5"):
                batch, first = {**batch, "decoder_input_ids": out.sequences}, 0
            else:
                mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW_TOKENS).long()], dim=1)
                batch, first = {"input_ids": out.sequences, "attention_mask": mask}, PROMPT - 1
        logits = self.forward(self.model, batch)
        self.same(logits, self.reference.run(self.inputs(batch, self.dtype))[0], "logits")
        if self.changed and self.kind.generates and self.dtype != torch.bfloat16:
            for step, cached in enumerate(out.logits):  # compared with the forward of the whole text without a cache
                torch.testing.assert_close(cached.to(self.dtype), logits[:, first + step], rtol=1e-4, atol=1e-4)
        self.changed = False


@cache
def machine_of(family: str) -> type[Machine]:
    """Return the state machine of a family, which counts its own steps."""
    return type(f"{family.title().replace('_', '')}Machine", (Machine,), {"family": family, "steps": 0})

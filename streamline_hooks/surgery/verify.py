"""Compare a removal or an insertion with the same blocks bypassed, and explain a difference.

The probe decides whether a surgery is correct. `diagnose` then traces a forward of the original model to name the
reason.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import warn_caller
from streamline_hooks.modeling import (
    BlockStack,
    isolated_inference,
    probe_logits,
    read_input,
    read_output,
    write_output,
)
from streamline_hooks.surgery.edits import Edits
from streamline_hooks.surgery.hazards import Hazard
from streamline_hooks.surgery.layer_indices import INDEX_NAMES, find_index_attributes
from streamline_hooks.surgery.probe import (
    CACHE_MISMATCH,
    ReferenceRun,
    find_mismatch,
    matches_reference,
    run_reference,
    run_reference_with_hooks,
)
from streamline_hooks.surgery.save_guard import saved_model_depth

_NUMBER_TYPES = (bool, int, float)  # a str is the kind of a block, which the model reads to prepare inputs for it
_MODULE_STATE = frozenset({"training", "gradient_checkpointing"})
_PERIODS = ("every", "period", "interval")
_POSITIONS = ("index", "start", "end", "idx", "offset", "n_", "first", "last")


def compare_with_reference(
    stack: BlockStack,
    window: range,
    removed_splices: Sequence[nn.Module],
    without_window: Callable[[], AbstractContextManager[Edits]],
) -> tuple[str, Hazard] | None:
    """Describe how the model differs from the model with the window bypassed, and why, or return None.

    None means that it is equal, or that the model cannot be run. A replacement of the window is irrelevant here.
    `removed_splices` follow the window's last block and are removed with it; `without_window` is a context in which the
    window is removed.
    """
    run_stack = _stack_to_run(stack)
    if run_stack is None:
        if window.stop < len(stack):
            _warn_about_indices(stack)
        return None
    reference = run_reference(run_stack, window, removed_splices)
    if reference is None:
        return None
    with without_window() as edits:
        difference = _find_difference(run_stack.model, reference, edits, "the bypassed model")
    return None if difference is None else (difference[0], _explain(run_stack, window, *difference, reference.inputs))


def compare_insertion(
    stack: BlockStack, k: int, block: nn.Module, with_block: Callable[[], AbstractContextManager[Edits]]
) -> tuple[str, Hazard] | None:
    """Describe how the model with a bypassed block inserted before block k differs from it, and why, or return None.

    None means that it is equal, or that the model cannot be run. The block itself is irrelevant here. `with_block` is a
    context in which it is inserted.
    """
    run_stack = _stack_to_run(stack)
    if run_stack is None:
        if k < len(stack):
            _warn_about_indices(stack)
        return None
    model = run_stack.model
    message = f"Insertions in this {type(model).__name__} are not compared with the model before"
    reference = run_reference_with_hooks(model, lambda: (), message)
    if reference is None:
        return None
    with with_block() as edits, _returning_its_input(block):
        difference = _find_difference(model, reference, edits, "before")
    before = range(max(k - 1, 0), max(k, 1))
    return None if difference is None else (difference[0], _explain(run_stack, before, *difference, reference.inputs))


def _stack_to_run(stack: BlockStack) -> BlockStack | None:
    """Return the stack within its model of Transformers, which is run alone, or None if there is none."""
    depth = saved_model_depth(stack)
    if not depth:
        return None if depth is None else stack
    return replace(stack, path=".".join(stack.path.split(".")[depth:]), ancestors=stack.ancestors[depth:])


@contextmanager
def _returning_its_input(block: nn.Module) -> Iterator[None]:
    """Let a block run, but return the state that it received. Hooks do not run in the comparison."""
    forward, own = block.forward, vars(block).get("forward")

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        state = read_input(args, kwargs, block).clone()  # some blocks modify their input in place
        return write_output(forward(*args, **kwargs), state)

    block.forward = unchanged
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _find_difference(
    model: nn.Module, reference: ReferenceRun, edits: Edits, than: str
) -> tuple[str, Sequence[str]] | None:
    """Return how a changed model differs from a reference run, and with which indices it computes, or None."""
    mismatch = find_mismatch(reference, model, than)
    if mismatch is None:
        return None
    in_question = mismatch != CACHE_MISMATCH
    return mismatch, edits.indices_used_in_forward(lambda: matches_reference(reference, model)) if in_question else ()


def _warn_about_indices(stack: BlockStack) -> None:
    """Warn if blocks are renumbered by an attribute with an unusual name, since no run verifies it."""
    for index in find_index_attributes(stack.blocks):
        if index.name not in INDEX_NAMES:
            values = ", ".join(str(index.of(k)) for k in range(3))
            warn_caller(
                f"The blocks of {stack.path} have the attribute {index.name!r} ({values}, ...), which is treated as "
                "their index and is renumbered. Whether the blocks compute with it cannot be verified "
                "here. If they do, restore the old values on the remaining blocks."
            )


def _explain(
    stack: BlockStack, window: range, mismatch: str, computing: Sequence[str], inputs: dict[str, Tensor]
) -> Hazard:
    if mismatch == CACHE_MISMATCH:
        return Hazard("cache", "the cache depends on the index or the kind of a block")
    if computing:
        return Hazard("computes-with-index", f"blocks compute with their own index ({', '.join(computing)})")
    with isolated_inference(stack.model):
        hazard = diagnose(stack, window, partial(probe_logits, stack.model, inputs))
    return hazard or Hazard("probe", "it depends on block indices or on other outputs of the removed blocks")


@dataclass
class ForwardTrace:
    """Tensors and attributes exchanged between the model and its blocks in one forward pass."""

    visits: dict[int, int] = field(default_factory=dict)
    """Number of calls of each block."""
    handed_on: dict[int, str] = field(default_factory=dict)
    """Description of an output of a block, other than the state, that reached a later block."""
    read: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Plain attributes that the model itself read from each block."""


def diagnose(stack: BlockStack, window: range, run: Callable[[], object]) -> Hazard | None:
    """Name the dependency on a window that makes the shorter model differ."""
    trace = trace_forward(stack, run)
    causes = (_looped_blocks, _split_blocks, _extra_state, _attributes_read_outside, _absolute_indices)
    return next((hazard for cause in causes if (hazard := cause(stack, window, trace)) is not None), None)


def trace_forward(stack: BlockStack, run: Callable[[], object]) -> ForwardTrace:
    """Run a forward pass and record what passes between the model and its blocks."""
    trace = ForwardTrace()
    side_outputs: dict[int, int] = {}  # block that returned a tensor other than its state, by the tensor's id
    references: list[Tensor] = []  # keeps the tensors alive, so that no id is reused

    def enter(k: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.visits[k] = trace.visits.get(k, 0) + 1
        state = read_input(args, kwargs, block)
        for tensor in _tensors([args, kwargs]):
            if tensor is not state and side_outputs.get(id(tensor), k) != k:
                trace.handed_on[side_outputs[id(tensor)]] = f"a tensor of shape {tuple(tensor.shape)}"

    def leave(k: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = read_output(output)
        for tensor in _tensors(output):
            if tensor is not state:
                side_outputs[id(tensor)] = k
                references.append(tensor)

    handles = []
    try:
        for k, block in enumerate(stack.blocks):
            handles.append(block.register_forward_pre_hook(partial(enter, k), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leave, k)))
        with _recorded_attribute_reads(stack, trace.read):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _looped_blocks(stack: BlockStack, window: range, trace: ForwardTrace) -> Hazard | None:
    repeated = sorted(k for k, visits in trace.visits.items() if visits > 1)
    if not repeated:
        return None
    consecutive = len(repeated) > 1 and repeated == list(range(repeated[0], repeated[-1] + 1))
    listed = f"{repeated[0]} to {repeated[-1]}" if consecutive else ", ".join(map(str, repeated))
    return Hazard(
        "looped-blocks",
        f"a forward calls blocks {listed} up to {max(trace.visits.values())} times, in a loop between fixed block "
        "indices",
    )


def _split_blocks(stack: BlockStack, window: range, trace: ForwardTrace) -> Hazard | None:
    """Find blocks whose parts are distributed over several lists (XLM), so that no module is a complete block."""
    owner = stack.ancestors[-1]
    siblings = [
        name
        for name, module in owner.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == len(stack) and module is not stack.container
    ]
    if not siblings:
        return None
    return Hazard(
        "split-blocks",
        f"the model keeps the parts of its blocks in separate lists ({', '.join(siblings)} and "
        f"{stack.path.rpartition('.')[2]}), so no module is a complete block",
    )


def _extra_state(stack: BlockStack, window: range, trace: ForwardTrace) -> Hazard | None:
    last = window.stop - 1
    if last == len(stack) - 1:  # its outputs go to the model, which is not traced
        last = max(trace.handed_on, default=last)
    if last not in trace.handed_on:
        return None
    return Hazard(
        "extra-state",
        f"block {last} passes more than the hidden state to the next block ({trace.handed_on[last]}), and no other "
        "block computes it",
    )


def _attributes_read_outside(stack: BlockStack, window: range, trace: ForwardTrace) -> Hazard | None:
    """Find attributes of blocks that the model reads and uses outside of them (Inkling 2's block boundaries)."""
    names = {name for k in window for name in trace.read.get(k, {})}
    differing = [name for name in sorted(names) if len({r.get(name) for r in trace.read.values()}) > 1]
    if not differing:
        return None
    values = ", ".join(f"{name} ({trace.read[window.start].get(name)!r} on block {window.start})" for name in differing)
    return Hazard("attributes-read-outside", f"the model reads {values} from its blocks and uses it outside of them")


def _absolute_indices(stack: BlockStack, window: range, trace: ForwardTrace) -> Hazard | None:
    """Find settings that seem to contain block indices or periods, and that this library does not know."""
    values = {} if stack.config is None else vars(stack.config)
    names = [name for name, value in values.items() if _refers_to_blocks(name, value, len(stack))]
    if not names:
        return None
    return Hazard(
        "absolute-indices",
        f"the configuration refers to blocks by index or period ({', '.join(names)}), which is not renumbered",
    )


def _refers_to_blocks(name: str, value: Any, length: int) -> bool:
    numbers = value if isinstance(value, (list, tuple)) and value else [value]
    is_position = ("layer" in name or "block" in name) and any(part in name for part in _POSITIONS)
    return (
        not name.startswith("num_")
        and (is_position or any(part in name for part in _PERIODS))
        and all(type(v) is int and 0 <= v <= length for v in numbers)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in the arguments or outputs of a block. Caches are not searched."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name) for f in fields(value)]
    for part in parts:
        yield from _tensors(part)


@contextmanager
def _recorded_attribute_reads(stack: BlockStack, read: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Record which plain attributes of its blocks the stack's owner reads while it runs."""
    owner, number = stack.ancestors[-1], {block: k for k, block in enumerate(stack.blocks)}

    @functools.cache
    def watched(kind: type[nn.Module]) -> type[nn.Module]:
        def __getattribute__(self: Any, name: str) -> Any:
            value = inherited(self, name)
            plain = isinstance(value, _NUMBER_TYPES) and not name.startswith("_") and name not in _MODULE_STATE
            if plain and sys._getframe(1).f_locals.get("self") is owner:
                read.setdefault(number[self], {})[name] = value
            return value

        inherited: Any = kind.__getattribute__
        identity = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return type(kind.__name__, (kind,), {"__getattribute__": __getattribute__, **identity})

    original: list[tuple[Any, Any]] = [(block, type(block)) for block in stack.blocks]
    try:
        for block, kind in original:
            block.__class__ = watched(kind)
        yield
    finally:
        for block, kind in original:
            block.__class__ = kind

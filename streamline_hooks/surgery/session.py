"""The open surgery of a `LayerSurgeon`: its layout, its edits of the model, and how it ends.

Every operation restores the original model and then changes it to the new layout.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from streamline_hooks.core import StreamlineError, refuse_compiled, refuse_wrapped, require_unused
from streamline_hooks.modeling import BlockStack, Branch, find_stack, require_whole_state
from streamline_hooks.surgery import commit
from streamline_hooks.surgery.config_copies import ConfigCopies
from streamline_hooks.surgery.edits import ORIGIN, Edits
from streamline_hooks.surgery.history import record_surgery
from streamline_hooks.surgery.layout import StackLayout
from streamline_hooks.surgery.placement import BlockStates
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.surgery.save_guard import saved_model_depth, transformers_ancestors
from streamline_hooks.surgery.spliced_model import guard_parts
from streamline_hooks.surgery.zeroed_branches import ParameterSwap

_open: WeakKeyDictionary[nn.Module, list[Session]] = WeakKeyDictionary()  # by container
_skipping: WeakSet[nn.Module] = WeakSet()  # containers of stacks with an open PromptSkip

BranchSwaps = Mapping[tuple[int, Branch], ParameterSwap]
"""Replaced output projections, by the old index of the block and the branch."""


def refuse_open_surgery(stack: BlockStack, operation: str) -> None:
    """Raise `StreamlineError` if a surgeon is open on a stack, because its exit would undo the operation."""
    if _open.get(stack.container):
        raise StreamlineError(
            f"A LayerSurgeon is open on {stack.path}, and its exit would undo the effect of {operation}. Commit or "
            f"close it first, or call {operation} outside of its with statement."
        )


def mark_skipping(stack: BlockStack) -> Callable[[], None]:
    """Refuse surgery on a stack, because its blocks are skipped, until the returned function is called."""
    if stack.container in _skipping:
        raise StreamlineError(
            f"Another PromptSkip is open on {stack.path}. Expected one for each stack. Close it first, or skip all "
            "blocks with one window."
        )
    _skipping.add(stack.container)
    return partial(_skipping.discard, stack.container)


def refuse_committed_skip(stack: BlockStack) -> None:
    """Raise if the prompts of a model skip some of its blocks permanently."""
    for module in stack.ancestors:
        if "prompt_skip" in (getattr(getattr(module, "config", None), "streamline_hooks", None) or ()):
            raise StreamlineError(
                f"The prompts of this {type(module).__name__} skip some of its blocks, which must stay where they are. "
                "Expected a model without a committed PromptSkip. Change the original, and commit the skipping last."
            )


class Session:
    """The state of a `LayerSurgeon` from opening to closing. Every step of closing can be repeated after Ctrl-C."""

    def __init__(self, model: nn.Module, stack: str | BlockStack | None) -> None:
        refuse_compiled(model, "operate on")
        refuse_wrapped(model)
        self.model = model
        self.stack = find_stack(model, stack.path if isinstance(stack, BlockStack) else stack)
        if isinstance(stack, BlockStack) and self.stack.container is not stack.container:
            raise StreamlineError(
                f"The stack {stack.path!r} belongs to another model. Pass a stack of this model, or its path."
            )
        require_unused(model)
        refuse_committed_skip(self.stack)
        if self.stack.container in _skipping:
            raise StreamlineError(
                f"A PromptSkip is open on {self.stack.path}, whose blocks must stay where they are. Expected a closed "
                "one. Leave its with statement before the surgery."
            )
        self._thread = threading.get_ident()
        if any(session._thread != self._thread for session in _open.get(self.stack.container, [])):
            raise StreamlineError(
                f"A LayerSurgeon of another thread is open on {self.stack.path} of this {type(model).__name__}. "
                "Expected one thread per model at a time. Close the other surgeon first, or give each thread its own "
                "model: copy.deepcopy(model)."
            )
        self.layout = StackLayout(list(self.stack.blocks))
        self.branch_swaps: BranchSwaps = {}
        self._committed: SurgeryPlan | None = None
        self._is_closed = False
        self._states = BlockStates(self.stack)
        self._token = uuid.uuid4().hex  # unique, since a pickled block carries it into other processes
        self._configs = ConfigCopies(self.stack)
        self.edits = Edits(self._configs, self._token)

    def open(self) -> None:
        """Register the session, and replace the configurations of the model by copies."""
        require_whole_state(self.stack[0])
        sessions = _open.setdefault(self.stack.container, [])
        sessions.append(self)
        self.stack = self._configs.apply()
        open_tokens = {session._token for session in sessions}
        for k, block in enumerate(self.stack.blocks):  # copies of a block inherit its mark, which identifies the block
            marks = {token: old for token, old in vars(block).get(ORIGIN, {}).items() if token in open_tokens}
            vars(block)[ORIGIN] = {**marks, self._token: k}
        for owner in transformers_ancestors(self.stack):
            # A copied model has the compiled forward of its original, which generation with a static cache would run.
            vars(owner).pop("_compiled_call", None)
            vars(owner).pop("_last_compile_config", None)
        self.edits.refuse_saving()

    def undo_open(self) -> None:
        """Undo an interrupted `open`."""
        self.edits.revert()
        self.stack = self._configs.restore()
        self._unregister()

    def close(self) -> None:
        """Restore the model, or finish an interrupted commit."""
        if self._is_closed:
            return
        if self._committed is not None:
            self._finish_commit()
            return
        sessions = _open.get(self.stack.container, [])
        if self in sessions and sessions[-1] is not self:
            raise StreamlineError(
                "A LayerSurgeon was closed while a later one on the same model is open. The model is left unchanged. "
                "Close the surgeons in the opposite order of opening."
            )
        kept = self.layout.kept()
        self.edits.close()
        self.stack = self._configs.restore()
        self._states.follow(self.stack, kept)
        self._unregister()
        self._is_closed = True

    def commit(self, notes: dict[str, Any]) -> SurgeryPlan:
        """Make the surgery permanent. If that fails, the session stays open with the surgery unchanged."""
        if _open[self.stack.container] != [self]:
            raise StreamlineError(
                "commit() was called inside another open surgeon, whose exit would undo it. Commit the outer one."
            )
        plan = self.plan
        depth = saved_model_depth(self.stack)
        undo_count = self.edits.register_commit_undo(self.stack.ancestors[depth or 0])
        try:
            if depth is not None:
                commit.commit_surgery(self.stack, depth, plan, self.edits.indices, notes)
            else:
                record_surgery(self.stack.model, plan, notes)
            for owner in transformers_ancestors(self.stack):
                vars(owner).pop("save_pretrained", None)
            if depth is not None:
                guard_parts(self.stack.ancestors[depth])
            self._committed = plan
        except BaseException:
            self._committed = None
            self.edits.revert(undo_count)
            raise
        self._finish_commit()
        return plan

    def require_open(self) -> None:
        """Raise unless this is the latest open session on the model. Finish an interrupted commit first."""
        if self._committed is not None and not self._is_closed:
            self._finish_commit()
        sessions = _open.get(self.stack.container, [])
        if self not in sessions:
            raise StreamlineError("The LayerSurgeon is not open. Use it inside a with statement, before commit().")
        if sessions[-1] is not self:
            raise StreamlineError("A later LayerSurgeon is open on the same model. Close it first.")

    @property
    def plan(self) -> SurgeryPlan:
        """The committed plan, or the plan of the layout so far."""
        if self._committed is not None:
            return self._committed
        slots, at_end = self.layout.arrange()
        old_index = {id(block): k for k, block in enumerate(self.stack.blocks)}
        placed = [(new, entry) for new, entries in enumerate([*(s.before for s in slots), at_end]) for entry in entries]
        present = {id(module) for _, (module, _, _) in placed}
        return SurgeryPlan(
            self.stack.path,
            len(self.stack),
            tuple(self._slot(old_index.get(id(slot.module)), slot.module) for slot in slots),
            tuple(Splice(new, old, window, type(module).__name__) for new, (module, old, window) in placed),
            described=self.stack.config is not None,
            dropped=tuple(type(m).__name__ for m in self.layout.earlier_modules if id(m) not in present),
        )

    def _slot(self, source: int | None, module: nn.Module) -> Slot:
        branches = {branch: swap.is_zero for (k, branch), swap in sorted(self.branch_swaps.items()) if k == source}
        zeroed, folded = (tuple(b for b, is_zero in branches.items() if is_zero is kind) for kind in (True, False))
        return Slot(source, type(module).__name__, zeroed, folded)

    def is_zeroed(self, k: int, branch: Branch) -> bool:
        """Whether this surgery zeroed a branch."""
        swap = self.branch_swaps.get((k, branch))
        return swap is not None and swap.is_zero

    def apply(self, layout: StackLayout, branch_swaps: BranchSwaps) -> None:
        """Change the model to a layout and to other output projections. If that fails, restore the previous state."""
        require_unused(self.model)
        if not layout.arrange()[0]:
            raise StreamlineError(
                f"This would remove all {len(self.stack)} blocks of {self.stack.path}. Leave at least one block."
            )
        before = self.layout, self.branch_swaps
        kept_blocks = self.layout.kept()
        if {*layout.kept()} <= {*kept_blocks}:
            self._states.follow_flags(self.stack, kept_blocks)
        else:  # a removed block returns and needs the current device, dtype and mode of the others
            self._states.follow(self.stack, kept_blocks)
        try:
            self._apply_layout(layout, branch_swaps)
        except BaseException:
            self._apply_layout(*before)
            raise

    def _apply_layout(self, layout: StackLayout, branch_swaps: BranchSwaps) -> None:
        self.edits.revert()
        self.layout, self.branch_swaps = layout, branch_swaps
        replacement_modules: dict[int, dict[str, nn.Parameter]] = {}
        for (k, _), swap in branch_swaps.items():
            replacement_modules.setdefault(k, {}).update(swap.parameters)
        self.edits.apply_layout(*layout.arrange(), replacement_modules)

    @contextmanager
    def applied(
        self, layout: StackLayout | None = None, changes: BranchSwaps | None = None, *, keep: bool
    ) -> Iterator[Edits]:
        """Apply a layout or branch changes in a with statement.

        They are reverted at its end, unless `keep` is true and the body does not raise.
        """
        before = self.layout, self.branch_swaps
        self.apply(layout or self.layout, {**self.branch_swaps, **(changes or {})})
        try:
            yield self.edits
        except BaseException:
            self.apply(*before)
            raise
        if not keep:
            self.apply(*before)

    def _unregister(self) -> None:
        """Remove this session from the open ones, and its marks from the blocks."""
        sessions = _open.get(self.stack.container, [])
        if self in sessions:
            sessions.remove(self)
        if not sessions:
            _open.pop(self.stack.container, None)
        for block in [*self.stack.blocks, *self.stack.container.children()]:
            marks = vars(block).get(ORIGIN, {})
            marks.pop(self._token, None)
            if not marks or not sessions:  # a block copied inside a closed surgeon still carries its mark
                vars(block).pop(ORIGIN, None)

    def _finish_commit(self) -> None:
        self._configs.make_permanent()
        self._unregister()
        self.edits.finalize()
        self.stack = find_stack(self.model, self.stack.path)  # drops the removed blocks
        self.layout, self.branch_swaps = StackLayout(list(self.stack.blocks)), {}
        self._is_closed = True

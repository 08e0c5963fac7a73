"""A surgery that is open on a model: what it has come to, how the model is laid out by it, and how it ends.

Every operation changes the layout, and the model is taken back to the original and laid out anew. Each change to the
model first puts its own undoing on a list.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from torch import nn

from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.edits import ORIGIN, Edits
from streamline_hooks.surgery.exchange import StandIns
from streamline_hooks.surgery.layout import Layout
from streamline_hooks.surgery.own_config import OwnConfigs
from streamline_hooks.surgery.placement import BlockStates
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.wrapping import refuse_compiled, refuse_wrapped

_open: WeakKeyDictionary[nn.Module, list[OpenSurgery]] = WeakKeyDictionary()  # by container

InBranches = Mapping[int, Mapping[Branch, StandIns]]
"""What stands in the place of the output projections of branches, by the block's number before the surgery."""


def refuse_open_surgery(stack: BlockStack, what: str) -> None:
    """Raise if a surgeon is open on a stack: what it ends with is taken back when that one closes.

    Parameters
    ----------
    stack : BlockStack
    what : str
        What was about to be done, for the text: "compress".
    """
    if _open.get(stack.container):
        raise StreamlineError(
            f"A surgeon is open on {stack.path}, and would undo what {what} does when it closes. Commit or close it "
            f"first, or {what} outside of its with statement."
        )


class OpenSurgery:
    """Opening and closing, and the way from a layout to a model; `LayerSurgeon` says what can be done in between."""

    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None) -> None:
        self.model = model
        self._named_stack = stack
        self._entered = self._is_closed = False

    def __enter__(self) -> Self:
        if self._entered:
            raise StreamlineError("This surgeon was opened before; make a new one.")
        refuse_compiled(self.model, "operate on")
        refuse_wrapped(self.model)
        self.stack = self._find()
        self._layout = Layout(list(self.stack.blocks))
        self._in_branches: InBranches = {}
        self._plan: SurgeryPlan | None = None
        self._states = BlockStates(self.stack)
        self._token = uuid.uuid4().hex  # a pickled block carries it into other processes
        self._configs = OwnConfigs(self.stack)
        self._edits = Edits(self._configs, self._token)
        try:
            surgeons = _open.setdefault(self.stack.container, [])
            surgeons.append(self)
            self.stack = self._configs.put_in()
            known = {surgeon._token for surgeon in surgeons}
            for k, block in enumerate(self.stack.blocks):  # a copy made inside the context says what it is a copy of
                marks = {token: old for token, old in vars(block).get(ORIGIN, {}).items() if token in known}
                vars(block)[ORIGIN] = {**marks, self._token: k}
            self._edits.refuse_saving()
            self._entered = True
            return self
        except BaseException:
            self._edits.revert()
            self.stack = self._configs.put_back()
            self._sign_off()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave()
        except StreamlineError:
            raise
        except BaseException:  # Ctrl-C at any point: every step can be done twice
            self._leave()
            raise

    @property
    def plan(self) -> SurgeryPlan:
        """What the surgery has come to so far: old block, new block."""
        return self._plan if self._plan is not None else self._current_plan()

    def _find(self) -> BlockStack:
        if not isinstance(self._named_stack, BlockStack):
            return find_stack(self.model, self._named_stack)
        found = find_stack(self.model, self._named_stack.path)
        if found.container is not self._named_stack.container:
            raise StreamlineError(
                f"The stack {self._named_stack.path!r} is of another model. Find it in this one, or give its path."
            )
        return found

    def _leave(self) -> None:
        """Close the surgeon, or finish a commit that was interrupted; each step can be repeated."""
        if self._is_closed:
            return
        if self._plan is not None:
            self._finish_commit()
            return
        surgeons = _open.get(self.stack.container, [])
        if self in surgeons and surgeons[-1] is not self:
            raise StreamlineError(
                "A surgeon closes while a later one on the same model is still open. Close them in the opposite order "
                "of opening; the model is left as the later one has it."
            )
        self._close()
        self._sign_off()
        self._is_closed = True

    def _close(self) -> None:
        kept = self._current_plan().kept
        self._edits.close()
        self.stack = self._configs.put_back()
        self._states.follow(self.stack, kept)

    def _sign_off(self) -> None:
        """Take this surgeon off the list of open ones, and its marks off the blocks."""
        surgeons = _open.get(self.stack.container, [])
        if self in surgeons:
            surgeons.remove(self)
        if not surgeons:
            _open.pop(self.stack.container, None)
        for block in [*self.stack.blocks, *self.stack.container.children()]:
            marks = vars(block).get(ORIGIN, {})
            marks.pop(self._token, None)
            if not marks or not surgeons:  # those of surgeons that are closed, on a block that was copied inside them
                vars(block).pop(ORIGIN, None)

    def _finish_commit(self) -> None:
        """Keep what there is now, once the plan is set; each step can be repeated."""
        self._configs.keep()
        self._sign_off()
        self._edits.forget()
        self.stack = find_stack(self.model, self.stack.path)  # let go of the blocks that are gone
        self._layout, self._in_branches = Layout(list(self.stack.blocks)), {}
        self._is_closed = True

    def _require_open(self) -> None:
        if self._entered and self._plan is not None and not self._is_closed:  # a commit was interrupted
            self._finish_commit()
        surgeons = _open.get(self.stack.container, []) if self._entered else []
        if self not in surgeons:
            raise StreamlineError("The surgeon is not open; use it in a with statement, before commit().")
        if surgeons[-1] is not self:
            raise StreamlineError("A later surgeon is open on the same model; close it first.")

    def _require_alone(self) -> None:
        if _open[self.stack.container] != [self]:
            raise StreamlineError("commit() inside another open surgeon: its exit would undo it. Commit that one.")

    def _require_boundary(self, k: int, do: str) -> None:
        self._require_open()
        if not 0 <= k <= len(self.stack):
            raise StreamlineError(
                f"{do}({k!r}, ...) is out of range. Expected 0 to {len(self.stack)}, since the stack had "
                f"{len(self.stack)} blocks when the surgeon opened. Change it."
            )

    def _apply(self, layout: Layout, in_branches: InBranches | None = None) -> None:
        if not layout.arrange()[0]:
            raise StreamlineError(
                f"This would take away all {len(self.stack)} blocks of {self.stack.path}; leave at least one."
            )
        before = self._layout, self._in_branches
        present = self._kept(self._layout)
        if {*self._kept(layout)} <= {*present}:
            self._states.follow_flags(self.stack, present)
        else:  # a removed block comes back, as the others are by now
            self._states.follow(self.stack, present)
        try:
            self._edits.revert()
            self._layout, self._in_branches = layout, before[1] if in_branches is None else in_branches
            self._lay_out()
        except BaseException:
            self._edits.revert()
            self._layout, self._in_branches = before
            self._lay_out()
            raise

    def _kept(self, layout: Layout) -> list[int]:
        number = {id(block): k for k, block in enumerate(self.stack.blocks)}
        return [number[id(slot.module)] for slot in layout.arrange()[0] if id(slot.module) in number]

    def _lay_out(self) -> None:
        stand_ins = {
            k: {path: parameter for own in branches.values() for path, parameter in own.parameters.items()}
            for k, branches in self._in_branches.items()
        }
        self._edits.lay_out(*self._layout.arrange(), stand_ins)

    def _current_plan(self) -> SurgeryPlan:
        slots, at_end = self._layout.arrange()
        number = {id(block): k for k, block in enumerate(self.stack.blocks)}
        splices = []
        for new, spliced_here in enumerate([*(s.before for s in slots), at_end]):
            for module, boundary, window in spliced_here:
                splices.append(Splice(new, boundary, window, type(module).__name__))
        there = {id(module) for placed in (*(s.before for s in slots), at_end) for module, _, _ in placed}
        return SurgeryPlan(
            self.stack.path,
            len(self.stack),
            tuple(self._slot(number.get(id(s.module)), s.module) for s in slots),
            tuple(splices),
            described=self.stack.config is not None,
            dropped=tuple(type(module).__name__ for module in self._layout.earlier_modules if id(module) not in there),
        )

    def _slot(self, source: int | None, module: nn.Module) -> Slot:
        changed = self._in_branches.get(source, {}) if source is not None else {}
        silenced, folded = ([b for b, own in changed.items() if own.silent is silent] for silent in (True, False))
        return Slot(source, type(module).__name__, tuple(sorted(silenced)), tuple(sorted(folded)))

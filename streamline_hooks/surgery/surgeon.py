"""Take blocks out of a model and put others in, reversibly."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NoReturn, Self
from weakref import WeakKeyDictionary

from torch import nn

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import committed
from streamline_hooks.surgery.capture import forget_capture_hooks, lend_capture_hooks, next_hook_id
from streamline_hooks.surgery.hazards import Hazard, find_hazards
from streamline_hooks.surgery.layout import Layout, NewSlot, Placed
from streamline_hooks.surgery.placement import follow, move_beside, placement
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.surgery.rebuild import verify_rebuild
from streamline_hooks.surgery.renumber import find_index_attributes, shortened_config
from streamline_hooks.surgery.splice import AFTER, BEFORE, Place, remember_splices, set_splices, spliced
from streamline_hooks.wrapping import refuse_compiled, refuse_wrapped

_MISSING = object()
_ORIGIN = "_streamline_hooks_origin"
_tokens = itertools.count()
_open: WeakKeyDictionary[nn.Module, list[LayerSurgeon]] = WeakKeyDictionary()


class LayerSurgeon:
    """Remove, replace and insert blocks of a model inside a ``with`` statement.

    Windows are half-open ranges, and every number is the model's own as it was when the surgeon opened, whatever was
    done before in the same context. On leaving, by whatever way, the model is as it was to the bit, unless `commit`
    was called.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is neither compiled nor wrapped (DDP, FSDP): surgery comes first.
    stack : str or BlockStack, optional
        Which stack, where the model has several; see `find_stack`.

    Raises
    ------
    StreamlineError
        If the model is compiled or wrapped, or its stack is not found.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove(range(1, 3))
    ...     _ = surgeon.insert(5, torch.nn.Identity())
    ...     print(surgeon.plan)
    model.layers: 6 blocks -> 4
         0  -> 0
         3  -> 1
         4  -> 2
            -> Identity
         5  -> 3
    removed: 1, 2
    >>> len(model.model.layers)
    6
    """

    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None) -> None:
        self.model = model
        self._named_stack = stack
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise StreamlineError("This surgeon was opened before; make a new one.")
        refuse_compiled(self.model, "operate on")
        refuse_wrapped(self.model)
        path = self._named_stack.path if isinstance(self._named_stack, BlockStack) else self._named_stack
        self.stack = find_stack(self.model, path)
        self._indices = find_index_attributes(self.stack.blocks)
        self._layout = Layout(list(self.stack.blocks))
        self._origins: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._committed = False
        self._undo: list[Callable[[], None]] = []
        self._placement = [placement(block) for block in self.stack.blocks]
        self._first_hook = next_hook_id()
        self._token = next(_tokens)
        self._entered = True
        _open.setdefault(self.stack.container, []).append(self)
        for k, block in enumerate(self.stack.blocks):  # a copy made inside the context says what it is a copy of
            vars(block).setdefault(_ORIGIN, {})[self._token] = k
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        surgeons = _open.get(self.stack.container, [])
        if surgeons[-1:] != [self] and not self._committed:
            raise StreamlineError(
                "A surgeon closes while a later one on the same model is still open. Close them in the opposite order "
                "of opening; the model is left as the later one has it."
            )
        if not self._committed:
            try:
                self._close()
            except BaseException:  # Ctrl-C in the middle of it: every step can be done twice
                self._close()
                raise
            surgeons.remove(self)

    def _close(self) -> None:
        self._revert()
        self._unmark()
        forget_capture_hooks(self.model, self._first_hook)
        follow(self.stack.blocks, self.plan.kept, self._placement)

    def remove(self, window: Iterable[int], *, despite_hazards: bool = False) -> None:
        """Take a window of blocks out.

        Parameters
        ----------
        window : range
            Consecutive blocks, for instance ``range(12, 20)`` for 12 to 19.
        despite_hazards : bool
            Go on where `check` finds something against it.

        Raises
        ------
        UnsupportedSurgery
            With the hazards in words.
        StreamlineError
            If the window is empty, out of range, not consecutive, partly gone already, or everything.
        """
        self.replace(window, None, despite_hazards=despite_hazards)

    def replace(
        self, window: Iterable[int], module: nn.Module | None, *, despite_hazards: bool = False
    ) -> nn.Module | None:
        """Put a module in the place of a window of blocks.

        A module of the blocks' own class takes a slot of its own (with a cache entry, and the per-layer settings of
        the block that it is or was copied from); any other takes none. It is moved to the device and precision of
        the blocks around it.

        Parameters
        ----------
        window : range
            Consecutive blocks.
        module : torch.nn.Module or None
            Maps (batch, tokens, features) to the same shape; None removes the window.
        despite_hazards : bool
            Go on where `check` finds something against it.

        Returns
        -------
        torch.nn.Module or None
            The module that is now in the model: `module` itself, or a copy where the same block stands elsewhere.

        Raises
        ------
        UnsupportedSurgery, StreamlineError
            As `remove`.
        """
        self._require_open()
        chosen = self._window(window)
        itself = module is not None and len(chosen) == 1 and module is self.stack[chosen.start]
        hazards = [] if itself else self.check(chosen)
        if hazards and not despite_hazards:
            raise UnsupportedSurgery(
                f"Blocks {chosen.start} to {chosen.stop - 1} of {type(self.model).__name__} cannot go: "
                + "; ".join(map(str, hazards))
                + ". Choose others, or pass despite_hazards=True to go on all the same."
            )
        layout = self._layout.copy()
        if module is not None:
            module = layout.unshared(module, leaving=chosen)
        layout.give_up(chosen, module)
        self._apply(layout)
        return module

    def insert(self, k: int, module: nn.Module) -> nn.Module:
        """Run a module before block k; several at one place run in the order in which they were inserted.

        Parameters
        ----------
        k : int
            0 to L, with L (the number of blocks) for the end of the stack.
        module : torch.nn.Module
            As for `replace`.

        Returns
        -------
        torch.nn.Module
            The module that is now in the model; see `replace`.

        Raises
        ------
        StreamlineError
            If k is out of range, or inside a window that is gone.
        """
        self._require_open()
        length = len(self.stack)
        if not isinstance(k, int) or not 0 <= k <= length:
            raise StreamlineError(
                f"insert({k!r}, ...) is out of range: the stack had {length} blocks, so 0 to {length}."
            )
        layout = self._layout.copy()
        module = layout.unshared(module)
        layout.insert(k, module)
        self._apply(layout)
        return module

    def check(self, window: Iterable[int]) -> list[Hazard]:
        """Name what speaks against giving up a window, before anything is touched."""
        self._require_open()
        return find_hazards(self.stack, self._window(window))

    @property
    def plan(self) -> SurgeryPlan:
        """What the surgery has come to so far: old block, new block."""
        slots, at_end = self._layout.arrange()
        number = {id(block): k for k, block in enumerate(self.stack.blocks)}
        splices = []
        for new, spliced_here in enumerate([*(s.before for s in slots), at_end]):
            for module, boundary, window in spliced_here:
                splices.append(Splice(new, boundary, window, type(module).__name__))
        return SurgeryPlan(
            self.stack.path,
            len(self.stack),
            tuple(Slot(number.get(id(s.module)), type(s.module).__name__) for s in slots),
            tuple(splices),
        )

    def commit(self, **notes: Any) -> SurgeryPlan:
        """Make the surgery permanent.

        The model's and its configuration's class change where splices must be saved with it, so that
        ``model.save_pretrained`` writes a checkpoint that keeps them; the plan goes into the configuration.

        Parameters
        ----------
        **notes
            Further JSON values to keep with the plan, such as the calibration data's fingerprint.

        Returns
        -------
        SurgeryPlan
            What was carried out.

        Raises
        ------
        UnsupportedSurgery
            If the class, built from the shortened configuration, would be another model.
        StreamlineError
            If another surgeon is open on the same model.
        """
        self._require_open()
        if _open[self.stack.container] != [self]:
            raise StreamlineError("commit() inside another open surgeon: its exit would undo it. Commit that one.")
        plan = self.plan
        model: Any = self.model
        if self.stack.config is not None and hasattr(model, "save_pretrained"):
            model_class, config_class = committed.base_class(type(model)), committed.base_class(type(model.config))
            plain = copy.copy(model.config)
            plain.__class__ = config_class
            now = find_stack(model, self.stack.path)
            verify_rebuild(model, model_class, plain, self.stack.path, now.blocks, self._indices)
            for owner in self._savers():
                vars(owner).pop("save_pretrained", None)
            committed.settle(model, now, plan, notes)
        self._committed = True
        self._unmark()
        _open[self.stack.container].remove(self)
        return plan

    # How it is done: every operation changes the layout, and the model is taken back to the original and laid out
    # anew. Each change to the model first puts its own undoing on the list.

    def _apply(self, layout: Layout) -> None:
        slots, at_end = layout.arrange()
        if not slots:
            raise StreamlineError(
                f"This would take away all {len(self.stack)} blocks of {self.stack.path}; leave at least one."
            )
        before = self._layout
        try:
            self._revert()
            self._layout = layout
            self._lay_out(slots, at_end)
        except BaseException:
            self._revert()
            self._layout = before
            self._lay_out(*before.arrange())
            raise

    def _unmark(self) -> None:
        for block in [*self.stack.blocks, *self.stack.container.children()]:
            marks = vars(block).get(_ORIGIN, {})
            marks.pop(self._token, None)
            if not marks:
                vars(block).pop(_ORIGIN, None)

    def _lay_out(self, slots: list[NewSlot], at_end: list[Placed]) -> None:
        container = self.stack.container
        forget_capture_hooks(self.model, self._first_hook)
        original = list(container._modules.items())

        def put_back() -> None:
            container._modules.clear()
            container._modules.update(original)

        for slot in slots:
            self._source(slot.module)
        self._undo.append(put_back)
        container._modules.clear()
        container._modules.update({str(k): slot.module for k, slot in enumerate(slots)})
        for k, slot in enumerate(slots):
            for index in self._indices:
                holder = index.holder(slot.module)
                if holder is not None:
                    self._set(holder, index.name, k + index.first)
            self._splice(slot.module, BEFORE, slot.before)
            self._splice(slot.module, AFTER, at_end if k == len(slots) - 1 else [])
            if slot.module not in self.stack.blocks:
                self._undo += [h.remove for h in lend_capture_hooks(self.stack.blocks[0], slot.module)]
        self._shorten_config(slots)
        for owner in self._savers():
            self._set(owner, "save_pretrained", _refuse_saving)

    def _splice(self, block: nn.Module, place: Place, placed: list[Placed]) -> None:
        modules = [module for module, _, _ in placed]
        if list(spliced(block, place)) == modules:
            return
        for module in modules:
            move_beside(module, block)
        self._undo.append(remember_splices(block, place))
        set_splices(block, place, modules)

    def _shorten_config(self, slots: list[NewSlot]) -> None:
        config, count = self.stack.config, self.stack.count_attribute
        if config is None or count is None:
            return
        sources = [self._source(slot.module) for slot in slots]
        known = [0 if source is None else source for source in sources]
        for described in _same_descriptions(self.model, config, count):
            shortened = shortened_config(described, count, len(self.stack), known)
            if None in sources and not all(_uniform(vars(described).get(name)) for name in shortened):
                raise StreamlineError(
                    "A block that was put in does not say which block's per-layer settings it has "
                    f"({', '.join(sorted(set(shortened) - {count}))} differ from block to block). Insert a copy of one "
                    "of the model's own blocks."
                )
            for name, value in shortened.items():
                if vars(described).get(name, _MISSING) != value:
                    self._set(described, name, value)

    def _source(self, module: nn.Module) -> int | None:
        """Whose per-layer settings a block in a slot has: its own, or those of the block that it is a copy of."""
        marked = vars(module).get(_ORIGIN, {}).get(self._token)
        if marked is not None:
            return int(marked)
        origin = self._origins.get(module)
        if origin is None:  # a copy from before the surgery, by its own number; read once, since it is renumbered
            said = {getattr(h, i.name) - i.first for i in self._indices if (h := i.holder(module)) is not None}
            origin = said.pop() if len(said) == 1 else -1
            self._origins[module] = origin
        return origin if 0 <= origin < len(self.stack) else None

    def _set(self, target: Any, name: str, value: Any) -> None:
        values = vars(target)
        held = values.get(name, _MISSING)

        def put_back() -> None:
            if held is _MISSING:
                values.pop(name, None)
            else:
                values[name] = held

        self._undo.append(put_back)
        values[name] = value

    def _revert(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _savers(self) -> list[nn.Module]:
        return [m for m in self.stack.ancestors if callable(getattr(type(m), "save_pretrained", None))]

    def _window(self, window: Iterable[int]) -> range:
        length = len(self.stack)
        numbers = list(window)
        given = f"range({numbers[0]}, {numbers[-1] + 1})" if numbers else "an empty window"
        if not numbers:
            raise StreamlineError(f"There is nothing to do for {given}; give a range of blocks, such as range(3, 5).")
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise StreamlineError(
                f"A window is consecutive blocks, for instance range(3, 5); got {numbers}. Call once for each run."
            )
        if numbers[0] < 0 or numbers[-1] >= length:
            raise StreamlineError(
                f"The window {given} is out of range: the stack had {length} blocks, 0 to {length - 1}, when the "
                "surgeon opened."
            )
        return range(numbers[0], numbers[-1] + 1)

    def _require_open(self) -> None:
        surgeons = _open.get(self.stack.container, []) if self._entered else []
        if self not in surgeons:
            raise StreamlineError("The surgeon is not open; use it in a with statement, before commit().")
        if surgeons[-1] is not self:
            raise StreamlineError("A later surgeon is open on the same model; close it first.")


def _same_descriptions(model: nn.Module, config: Any, count: str) -> list[Any]:
    """Every configuration object that describes the same stack: models hand copies to their parts."""
    found = {id(config): config}
    for module in model.modules():
        other = getattr(module, "config", None)
        candidates = [other, *(vars(other).values() if hasattr(other, "to_dict") else ())]
        for candidate in candidates:
            if type(candidate) is type(config) and vars(candidate).get(count) == vars(config).get(count):
                found[id(candidate)] = candidate
    return list(found.values())


def _uniform(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(v == value[0] for v in value)
    return isinstance(value, int)


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise StreamlineError(
        "save_pretrained inside an open LayerSurgeon would write a model that its exit takes back. Call "
        "surgeon.commit() first, or leave the context to save the original."
    )

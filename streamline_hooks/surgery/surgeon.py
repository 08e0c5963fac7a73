"""Take blocks out of a model and put others in, reversibly."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import committed
from streamline_hooks.surgery.diagnosis import diagnose
from streamline_hooks.surgery.edits import ORIGIN, Edits
from streamline_hooks.surgery.hazards import Hazard, find_hazards, find_numbering_hazards
from streamline_hooks.surgery.layout import Layout, require_module, window_of
from streamline_hooks.surgery.placement import follow, placement
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.surgery.probe import CACHE, gives, logits_of_probe, observe, shortfall, undisturbed
from streamline_hooks.surgery.saving import saver_depth, savers
from streamline_hooks.surgery.silence import Zeros, find_zeros, observe_silenced, require_branch
from streamline_hooks.wrapping import refuse_compiled, refuse_wrapped

_open: WeakKeyDictionary[nn.Module, list[LayerSurgeon]] = WeakKeyDictionary()  # by container


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
    probe : bool
        Hold each removal in a Transformers model against the same blocks bypassed, on a few tokens, and refuse it
        where the shorter model gives something else (about ten forwards of 16 tokens).

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

    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None, *, probe: bool = True) -> None:
        self.model = model
        self._probe = probe
        self._named_stack = stack
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise StreamlineError("This surgeon was opened before; make a new one.")
        refuse_compiled(self.model, "operate on")
        refuse_wrapped(self.model)
        self.stack = self._find()
        self._layout = Layout(list(self.stack.blocks))
        self._silenced: dict[int, dict[Branch, Zeros]] = {}
        self._plan: SurgeryPlan | None = None
        self._placement = [placement(block) for block in self.stack.blocks]
        self._token = uuid.uuid4().hex  # a pickled block carries it into other processes
        self._edits = Edits(self.stack, self._token)
        surgeons = _open.setdefault(self.stack.container, [])
        try:
            surgeons.append(self)
            known = {surgeon._token for surgeon in surgeons}
            for k, block in enumerate(self.stack.blocks):  # a copy made inside the context says what it is a copy of
                marks = {token: old for token, old in vars(block).get(ORIGIN, {}).items() if token in known}
                vars(block)[ORIGIN] = {**marks, self._token: k}
        except BaseException:
            self._sign_off()
            raise
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._plan is not None:
            return
        if _open.get(self.stack.container, [])[-1:] != [self]:
            raise StreamlineError(
                "A surgeon closes while a later one on the same model is still open. Close them in the opposite order "
                "of opening; the model is left as the later one has it."
            )
        try:
            self._close()
        except BaseException:  # Ctrl-C in the middle of it: every step can be done twice
            self._close()
            raise
        finally:
            self._sign_off()

    def _find(self) -> BlockStack:
        if not isinstance(self._named_stack, BlockStack):
            return find_stack(self.model, self._named_stack)
        found = find_stack(self.model, self._named_stack.path)
        if found.container is not self._named_stack.container:
            raise StreamlineError(
                f"The stack {self._named_stack.path!r} is of another model. Find it in this one, or give its path."
            )
        return found

    def _close(self) -> None:
        kept = self._current_plan().kept
        self._edits.close()
        follow(self.stack.blocks, kept, self._placement)

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
            if not marks:
                vars(block).pop(ORIGIN, None)

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
        the block that it is or was copied from); any other takes none. It is given the device, the precision and the
        mode (training or evaluation) of the blocks around it.

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
        chosen = window_of(window, len(self.stack))
        if module is not None:
            require_module(module)
        itself = module is not None and len(chosen) == 1 and module is self.stack[chosen.start]
        hazards = [] if itself else find_hazards(self.stack, chosen)
        what = f"Blocks {chosen.start} to {chosen.stop - 1} of {type(self.model).__name__}"
        self._refuse(f"{what} cannot go", hazards, despite_hazards)
        layout = self._layout.copy()
        if module is not None:
            module = layout.unshared(module, leaving=chosen)
        if self._probe and not despite_hazards and not (module is not None and layout.takes_slot(module)):
            self._hold_against_truth(chosen, what)
        layout.give_up(chosen, module)
        self._apply(layout)
        return module

    def insert(self, k: int, module: nn.Module, *, despite_hazards: bool = False) -> nn.Module:
        """Run a module before block k; several at one place run in the order in which they were inserted.

        Parameters
        ----------
        k : int
            0 to L, with L (the number of blocks) for the end of the stack.
        module : torch.nn.Module
            As for `replace`.
        despite_hazards : bool
            Go on where the blocks behind it depend on their number.

        Returns
        -------
        torch.nn.Module
            The module that is now in the model; see `replace`.

        Raises
        ------
        UnsupportedSurgery
            If a block that takes a slot would change blocks that depend on their number.
        StreamlineError
            If k is out of range, or inside a window that is gone.
        """
        self._require_open()
        k, length = operator.index(k), len(self.stack)
        if not 0 <= k <= length:
            raise StreamlineError(
                f"insert({k!r}, ...) is out of range: the stack had {length} blocks, so 0 to {length}."
            )
        require_module(module)
        if self._layout.takes_slot(module):
            hazards = find_numbering_hazards(self.stack, k)
            self._refuse(f"Nothing can take a slot before block {k}", hazards, despite_hazards)
        layout = self._layout.copy()
        module = layout.unshared(module)
        layout.insert(k, module)
        self._apply(layout)
        return module

    def silence(self, k: int, branch: str, *, batch: Batch | Tensor | None = None) -> None:
        """Let one residual branch of a block add nothing any more.

        The branch's output projections are at zero (in a mixture, those of all experts); the block keeps its slot,
        and the checkpoint is a plain one. What is silent already stays so.

        Parameters
        ----------
        k : int
            The block, in the numbering when the surgeon opened.
        branch : {"attention", "mlp"}
            "attention" is whatever mixes tokens, such as linear attention, a convolution or a state space.
        batch : mapping or torch.Tensor, optional
            What to run a model on that cannot be run on tokens alone, without padding.

        Raises
        ------
        UnsupportedSurgery
            If the block has not the usual two residual branches, if a projection is a part of something else too, or
            if the model gives something else than without what the branch adds.
        StreamlineError
            If there is no such block or branch, or the block is gone.
        """
        self._require_open()
        k, name = operator.index(k), require_branch(branch)
        if not 0 <= k < len(self.stack):
            raise StreamlineError(
                f"silence({k!r}, ...) is out of range: the stack had {len(self.stack)} blocks, 0 to "
                f"{len(self.stack) - 1}, when the surgeon opened."
            )
        block = self.stack[k]
        if k not in self._current_plan().kept:
            raise StreamlineError(f"Block {k} cannot be silenced: it is gone already.")
        if name in self._silenced.get(k, {}):
            return
        zeros = find_zeros(self.stack, k, name, batch)
        truth = observe_silenced(self.model, block, zeros) if self._probe and saver_depth(self.stack) == 0 else None
        before = self._silenced
        self._apply(self._layout, {**before, k: {**before.get(k, {}), name: zeros}})
        wrong = shortfall(truth, self.model) if truth is not None else None
        if wrong:
            self._apply(self._layout, before)
            raise UnsupportedSurgery(
                f"The {name} branch of block {k} cannot be silenced: with its output projections at zero {wrong}. "
                "Choose another one.",
                "probe",
            )

    def check(self, window: Iterable[int]) -> list[Hazard]:
        """Name what speaks against giving up a window, and leave the model as it is.

        Parameters
        ----------
        window : range
            Consecutive blocks.

        Returns
        -------
        list of Hazard
            What is known from looking at the model: ``"tied-blocks"``, ``"shared-keys"``, ``"position-bias"``,
            ``"per-layer-embeddings"``, ``"derived-settings"``, ``"scale-by-number"``. Else, where the shorter model
            gives something else than the bypassed one, what explains it: ``"number-computes"``,
            ``"looped-blocks"``, ``"split-blocks"``, ``"side-state"``, ``"attributes-read"``,
            ``"absolute-numbers"``, ``"cache"``, ``"not-run"``, or ``"probe"`` where nothing does. Else, where it is
            right in memory but would come back from a checkpoint as another model, ``"built-from-number"`` or
            ``"configuration"``.
        """
        self._require_open()
        chosen = window_of(window, len(self.stack))
        known = find_hazards(self.stack, chosen)
        if known:
            return known
        layout, before = self._layout.copy(), self._layout
        layout.give_up(chosen, None)
        try:
            self._hold_against_truth(chosen, "These blocks")
            self._apply(layout)
            depth = saver_depth(self.stack)
            if depth is not None:
                committed.prepare_to_settle(self.stack, depth, self._current_plan(), self._edits.indices, {})
        except UnsupportedSurgery as error:
            return [Hazard(error.cause, str(error).removeprefix("These blocks cannot go: "))]
        finally:
            self._apply(before)
        return []

    @property
    def plan(self) -> SurgeryPlan:
        """What the surgery has come to so far: old block, new block."""
        return self._plan if self._plan is not None else self._current_plan()

    def _current_plan(self) -> SurgeryPlan:
        slots, at_end = self._layout.arrange()
        number = {id(block): k for k, block in enumerate(self.stack.blocks)}
        splices = []
        for new, spliced_here in enumerate([*(s.before for s in slots), at_end]):
            for module, boundary, window in spliced_here:
                splices.append(Splice(new, boundary, window, type(module).__name__))
        return SurgeryPlan(
            self.stack.path,
            len(self.stack),
            tuple(self._slot(number.get(id(s.module)), s.module) for s in slots),
            tuple(splices),
            described=self.stack.config is not None,
        )

    def _slot(self, source: int | None, module: nn.Module) -> Slot:
        silenced = self._silenced.get(source, {}) if source is not None else {}
        return Slot(source, type(module).__name__, tuple(sorted(silenced)))

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
        depth = saver_depth(self.stack)
        if depth is not None:
            committed.settle(self.stack, depth, plan, self._edits.indices, notes)
        try:
            for owner in savers(self.stack):
                vars(owner).pop("save_pretrained", None)
        finally:
            self._plan = plan
            self._sign_off()
            self._edits.forget()
            self.stack = find_stack(self.model, self.stack.path)  # let go of the blocks that are gone
            self._layout, self._silenced = Layout(list(self.stack.blocks)), {}
        return plan

    # How it is done: every operation changes the layout, and the model is taken back to the original and laid out
    # anew. Each change to the model first puts its own undoing on the list.

    def _apply(self, layout: Layout, silenced: dict[int, dict[Branch, Zeros]] | None = None) -> None:
        if not layout.arrange()[0]:
            raise StreamlineError(
                f"This would take away all {len(self.stack)} blocks of {self.stack.path}; leave at least one."
            )
        before = self._layout, self._silenced
        try:
            self._edits.revert()
            self._layout, self._silenced = layout, before[1] if silenced is None else silenced
            self._lay_out()
        except BaseException:
            self._edits.revert()
            self._layout, self._silenced = before
            self._lay_out()
            raise

    def _lay_out(self) -> None:
        zeros = {
            k: {p: z for own in branches.values() for p, z in own.items()} for k, branches in self._silenced.items()
        }
        self._edits.lay_out(*self._layout.arrange(), zeros)

    def _hold_against_truth(self, window: range, what: str) -> None:
        """Compare plain removal with the bypassed window; what will stand in its place changes nothing about that."""
        removed, before = self._layout.copy(), self._layout
        removed.give_up(window, None)
        going = before.earlier_at_end if window.stop == len(self.stack) else ()
        truth = observe(self.stack, window, going) if saver_depth(self.stack) == 0 else None
        if truth is None:
            return
        self._apply(removed)
        try:
            wrong = shortfall(truth, self.model)
            in_question = wrong is not None and wrong != CACHE
            computing = self._edits.numbers_that_compute(lambda: gives(truth, self.model)) if in_question else ()
        finally:
            self._apply(before)
        if wrong:
            reason = self._reason(window, wrong, computing)
            raise UnsupportedSurgery(f"{what} cannot go: without them {wrong}: {reason}. Choose others.", reason.cause)

    def _reason(self, window: range, wrong: str, computing: Sequence[str]) -> Hazard:
        if wrong == CACHE:
            return Hazard("cache", "the cache counts on a block's number or kind")
        if computing:
            return Hazard("number-computes", f"blocks compute with their own number ({', '.join(computing)})")
        with undisturbed(self.model):
            found = diagnose(self.stack, window, lambda: logits_of_probe(self.model))
        return found or Hazard("probe", "it counts on a block's number or on what those blocks leave behind")

    def _refuse(self, what: str, hazards: list[Hazard], despite: bool) -> None:
        if hazards and not despite:
            raise UnsupportedSurgery(
                f"{what}: {'; '.join(map(str, hazards))}. Choose others, or pass despite_hazards=True to go on all "
                "the same."
            )

    def _require_open(self) -> None:
        surgeons = _open.get(self.stack.container, []) if self._entered else []
        if self not in surgeons:
            raise StreamlineError("The surgeon is not open; use it in a with statement, before commit().")
        if surgeons[-1] is not self:
            raise StreamlineError("A later surgeon is open on the same model; close it first.")

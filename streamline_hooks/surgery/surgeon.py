"""Take blocks out of a model and put others in, reversibly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.surgery import committed
from streamline_hooks.surgery.branch_surgery import BranchSurgery
from streamline_hooks.surgery.edits import Edits
from streamline_hooks.surgery.hazards import Hazard, find_dependents, find_hazards, find_insertion_hazards
from streamline_hooks.surgery.held_to_truth import against_truth
from streamline_hooks.surgery.layout import window_of
from streamline_hooks.surgery.plain_module import record_surgery
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.saving import saver_depth, savers


class LayerSurgeon(BranchSurgery):
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

    @checked()
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
        itself = module is not None and len(chosen) == 1 and module is self.stack[chosen.start]
        hazards = [] if itself else find_hazards(self.stack, chosen)
        what = f"Blocks {chosen.start} to {chosen.stop - 1} of {type(self.model).__name__}"
        self._refuse(f"{what} cannot go", hazards, despite_hazards)
        layout = self._layout.copy()
        if module is not None:
            module = layout.unshared(module, leaving=chosen)
        if self.probe and not despite_hazards and not (module is not None and layout.takes_slot(module)):
            self._hold_against_truth(chosen, what)
        if itself:
            layout.exchange(chosen.start, cast(nn.Module, module))
        else:
            layout.give_up(chosen, module)
        self._apply(layout)
        return module

    @checked()
    def exchange(self, k: int, block: nn.Module, *, despite_hazards: bool = False) -> nn.Module:
        """Put a block in the place of block k that does the same with other weights, such as a trained copy of it.

        What an earlier surgery spliced in beside block k stays, where `replace` takes away what stood behind the last
        block: a stand-in is for all of what a window did.

        Parameters
        ----------
        k : int
        block : torch.nn.Module
            Of the blocks' own class, or one that derives from it.
        despite_hazards : bool
            Go on where other blocks depend on block k.

        Returns
        -------
        torch.nn.Module
            The block that is now in the model, see `replace`.

        Raises
        ------
        UnsupportedSurgery
            If other blocks depend on block k, for instance by sharing parameters with it.
        StreamlineError
            If k is out of range or gone, or the module is no such block.
        """
        self._require_open()
        chosen = window_of([k], len(self.stack))
        what = f"Block {k} of {type(self.model).__name__} cannot be exchanged"
        self._refuse(what, find_dependents(self.stack, chosen), despite_hazards)
        layout = self._layout.copy()
        if not layout.takes_slot(block):
            raise StreamlineError(
                f"A {type(block).__name__} cannot be exchanged for block {k}: expected a "
                f"{type(self.stack[k]).__name__}, as the model's own blocks are. Use replace."
            )
        block = layout.unshared(block, leaving=chosen)
        layout.exchange(k, block)
        self._apply(layout)
        return block

    @checked()
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
            If a block that takes a slot would change blocks that depend on their number or on the first block.
        StreamlineError
            If k is out of range, or inside a window that is gone.
        """
        self._require_boundary(k, "insert")
        if self._layout.takes_slot(module):
            hazards = find_insertion_hazards(self.stack, k, len(self._layout.arrange()[0]) + 1)
            self._refuse(f"Nothing can take a slot before block {k}", hazards, despite_hazards)
        layout = self._layout.copy()
        module = layout.unshared(module)
        layout.insert(k, module)
        self._apply(layout)
        return module

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
            ``"per-layer-embeddings"``, ``"derived-settings"``, ``"scale-by-number"``, ``"features-by-number"``,
            ``"quantized-by-number"``. Else, where the shorter model gives something else than the bypassed one, what
            explains it: ``"number-computes"``, ``"looped-blocks"``, ``"split-blocks"``, ``"side-state"``,
            ``"attributes-read"``, ``"absolute-numbers"``, ``"cache"``, ``"not-run"``, or ``"probe"`` where nothing
            does. Else, where it is right in memory but would come back from a checkpoint as another model,
            ``"built-from-number"`` or ``"configuration"``.
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

    def commit(self, **notes: Any) -> SurgeryPlan:
        """Make the surgery permanent.

        The class of a Transformers model and of its configuration change where splices must be saved with it, so that
        ``model.save_pretrained`` writes a checkpoint that keeps them; the plan goes into the configuration. Any other
        model keeps its class and carries the plan itself, for `streamline_hooks.save`.

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
            If another surgeon is open on the same model, or the notes are no JSON values.
        """
        self._require_open()
        self._require_alone()
        plan = self.plan
        depth = saver_depth(self.stack)
        done = self._edits.remember_class(self.stack.ancestors[depth or 0])
        try:
            if depth is not None:
                committed.settle(self.stack, depth, plan, self._edits.indices, notes)
            else:
                record_surgery(self.stack.model, plan, notes)
            for owner in savers(self.stack):
                vars(owner).pop("save_pretrained", None)
            self._plan = plan
        except BaseException:
            self._plan = None
            self._edits.revert(done)
            raise
        self._finish_commit()
        return plan

    def _hold_against_truth(self, window: range, what: str) -> None:
        layout, before = self._layout.copy(), self._layout
        layout.give_up(window, None)

        @contextmanager
        def removed() -> Iterator[Edits]:
            self._apply(layout)
            try:
                yield self._edits
            finally:
                self._apply(before)

        going = before.earlier_at_end if window.stop == len(self.stack) else ()
        found = against_truth(self.stack, window, going, removed)
        if found is not None:
            wrong, reason = found
            raise UnsupportedSurgery(f"{what} cannot go: without them {wrong}: {reason}. Choose others.", reason.cause)

    def _refuse(self, what: str, hazards: list[Hazard], despite: bool) -> None:
        if hazards and not despite:
            raise UnsupportedSurgery(
                f"{what}: {'; '.join(map(str, hazards))}. Choose others, or pass despite_hazards=True to go on all "
                "the same."
            )

"""Remove, replace, insert, zero, fold and scale the blocks of a model, reversibly."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, UnsupportedSurgery, describe_blocks, validate_arguments
from streamline_hooks.modeling import BlockStack, Branch, ProbeFailedError
from streamline_hooks.surgery import commit
from streamline_hooks.surgery.fold import (
    divided,
    find_folding,
    find_projections,
    power_of_two_beyond,
    require_folded,
    require_map,
    scaled_logits,
    scaled_logits_allclose,
)
from streamline_hooks.surgery.hazards import Hazard, find_dependency_hazards, find_hazards, find_insertion_hazards
from streamline_hooks.surgery.layout import StackLayout, checked_window
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.probe import find_mismatch
from streamline_hooks.surgery.save_guard import saved_model_depth
from streamline_hooks.surgery.session import Session
from streamline_hooks.surgery.verify import compare_insertion, compare_with_reference
from streamline_hooks.surgery.zeroed_branches import ParameterSwap, find_zeros, observe_zeroed


class LayerSurgeon:
    """Change the blocks of a model inside a ``with`` statement.

    Windows are half-open ranges. Every index refers to the model as it was when the surgeon opened, regardless of
    earlier operations in the same context. When the context is left, including by an exception or Ctrl-C, the model is
    restored bit for bit, unless `commit` was called.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is neither compiled nor wrapped in DDP or FSDP. Wrap it after the surgery.
    stack : str or BlockStack, optional
        Stack of blocks to change, if the model has several; see `find_stack`.
    probe : bool
        Compare every removal in a Transformers model with the same blocks bypassed, on a few tokens, and refuse it if
        the outputs differ. This costs about ten forward passes of 16 tokens.

    Raises
    ------
    StreamlineError
        If the model is compiled or wrapped, or the stack is not found.

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

    @validate_arguments()
    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None, *, probe: bool = True) -> None:
        self.model = model
        self.probe = probe
        self._named_stack = stack
        self._session: Session | None = None

    def __enter__(self) -> Self:
        if self._session is not None:
            raise StreamlineError("This LayerSurgeon was opened before. Create a new one.")
        session = Session(self.model, self._named_stack)
        try:
            session.open()
            self._session = session
            return self
        except BaseException:
            session.undo_open()
            self._session = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._entered().close()
        except StreamlineError:
            raise
        except BaseException:  # Ctrl-C, for instance: close() can be repeated from any point
            self._entered().close()
            raise

    @property
    def stack(self) -> BlockStack:
        """The stack with the blocks that it had when the surgeon opened."""
        return self._entered().stack

    @property
    def plan(self) -> SurgeryPlan:
        """The plan of the surgery so far."""
        return self._entered().plan

    def remove(self, window: Iterable[int], *, despite_hazards: bool = False) -> None:
        """Remove a window of blocks.

        Parameters
        ----------
        window : range
            Consecutive blocks, for instance ``range(12, 20)`` for blocks 12 to 19.
        despite_hazards : bool
            Proceed even if `check` reports hazards.

        Raises
        ------
        UnsupportedSurgery
            If `check` reports hazards.
        StreamlineError
            If the window is empty, out of range, not consecutive, partly removed already, or covers the whole stack.
        """
        self.replace(window, None, despite_hazards=despite_hazards)

    @validate_arguments()
    def replace(
        self, window: Iterable[int], module: nn.Module | None, *, despite_hazards: bool = False
    ) -> nn.Module | None:
        """Replace a window of blocks by a module.

        A module of the same class as the blocks takes a slot of its own: it has a cache entry, and the per-layer
        settings of the block that it is or was copied from. Any other module takes no slot. The module is moved to the
        device, dtype and mode (training or evaluation) of the neighboring blocks.

        Parameters
        ----------
        window : range
            Consecutive blocks.
        module : torch.nn.Module or None
            Module that maps (batch, tokens, features) to the same shape. None removes the window.
        despite_hazards : bool
            Proceed even if `check` reports hazards.

        Returns
        -------
        torch.nn.Module or None
            The module that is now in the model: `module`, or a copy of it if `module` is in the model already.

        Raises
        ------
        UnsupportedSurgery, StreamlineError
            As for `remove`.
        """
        session = self._open()
        chosen = checked_window(window, len(session.stack))
        is_same_block = module is not None and len(chosen) == 1 and module is session.stack[chosen.start]
        subject = f"{describe_blocks(chosen).capitalize()} of {type(self.model).__name__}"
        if not despite_hazards:
            self._refuse(f"{subject} cannot be removed", [] if is_same_block else find_hazards(session.stack, chosen))
        layout = session.layout.copy()
        if module is not None:
            module = layout.copy_if_present(module, leaving=chosen)
        if self.probe and not despite_hazards:
            # A block in a slot of its own shifts the later blocks by one less.
            shifted = chosen if module is None or not layout.takes_slot(module) else chosen[1:]
            if shifted:
                self._verify_removal(session, shifted, subject)
        if module is not None and is_same_block:
            layout.exchange(chosen.start, module)
        else:
            layout.replace_window(chosen, module)
        session.apply(layout, session.branch_swaps)
        return module

    @validate_arguments()
    def exchange(self, k: int, block: nn.Module, *, despite_hazards: bool = False) -> nn.Module:
        """Replace block k by a block with the same function and other weights, such as a trained copy of it.

        Modules that an earlier surgery spliced in after block k are kept. In contrast, `replace` removes those at the
        end of the stack, because a replacement covers everything between the window's input and output.

        Parameters
        ----------
        k : int
            Index of the block.
        block : torch.nn.Module
            Block of the same class as the model's blocks, or of a subclass.
        despite_hazards : bool
            Proceed even if other blocks depend on block k.

        Returns
        -------
        torch.nn.Module
            The block that is now in the model; see `replace`.

        Raises
        ------
        UnsupportedSurgery
            If other blocks depend on block k, for instance by sharing parameters with it.
        StreamlineError
            If block k is out of range or removed, or `block` is of another class.
        """
        session = self._open()
        chosen = checked_window([k], len(session.stack))
        if not despite_hazards:
            subject = f"Block {k} of {type(self.model).__name__} cannot be exchanged"
            self._refuse(subject, find_dependency_hazards(session.stack, chosen))
        layout = session.layout.copy()
        if not layout.takes_slot(block):
            raise StreamlineError(
                f"A {type(block).__name__} cannot be exchanged for block {k}. Expected a "
                f"{type(session.stack[k]).__name__}, the class of the model's blocks. Use replace for other modules."
            )
        block = layout.copy_if_present(block, leaving=chosen)
        layout.exchange(k, block)
        session.apply(layout, session.branch_swaps)
        return block

    @validate_arguments()
    def insert(self, k: int, module: nn.Module, *, despite_hazards: bool = False) -> nn.Module:
        """Run a module before block k. Modules inserted at the same position run in the order of insertion.

        Parameters
        ----------
        k : int
            Position from 0 to L, where L (the number of blocks) is the end of the stack.
        module : torch.nn.Module
            As for `replace`.
        despite_hazards : bool
            Proceed even if later blocks depend on their index, which a run with the module bypassed shows too.

        Returns
        -------
        torch.nn.Module
            The module that is now in the model; see `replace`.

        Raises
        ------
        UnsupportedSurgery
            If `module` takes a slot and the model depends on the indices of its blocks or on the first block.
        StreamlineError
            If k is out of range or inside a removed window.
        """
        session = self._open_at(k, "insert")
        layout = session.layout.copy()
        if layout.takes_slot(module) and not despite_hazards:
            hazards = find_insertion_hazards(session.stack, k, len(layout.arrange()[0]) + 1)
            self._refuse(f"No module can take a slot before block {k}", hazards)
        module = layout.copy_if_present(module)
        layout.insert(k, module)
        if self.probe and not despite_hazards and layout.takes_slot(module):
            self._verify_insertion(session, layout, k, module)
        session.apply(layout, session.branch_swaps)
        return module

    @validate_arguments()
    def zero_branch(self, k: int, branch: Branch, *, batch: Batch | Tensor | None = None) -> None:
        """Zero the output of one residual branch of a block.

        The output projections of the branch are replaced by zeros; in a mixture of experts, those of all experts. The
        block keeps its slot, and the checkpoint keeps the format of its architecture. A second call has no effect.

        Parameters
        ----------
        k : int
            Index of the block when the surgeon opened.
        branch : {"attention", "mlp"}
            "attention" is any branch that mixes tokens: attention, linear attention, a convolution or a state space.
        batch : mapping or torch.Tensor, optional
            Model input without padding. Required for a model that cannot be probed without one.

        Raises
        ------
        UnsupportedSurgery
            If the block does not have exactly two residual branches, if a projection is shared with another module, or
            if the outputs differ from those of the model with the output of the branch removed.
        StreamlineError
            If there is no such block or branch, or the block was removed.
        """
        session = self._open_with(k, "zero_branch")
        if session.is_zeroed(k, branch):
            return
        zeros = find_zeros(session.stack, k, branch, batch)
        depth = saved_model_depth(session.stack) if self.probe else None
        model = None if depth is None else session.stack.ancestors[depth]
        reference = None if model is None else observe_zeroed(model, session.stack[k], zeros)
        with session.applied(changes={(k, branch): ParameterSwap(zeros, is_zero=True)}, keep=True):
            mismatch = None if model is None or reference is None else find_mismatch(reference, model, "it must")
            if mismatch:
                raise UnsupportedSurgery(
                    f"The {branch} branch of block {k} cannot be zeroed: with its output projections at zero "
                    f"{mismatch}. Choose another block or branch.",
                    "probe",
                )

    @validate_arguments()
    def fold(self, k: int, map_: Tensor, branch: Branch = "mlp", *, batch: Batch | Tensor | None = None) -> None:
        """Multiply the output of one residual branch of a block by a map.

        If the branch adds m to the state of a token, it adds ``m @ map_`` afterwards. The map is multiplied into the
        output projections of the branch, including biases and all experts, which keep their dtype. There is no new
        parameter, and the checkpoint keeps the format of its architecture. Folding a second map gives
        ``m @ first @ second``. A zeroed branch stays zero, whether it is zeroed before or after folding.

        Parameters
        ----------
        k : int
            Index of the block when the surgeon opened.
        map_ : torch.Tensor
            Map of shape (features, features).
        branch : {"attention", "mlp"}
            As for `zero_branch`.
        batch : mapping or torch.Tensor, optional
            As for `zero_branch`.

        Raises
        ------
        UnsupportedSurgery
            If the block does not have exactly two residual branches, if a norm or a per-feature scale follows the
            branch (Gemma 2 and 3), if a projection is shared with another module or quantized, or if the result
            differs from applying the map separately.
        StreamlineError
            If there is no such block or branch, the block was removed, or the map has another shape.

        Notes
        -----
        Folding costs two forward passes of 16 tokens and about twenty of the block.

        Examples
        --------
        >>> import torch
        >>> from streamline_hooks import LayerSurgeon
        >>> from streamline_hooks.testing import tiny_model
        >>> model = tiny_model("llama", blocks=3)
        >>> with LayerSurgeon(model) as surgeon:
        ...     surgeon.fold(1, 2 * torch.eye(model.config.hidden_size))
        ...     print(surgeon.plan)
        model.layers: 3 blocks -> 3
             0  -> 0
             1  -> 1 with mlp folded
             2  -> 2
        """
        session = self._open_with(k, "fold")
        map64 = require_map(map_)
        if session.is_zeroed(k, branch):
            return
        folding = find_folding(session.stack, k, branch, map64, batch)
        with session.applied(changes={(k, branch): ParameterSwap(folding.parameters, is_zero=False)}, keep=True):
            require_folded(session.stack, k, branch, folding, batch)

    @validate_arguments(factor="(0, inf)")
    def scale(self, k: int, factor: float, *, batch: Batch | Tensor | None = None) -> None:
        """Multiply the state that block k receives by a factor, without a new parameter.

        The outputs of all branches from block k on are divided by the factor instead. This is equivalent for the norms,
        and therefore for the logits. The embeddings, which may be tied to the head, do not change. The logits are
        always verified, even with ``probe=False``. A module inserted later after this position receives the divided
        state.

        Parameters
        ----------
        k : int
            Position from 0 to L, where L (the number of blocks) is the end of the stack.
        factor : float
            Positive factor.
        batch : mapping or torch.Tensor, optional
            As for `zero_branch`.

        Raises
        ------
        UnsupportedSurgery
            If a later block does not have exactly two residual branches, a norm follows one of them, or a new block was
            inserted after this position; or if the logits differ from those with the state multiplied, because a module
            reads the state without a norm, or the eps of a norm is not negligible.
        StreamlineError
            If k is out of range or inside a removed window, or the factor is not positive.
        """
        session = self._open_at(k, "scale")
        factor = float(factor)
        if factor == 1:
            return
        subject = f"The state before block {k} of {type(self.model).__name__} cannot be multiplied by {factor:.4g}"
        if session.layout.takes_slot_after(k):
            raise UnsupportedSurgery(f"{subject}: a new block was inserted after it. Scale first.", "scale")
        later_blocks = [source for source in session.layout.kept() if source >= k]
        projections = find_projections(session.stack, later_blocks, subject, batch)
        # An offloaded parameter that this surgery has changed already is known by its swap alone.
        swapped = {key: swap.parameters for key, swap in session.branch_swaps.items()}
        nonzero = {
            key: swapped.get(key, parameters) for key, parameters in projections.items() if not session.is_zeroed(*key)
        }
        trial = power_of_two_beyond(factor)
        try:
            expected = scaled_logits(
                session.stack, batch, trial, session.stack[later_blocks[0]] if later_blocks else None
            )
            with session.applied(changes=divided(nonzero, trial), keep=False):
                scaled = scaled_logits(session.stack, batch)
        except ProbeFailedError as error:
            raise UnsupportedSurgery(
                f"{subject}: the model fails with a factor of {trial:g} ({error}).", "scale"
            ) from error
        if not scaled_logits_allclose(scaled, expected):
            raise UnsupportedSurgery(
                f"{subject}: dividing the outputs of the later branches by {trial:g} gives other logits than "
                f"multiplying the state by {trial:g}. A module reads the state without a norm, or with a norm whose "
                "eps is not negligible. Choose another position.",
                "scale",
            )
        session.apply(session.layout, {**session.branch_swaps, **divided(nonzero, factor)})

    def check(self, window: Iterable[int]) -> list[Hazard]:
        """List the hazards of removing a window, without changing the model.

        Parameters
        ----------
        window : range
            Consecutive blocks.

        Returns
        -------
        list of Hazard
            Hazards that the structure of the model shows: ``"tied-blocks"``, ``"shared-keys"``, ``"shared-choices"``,
            ``"position-bias"``, ``"per-layer-embeddings"``, ``"derived-settings"``, ``"scale-by-index"``,
            ``"features-by-index"``, ``"quantized-by-index"``, ``"decoder-cache"``. If there are none and the outputs of
            the shorter model differ from those of the bypassed one, the reason: ``"computes-with-index"``,
            ``"looped-blocks"``, ``"split-blocks"``, ``"extra-state"``, ``"attributes-read-outside"``,
            ``"absolute-indices"``, ``"cache"``, ``"cannot-run"``, or ``"probe"`` if the reason is unknown. If the
            outputs are equal but a checkpoint of the shorter model would be loaded as another model:
            ``"built-from-index"`` or ``"configuration"``.
        """
        session = self._open()
        chosen = checked_window(window, len(session.stack))
        hazards = find_hazards(session.stack, chosen)
        if hazards:
            return hazards
        layout = session.layout.copy()
        layout.replace_window(chosen, None)
        try:
            self._verify_removal(session, chosen, "These blocks")
            with session.applied(layout, keep=False):
                depth = saved_model_depth(session.stack)
                if depth is not None:
                    commit.prepare_commit(session.stack, depth, session.plan, session.edits.indices, {})
        except UnsupportedSurgery as error:
            return [Hazard(error.cause, str(error).removeprefix("These blocks cannot be removed: "))]
        return []

    def commit(self, **notes: Any) -> SurgeryPlan:
        """Make the surgery permanent.

        If there are splices, a Transformers model and its configuration get new classes, so that
        ``model.save_pretrained`` writes a checkpoint with the splices; the plan is stored in the configuration. Any
        other model keeps its class, and the plan is stored on the module itself for `streamline_hooks.save`.

        Parameters
        ----------
        **notes
            Further JSON values to store with the plan, such as a fingerprint of the calibration data.

        Returns
        -------
        SurgeryPlan
            The committed plan.

        Raises
        ------
        UnsupportedSurgery
            If the class, built from the shortened configuration, would be a different model.
        StreamlineError
            If another surgeon is open on the same model, or the notes are not JSON values.
        """
        return self._open().commit(notes)

    def _entered(self) -> Session:
        if self._session is None:
            raise StreamlineError("The LayerSurgeon is not open. Use it inside a with statement, before commit().")
        return self._session

    def _open(self) -> Session:
        session = self._entered()
        session.require_open()
        return session

    def _open_at(self, k: int, method: str) -> Session:
        """Return the open session, or raise if the position before block k does not exist."""
        session = self._open()
        if not 0 <= k <= len(session.stack):
            raise StreamlineError(
                f"{method}({k!r}, ...) is out of range. Expected 0 to {len(session.stack)}, since the stack had "
                f"{len(session.stack)} blocks when the surgeon opened. Change the position."
            )
        session.layout.require_boundary(k)
        return session

    def _open_with(self, k: int, method: str) -> Session:
        """Return the open session, or raise if block k is not in the model."""
        session = self._open()
        kept = session.layout.kept()
        if k not in kept:
            raise StreamlineError(
                f"{method}({k!r}, ...): block {k!r} does not exist or was removed. Expected one of {kept}, the indices "
                "when the surgeon opened. Choose one of these blocks."
            )
        return session

    def _verify_removal(self, session: Session, window: range, subject: str) -> None:
        """Raise `UnsupportedSurgery` if the model without a window differs from the model with the window bypassed."""
        layout = session.layout.copy()
        layout.replace_window(window, None)
        dropped = session.layout.earlier_at_end if window.stop == len(session.stack) else ()
        difference = compare_with_reference(
            session.stack, window, dropped, partial(session.applied, layout, keep=False)
        )
        if difference is not None:
            wrong, reason = difference
            raise UnsupportedSurgery(
                f"{subject} cannot be removed: afterwards {wrong}: {reason}. Choose other blocks.", reason.cause
            )

    def _verify_insertion(self, session: Session, layout: StackLayout, k: int, block: nn.Module) -> None:
        """Raise `UnsupportedSurgery` if the model with a bypassed block before block k differs from the model."""
        difference = compare_insertion(session.stack, k, block, partial(session.applied, layout, keep=False))
        if difference is not None:
            wrong, reason = difference
            raise UnsupportedSurgery(
                f"No module can take a slot before block {k} of {type(self.model).__name__}: even if it returns its "
                f"input, {wrong}: {reason}. Choose another position, or a module of another class, without a slot.",
                reason.cause,
            )

    def _refuse(self, subject: str, hazards: list[Hazard]) -> None:
        if hazards:
            raise UnsupportedSurgery(
                f"{subject}: {'; '.join(map(str, hazards))}. Choose other blocks, or pass despite_hazards=True to "
                "proceed anyway.",
                hazards[0].cause,
            )

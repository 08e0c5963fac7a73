"""What a surgeon does to residual branches of blocks, which keep their slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.exchange import StandIns
from streamline_hooks.surgery.fold import find_folding, require_folded, require_map
from streamline_hooks.surgery.opened import InBranches, OpenSurgery
from streamline_hooks.surgery.probe import NotRun, shortfall
from streamline_hooks.surgery.saving import saver_depth
from streamline_hooks.surgery.scale import answer, divided, find_projections, power_beyond, same_answer
from streamline_hooks.surgery.silence import find_zeros, observe_silenced


class BranchSurgery(OpenSurgery):
    """The operations on branches, of which `LayerSurgeon` has all."""

    @checked()
    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None, *, probe: bool = True) -> None:
        super().__init__(model, stack)
        self.probe = probe

    @checked()
    def silence(self, k: int, branch: Branch, *, batch: Batch | Tensor | None = None) -> None:
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
            What to run a model on that cannot be probed otherwise, without padding.

        Raises
        ------
        UnsupportedSurgery
            If the block has not the usual two residual branches, if a projection is a part of something else too, or
            if the model gives something else than without what the branch adds.
        StreamlineError
            If there is no such block or branch, or the block is gone.
        """
        self._require_kept(k, "silence")
        if self._is_silent(k, branch):
            return
        zeros = find_zeros(self.stack, k, branch, batch)
        block = self.stack[k]
        holds = self.probe and saver_depth(self.stack) == 0
        truth = observe_silenced(self.model, block, zeros) if holds else None
        with self._changed({k: {branch: StandIns(zeros, silent=True)}}):
            wrong = shortfall(truth, self.model, "it must") if truth is not None else None
            if wrong:
                raise UnsupportedSurgery(
                    f"The {branch} branch of block {k} cannot be silenced: with its output projections at zero "
                    f"{wrong}. Choose another one.",
                    "probe",
                )

    @checked()
    def fold(self, k: int, map_: Tensor, branch: Branch = "mlp", *, batch: Batch | Tensor | None = None) -> None:
        """Multiply a map onto what one residual branch of a block adds.

        Where the branch adds m to a token's state it adds m @ map_ from then on. The map is multiplied onto the output
        side of the branch's projections (biases too, and in a mixture all experts), which keep their precision: there
        is no new parameter, and the checkpoint is a plain one. Folding a second map gives m @ first @ second. A
        branch that is silenced stays so, in whatever order.

        Parameters
        ----------
        k : int
            The block, in the numbering when the surgeon opened.
        map_ : torch.Tensor
            Of shape (features, features).
        branch : {"attention", "mlp"}
            As for `silence`.
        batch : mapping or torch.Tensor, optional
            What to run a model on that cannot be probed otherwise, without padding.

        Raises
        ------
        UnsupportedSurgery
            If the block has not the usual two residual branches, if a norm or a scale for each feature follows this
            one (Gemma 2 and 3), if a projection is a part of something else too or is quantised, or if it does not add
            what it does with the map apart.
        StreamlineError
            If there is no such block or branch, the block is gone, or the map does not fit.

        Notes
        -----
        It costs two forwards of 16 tokens and about twenty of the block.

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
        self._require_kept(k, "fold")
        wide = require_map(map_)
        if self._is_silent(k, branch):
            return
        folding = find_folding(self.stack, k, branch, wide, batch)
        with self._changed({k: {branch: StandIns(folding.parameters, silent=False)}}):
            require_folded(self.stack, k, branch, folding, batch)

    @checked(factor="(0, inf)")
    def scale(self, k: int, factor: float, *, batch: Batch | Tensor | None = None) -> None:
        """Multiply the state that block k receives by a factor, without a new parameter.

        What every branch from block k on adds is divided by the factor instead, which is the same to norms and so to
        the logits; embeddings, which may be tied to the head, are not touched. It is always shown on the logits,
        whether the surgeon probes or not. What is put in behind the place afterwards works on the state divided.

        Parameters
        ----------
        k : int
            0 to L, with L (the number of blocks) for the end of the stack.
        factor : float
            Above 0.
        batch : mapping or torch.Tensor, optional
            What to run a model on that cannot be probed otherwise, without padding.

        Raises
        ------
        UnsupportedSurgery
            If a block behind the place has not the usual two residual branches, a norm follows one of them, or a block
            was put in there; or if the logits are others than with the state multiplied, since something reads the
            state without a norm, or with one whose eps is felt.
        StreamlineError
            If k is out of range or inside a window that is gone, or the factor is not above 0.
        """
        self._require_boundary(k, "scale")
        factor = float(factor)
        if factor == 1:
            return
        what = f"The state before block {k} of {type(self.model).__name__} cannot be multiplied by {factor:.4g}"
        if self._layout.takes_slots_behind(k):
            raise UnsupportedSurgery(f"{what}: a block was put in behind it. Scale first.", "scale")
        behind = [source for source in self._current_plan().kept if source >= k]
        held = find_projections(self.stack, behind, what, batch)
        loud = {j: {b: own for b, own in of.items() if not self._is_silent(j, b)} for j, of in held.items()}
        at = self.stack[behind[0]] if behind else None
        trial = power_beyond(factor)
        before = self._in_branches
        try:
            wanted = answer(self.stack, batch, trial, at)
            with self._changed(divided(loud, trial)):
                got = answer(self.stack, batch)
        except NotRun as error:
            raise UnsupportedSurgery(
                f"{what}: with a factor of {trial:g} the model fails ({error}).", "scale"
            ) from error
        self._apply(self._layout, before)
        if not same_answer(got, wanted):
            raise UnsupportedSurgery(
                f"{what}: with what the blocks behind it add divided by {trial:g} the logits are others than with the "
                "state multiplied by that. Something reads the state without a norm, or with one whose eps is felt.",
                "scale",
            )
        self._apply(self._layout, self._with(divided(loud, factor)))

    def _require_kept(self, k: int, do: str) -> None:
        """Raise unless a block is there, whose branch is to be changed."""
        self._require_open()
        if k not in self._current_plan().kept:
            raise StreamlineError(
                f"{do}({k!r}, ...): there is no such block, or it was removed. Expected one of "
                f"{list(self._current_plan().kept)}, in the numbering from when the surgeon opened. Change it."
            )

    def _is_silent(self, k: int, branch: Branch) -> bool:
        own = self._in_branches.get(k, {}).get(branch)
        return own is not None and own.silent

    def _with(self, changes: InBranches) -> InBranches:
        """What stands in the place of projections now, and with it what is given."""
        now = self._in_branches
        return {**now, **{k: {**now.get(k, {}), **own} for k, own in changes.items()}}

    @contextmanager
    def _changed(self, changes: InBranches) -> Iterator[None]:
        """Put something in the place of projections, for good unless what follows raises."""
        before = self._in_branches
        self._apply(self._layout, self._with(changes))
        try:
            yield
        except BaseException:
            self._apply(self._layout, before)
            raise

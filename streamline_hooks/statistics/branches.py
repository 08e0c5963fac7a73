"""Measure how much each residual branch (attention or MLP) of each block changes the hidden state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import BRANCHES, Branch, Branches
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import token_mask
from streamline_hooks.passes import inference, progress
from streamline_hooks.precision import widen
from streamline_hooks.read_hook import WatchedMask
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.surgery.silence import branches_of

_TOKENS_AT_ONCE = 4096


class BranchScores:
    """Sums, for each block and branch, of how alike the states before and after are and how large the difference is.

    A token's cosine is that of the residual stream before and after the branch, and its relative magnitude
    ‖after − before‖/‖before‖. One minus the mean cosine is the score by which He et al. (What Matters in
    Transformers?, arXiv 2406.15786) drop attention or MLP alone, each with its norm and its residual
    connection.

    Parameters
    ----------
    blocks : int
        Number of blocks of the stack.

    Notes
    -----
    All sums are float64; memory does not grow with the tokens. What was never counted is NaN.

    Examples
    --------
    >>> import torch
    >>> scores = BranchScores(1)
    >>> before, after = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    >>> scores.update(0, "attention", before, after, torch.ones(1, 1))
    >>> scores.cosine, scores.magnitude[0, 0].item()
    (tensor([[0.7071,    nan]], dtype=torch.float64), 1.0)
    """

    def __init__(self, blocks: int) -> None:
        self.tokens = torch.zeros(blocks, len(BRANCHES), dtype=torch.int64)
        self._cosine = torch.zeros(blocks, len(BRANCHES), dtype=torch.float64)
        self._magnitude = torch.zeros(blocks, len(BRANCHES), dtype=torch.float64)

    def update(self, k: int, branch: Branch, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add one batch of one branch.

        Parameters
        ----------
        k : int
            The block.
        branch : {"attention", "mlp"}
        before, after : torch.Tensor
            The states, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).

        Raises
        ------
        StreamlineError
            If the state of a real token is not finite, or is zero before.
        """
        real, column = mask.to(before.device).bool(), BRANCHES.index(branch)
        for x, y in zip(before[real].split(_TOKENS_AT_ONCE), after[real].split(_TOKENS_AT_ONCE), strict=True):
            x, y = widen(x), widen(y)
            size, other = x.norm(dim=-1), y.norm(dim=-1)
            cosine = ((x * y).sum(dim=-1) / (size * other).clamp_min(1e-300)).clamp(-1.0, 1.0).sum()
            magnitude = ((y - x).norm(dim=-1) / size).sum()
            if not (torch.isfinite(cosine) and torch.isfinite(magnitude)):
                raise StreamlineError(
                    f"A state around the {branch} branch of block {k} holds NaN or infinite values, or is zero before "
                    "it. Look at the weights of the blocks up to there, or run in a wider precision."
                )
            self._cosine[k, column] += cosine.cpu()
            self._magnitude[k, column] += magnitude.cpu()
            self.tokens[k, column] += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        if other.tokens.shape != self.tokens.shape:
            raise StreamlineError(
                f"Cannot merge the branches of {len(other.tokens)} blocks into those of {len(self.tokens)}: they are "
                "of different models."
            )
        self.tokens += other.tokens
        self._cosine += other._cosine
        self._magnitude += other._magnitude

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of the states before and after, of shape (blocks, 2): attention, MLP."""
        return self._cosine / self.tokens

    @property
    def magnitude(self) -> Tensor:
        """Mean relative magnitude of what is added, of shape (blocks, 2): attention, MLP."""
        return self._magnitude / self.tokens

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a file."""
        return {
            "tokens": self.tokens.clone(),
            "cosine": self._cosine.clone(),
            "magnitude": self._magnitude.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        self.tokens = state["tokens"].clone()
        self._cosine, self._magnitude = state["cosine"].clone(), state["magnitude"].clone()


@checked()
def measure_branches(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    blocks: Iterable[int] | None = None,
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> BranchScores:
    """Measure how much attention and MLP of each block change the state.

    The branches are first found on a few tokens, at the cost of about fifteen forwards of these; the pass then ends
    after the last block that is measured.

    Parameters
    ----------
    model : torch.nn.Module
    batches : iterable of mapping or torch.Tensor
        What the model's forward takes.
    blocks : iterable of int, optional
        Which to measure; by default all that have the usual two residual branches, and the others' rows stay NaN.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to find the branches on in a model that cannot be probed otherwise, without padding.

    Returns
    -------
    BranchScores

    Raises
    ------
    UnsupportedSurgery
        If a block that was asked for, or each of them all, has not two branches that can be read; the text says why.
    StreamlineError
        If no token was counted, or a state is not finite.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ... )
    >>> measure_branches(model, [torch.arange(6)[None]]).magnitude.shape
    torch.Size([3, 2])
    """
    batches = list(batches)
    stacked = HiddenStateRecorder(model, blocks, stack=stack)  # which also says what is wrong with `blocks`
    found = _readable(branches_of(stacked.stack, stacked.blocks, probe), all_of_them=blocks is not None)
    record = HiddenStateRecorder(model, [max(found)], inputs=False, stop=True, stack=stack)
    scores, watched = BranchScores(len(record.stack)), WatchedMask(record.stack)

    def receive(k: int, branch: Branch, before: Tensor, after: Tensor) -> None:
        scores.update(k, branch, before, after, token_mask(before, watched.mask))

    total = sum(tokens_of(batch) for batch in batches)
    measured = {k: record.stack[k] for k in found}
    cost = f"branches: {len(found)} of {len(record.stack)} blocks"
    with (
        inference(model),
        record,
        watched,
        reading_branches(measured, found, receive),
        progress(total, cost) as bar,
    ):
        for batch in batches:
            record.clear()
            record(**prepare(model, batch))
            bar.update(tokens_of(batch))
    if not scores.tokens.any():
        raise StreamlineError(
            f"No token was counted in {len(batches)} batches, and no branch has a score; expected one batch at least "
            "with a real token. Give batches of what the model takes, and a mask that leaves some of it."
        )
    return scores


def _readable(found: dict[int, Branches | UnsupportedSurgery], all_of_them: bool) -> dict[int, Branches]:
    readable: dict[int, Branches] = {}
    reasons: dict[int, str] = {}
    for k, branches in found.items():
        if isinstance(branches, UnsupportedSurgery):
            reasons[k] = str(branches)
        elif not branches.taps:
            reasons[k] = "No submodule of it is given the state between its branches."
        else:
            readable[k] = branches
    if reasons and (all_of_them or not readable):
        k, reason = next(iter(reasons.items()))
        raise UnsupportedSurgery(f"The branches of block {k} cannot be measured. {reason}", "branches")
    return readable

"""Measure how much each residual branch (attention or MLP) of each block changes the hidden state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    count_tokens,
    prepare_inputs,
    progress_bar,
    to_float64,
    validate_arguments,
)
from streamline_hooks.modeling import (
    BRANCHES,
    Branch,
    Branches,
    StateSource,
    WatchedMask,
    branches_of,
    inference,
    reading_branches,
    require_branches_readable,
    token_mask,
)
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.surgery import as_state_source

_TOKENS_AT_ONCE = 4096


class BranchScores:
    """Sums of the cosine and the relative magnitude of each residual branch of each block.

    The cosine of a token is that of its residual stream before and after the branch, and its relative magnitude is
    ‖after − before‖/‖before‖. He et al. (What Matters in Transformers?, arXiv 2406.15786) rank attention and MLP
    branches by one minus the mean cosine. Sums are float64 in constant memory. A branch without tokens is NaN.

    Parameters
    ----------
    blocks : int
        Number of blocks of the stack.

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
        self._cosine, self._magnitude = torch.zeros(2, blocks, len(BRANCHES), dtype=torch.float64)

    def update(self, k: int, branch: Branch, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add a batch of one branch.

        Parameters
        ----------
        k : int
            Index of the block.
        branch : {"attention", "mlp"}
        before, after : torch.Tensor
            States before and after the branch, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens to count, of shape (batch, tokens).

        Raises
        ------
        StreamlineError
            If a counted state is not finite, or is zero before the branch.
        """
        real, column = mask.to(before.device).bool(), BRANCHES.index(branch)
        for x, y in zip(before[real].split(_TOKENS_AT_ONCE), after[real].split(_TOKENS_AT_ONCE), strict=True):
            x, y = to_float64(x), to_float64(y)
            size, other = x.norm(dim=-1), y.norm(dim=-1)
            cosine = ((x * y).sum(dim=-1) / (size * other).clamp_min(1e-300)).clamp(-1.0, 1.0).sum()
            magnitude = ((y - x).norm(dim=-1) / size).sum()
            if not (torch.isfinite(cosine) and torch.isfinite(magnitude)):
                raise StreamlineError(
                    f"A state at the {branch} branch of block {k} contains NaN or infinite values, or is zero before "
                    "the branch. Expected finite values. Check the weights of the blocks up to this one, or run the "
                    "model in float32 or bfloat16."
                )
            self._cosine[k, column] += cosine.cpu()
            self._magnitude[k, column] += magnitude.cpu()
            self.tokens[k, column] += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums over other tokens of the same model."""
        if other.tokens.shape != self.tokens.shape:
            raise StreamlineError(
                f"Cannot merge scores of {len(other.tokens)} blocks into scores of {len(self.tokens)} blocks. Expected "
                "scores of the same model. Measure both with one model."
            )
        self.tokens += other.tokens
        self._cosine += other._cosine
        self._magnitude += other._magnitude

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of the states before and after, of shape (blocks, 2) for attention and MLP."""
        cosine: Tensor = self._cosine / self.tokens
        return cosine

    @property
    def magnitude(self) -> Tensor:
        """Mean relative magnitude of the change, of shape (blocks, 2) for attention and MLP."""
        magnitude: Tensor = self._magnitude / self.tokens
        return magnitude

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as tensors."""
        sums = {"tokens": self.tokens, "cosine": self._cosine, "magnitude": self._magnitude}
        return {name: values.clone() for name, values in sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums from `state_dict`."""
        self.tokens = state["tokens"].clone()
        self._cosine, self._magnitude = state["cosine"].clone(), state["magnitude"].clone()


@validate_arguments()
def measure_branches(
    model: nn.Module | StateSource,
    batches: Iterable[Batch | Tensor],
    blocks: Iterable[int] | None = None,
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> BranchScores:
    """Measure how much the attention and the MLP of each block change the hidden state.

    The branches are first found on a few tokens, at the cost of about fifteen forwards. The pass over the batches stops
    after the last measured block.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
    batches : iterable of mapping or torch.Tensor
        The inputs of the model's forward.
    blocks : iterable of int, optional
        The blocks to measure. Default: all blocks with two residual branches; the rows of other blocks are NaN.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        A batch without padding on which the branches are found, if the library cannot create one for the model.

    Returns
    -------
    BranchScores

    Raises
    ------
    UnsupportedSurgery
        If a block of `blocks`, or every block, does not have two branches that can be read. The message has the reason.
    StreamlineError
        If no token was counted, or a state is not finite.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> measure_branches(tiny_model("llama"), [torch.arange(6)[None]]).magnitude.shape
    torch.Size([8, 2])
    """
    batches, source = list(batches), as_state_source(model, stack)
    stacked = HiddenStateRecorder(source.model, blocks, stack=source.stack.path)  # validates `blocks`
    branches = _readable_branches(branches_of(stacked.stack, stacked.blocks, probe), require_all=blocks is not None)
    require_branches_readable(source, branches)
    measure = _measure_in_memory if source.in_memory else _measure_block_by_block
    scores = measure(source, batches, branches)
    if not scores.tokens.any():
        raise StreamlineError(
            f"No token was counted in {len(batches)} batches. Expected at least one batch with a real token. Check the "
            "batches and their attention masks."
        )
    return scores


def _measure_in_memory(
    source: StateSource, batches: list[Batch | Tensor], branches: Mapping[int, Branches]
) -> BranchScores:
    model = source.model
    record = HiddenStateRecorder(model, [max(branches)], sites=["block.output"], stop=True, stack=source.stack.path)
    scores, watched = BranchScores(len(record.stack)), WatchedMask(record.stack)

    def receive(k: int, branch: Branch, before: Tensor, after: Tensor) -> None:
        scores.update(k, branch, before, after, token_mask(before, watched.mask))

    measured = {k: record.stack[k] for k in branches}
    cost = f"branches: {len(branches)} of {len(record.stack)} blocks"
    total = sum(map(count_tokens, batches))
    with (
        inference(model),
        record,
        watched,
        reading_branches(measured, branches, receive),
        progress_bar(total, cost) as bar,
    ):
        for batch in batches:
            record.clear()
            record(**prepare_inputs(model, batch))
            bar.update(count_tokens(batch))
    return scores


def _measure_block_by_block(
    source: StateSource, batches: list[Batch | Tensor], branches: Mapping[int, Branches]
) -> BranchScores:
    """Measure in one pass, in which each block is run again when the sums of its branches are updated."""
    order, states = sorted(branches), dict[Branch, tuple[Tensor, Tensor]]()

    def receive(k: int, branch: Branch, before: Tensor, after: Tensor) -> None:
        states[branch] = before.clone(), after.clone()

    def make(number: int, features: int) -> _BlockSums:
        return _BlockSums(order[number], len(source.stack), states)

    scores, windows = BranchScores(len(source.stack)), [range(k, k + 1) for k in order]
    with (
        reading_branches({k: source.stack[k] for k in order}, branches, receive),
        source.window_sums([("branches", batches)], windows, make, rerun=[1] * len(windows)) as block_sums,
    ):
        for _, (sums,) in block_sums:
            if sums is not None:
                scores.merge(sums.scores)
    return scores


class _BlockSums:
    """Sum the scores of the branches of one block from the states that its hooks recorded last."""

    def __init__(self, block: int, blocks: int, states: Mapping[Branch, tuple[Tensor, Tensor]]) -> None:
        self.scores, self._block, self._states = BranchScores(blocks), block, states

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add the batch of the last call of the block."""
        for branch, (before, after) in self._states.items():
            self.scores.update(self._block, branch, before, after, mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a file."""
        return self.scores.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sums to those of `state_dict`."""
        self.scores.load_state_dict(state)


def _readable_branches(
    branches_by_block: dict[int, Branches | UnsupportedSurgery], require_all: bool
) -> dict[int, Branches]:
    readable: dict[int, Branches] = {}
    reasons: dict[int, str] = {}
    for k, branches in branches_by_block.items():
        if isinstance(branches, UnsupportedSurgery):
            reasons[k] = str(branches)
        elif not branches.sites:
            reasons[k] = "None of its submodules receives the state between the branches."
        else:
            readable[k] = branches
    if reasons and (require_all or not readable):
        k, reason = next(iter(reasons.items()))
        raise UnsupportedSurgery(f"The branches of block {k} cannot be measured. {reason}", "branches")
    return readable

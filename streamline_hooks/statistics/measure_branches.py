"""Score each block's attention and MLP from their own inputs and outputs, in one pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import Branch, Branches
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import token_mask
from streamline_hooks.passes import inference, progress
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.statistics.branches import BranchScores
from streamline_hooks.surgery.silence import branches_of
from streamline_hooks.watched_mask import WatchedMask


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

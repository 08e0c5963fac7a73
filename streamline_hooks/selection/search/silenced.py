"""Attentions or MLPs alone, by their own scores: they are silenced, and every block keeps its slot."""

from __future__ import annotations

from collections.abc import Iterable

from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.search.one_shot import best_sets
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.selection.target import protected_blocks
from streamline_hooks.statistics import BranchScores


def silenced_branches(
    scores: BranchScores, branch: Branch, count: int, *, keep: Iterable[int] = (), best: int = 1
) -> list[Selection]:
    """Silence the attentions, or the MLPs, that turn the state least (He et al., arXiv 2406.15786).

    Parameters
    ----------
    scores : BranchScores
        As `measure_branches` gives them. A block that was not measured is left alone, and so is a branch that adds
        nothing: it was silenced before.
    branch : {"attention", "mlp"}
    count : int
        How many are silenced.
    keep : iterable of int
        Blocks that stay as they are; negative numbers count from the end.
    best : int
        How many selections to return.

    Returns
    -------
    list of Selection
        The best first; the score is the sum of the mean cosines of the states before and after each branch.

    Raises
    ------
    StreamlineError
        If there are too few branches to choose from.

    Examples
    --------
    >>> import torch
    >>> scores = BranchScores(3)
    >>> before = torch.eye(4)[None, :2]
    >>> for k in range(3):
    ...     scores.update(k, "attention", before, before + (k + 1) * before.roll(1, 1), torch.ones(1, 2))
    >>> str(silenced_branches(scores, "attention", 2)[0])
    'attention of 0, attention of 1'
    """
    cosine = scores.cosine[:, BRANCHES.index(branch)]
    protected = protected_blocks(keep, len(cosine))
    adds = scores.magnitude[:, BRANCHES.index(branch)]
    free = (k for k in range(len(cosine)) if k not in protected and adds[k] > 0)  # nor NaN
    values = {k: float(cosine[k]) for k in free}
    if not 1 <= count <= len(values):
        raise StreamlineError(
            f"{count} {branch} branches are to be silenced, and {len(values)} can be chosen from: the others are "
            "protected, silenced already, or were not measured. Ask for one or more, and for fewer than there are."
        )
    return [
        Selection((), tuple((k, branch) for k in blocks), score) for score, blocks in best_sets(values, count, best)
    ]

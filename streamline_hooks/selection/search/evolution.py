"""Evolutionary search over blocks, attentions and MLPs (EvoPress, arXiv 2410.14649)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.selection.search.generations import Generation, Run
from streamline_hooks.selection.search.judge import Judge, writers_of
from streamline_hooks.selection.search.levels import Levels, gone_of
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.selection.target import protected_blocks
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.silence import silent_parameters
from streamline_hooks.task import Task

STAGES = ((2_048, 8), (8_192, 2))


def evolution(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    seeds: Sequence[Selection] | Generation,
    *,
    generations: int = 20,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = STAGES,
    keep: Iterable[int] = (),
    branches: bool = True,
    seed: int = 0,
    reuse: int = 2**30,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
    task: Task | None = None,
) -> list[Selection]:
    """Run `evolve` for some generations.

    Returns
    -------
    list of Selection
        All that can be carried out and were judged on all batches, the best first.

    Raises
    ------
    StreamlineError
        As `evolve` does.
    """
    found = evolve(
        model, batches, seeds, offspring=offspring, stages=stages, keep=keep, branches=branches, seed=seed,
        reuse=reuse, stack=stack, probe=probe, task=task,
    )  # fmt: skip
    first = latest = next(found)
    while latest.number < first.number + generations:
        following = next(found, None)
        if following is None:
            break
        latest = following
    return [selection for selection in latest.judged if selection.score > -math.inf]


def evolve(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    seeds: Sequence[Selection] | Generation,
    *,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = STAGES,
    keep: Iterable[int] = (),
    branches: bool = True,
    seed: int = 0,
    reuse: int = 2**30,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
    task: Task | None = None,
) -> Iterator[Generation]:
    """Improve selections by switching levels, and give each generation as it comes.

    In each generation the best selection has children, in which one to three units (a block, an attention or an MLP)
    came back and others of the same kind went. All children are judged on few tokens, the better ones on more, and
    the last of them on all batches, where they meet the best so far. Fitness is KL to the original (`Task.distance`).

    Between two generations the model is as it was, so that one may stop at any; on Ctrl-C inside one it is so too,
    and the last one given holds the best so far.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        Calibration text. For what a generation costs see `tokens_a_generation`.
    seeds : sequence of Selection or Generation
        Where to start, for instance a shortlist; all give up the same number of attentions and of MLPs. A generation
        of an earlier run with the same arguments is gone on from as if it had never ended.
    offspring : int
        Children a generation.
    stages : sequence of (int, int)
        Tokens on which the children are judged, and how many of them survive that. The tokens are those of whole
        batches, drawn anew each time.
    keep : iterable of int
        Blocks that must stay with both their branches; negative numbers count from the end.
    branches : bool
        Whether attention and MLP may go alone, in blocks where they can be silenced. Where none can, a warning says
        why, and whole blocks are searched over.
    seed : int
        Of the random numbers.
    reuse : int
        Bytes for the original's log-probabilities (4·tokens·vocabulary a batch) that are kept from one stage to the
        next: of the first batches that fit. Of the others the original is run again each time, once for all children.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to look for the branches on in a model that cannot be probed otherwise, without padding.
    task : Task, optional
        What the model is for, see `Task.of`.

    Yields
    ------
    Generation
        The first one holds the seeds. It ends where no child is new any more.

    Raises
    ------
    StreamlineError
        If the seeds are none, give up different amounts, or may not go; or none of them can.

    Notes
    -----
    Children that could not be carried out are never parents: the surgeon's known hazards are heeded in each trial,
    and its probe is asked before a selection is taken for the best.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(3, 19)[None]
    >>> shortlist = [Selection((range(2, 4),)), Selection((range(3, 5),))]
    >>> for generation in evolve(model, [tokens], shortlist, offspring=4):
    ...     if generation.number == 2:
    ...         break
    >>> generation.best.score >= max(s.score for s in generation.judged if s.windows == (range(2, 4),))
    True
    """
    found = find_stack(model, stack)
    if offspring < 1 or any(tokens < 1 or survivors < 1 for tokens, survivors in stages):
        raise StreamlineError(f"offspring={offspring} and stages={tuple(stages)} must be numbers of 1 or more.")
    start = seeds.judged if isinstance(seeds, Generation) else tuple(seeds)
    if not start:
        raise StreamlineError("The evolutionary search has nothing to start from; give a selection, such as a window.")
    budgets = {Levels.budget(gone_of(selection)): selection for selection in start}
    if len(budgets) > 1:
        listed = "; ".join(f"{a} attentions and {m} MLPs ({s})" for (a, m), s in budgets.items())
        raise StreamlineError(f"The selections to start from give up different amounts: {listed}. Give equal ones.")
    free = frozenset(range(len(found))) - protected_blocks(keep, len(found))
    writers = writers_of(found, sorted(free), probe) if branches and free else {}
    paths = {half: paths for half, paths in writers.items() if not isinstance(paths, UnsupportedSurgery)}
    reasons = {half: str(error) for half, error in writers.items() if half not in paths}
    silent = [(k, b) for (k, b), its in paths.items() if all(silent_parameters(found[k].get_submodule(p)) for p in its)]
    for k, branch in silent:  # it would be given up for nothing
        del paths[k, branch]
        reasons[k, branch] = f"The {branch} of block {k} is silent already."
    levels = Levels(free, frozenset(paths), reasons)
    if branches and writers and not paths:
        warnings.warn(f"Only whole blocks are searched over: {next(iter(reasons.values()))}", stacklevel=2)
    for selection in start:
        levels.require(selection)
    run = Run(found, levels, Judge(found, batches, paths, reuse, task=task), offspring, tuple(stages), seed, probe)
    return run.generations(seeds)


def tokens_a_generation(tokens: int, *, offspring: int = 32, stages: Sequence[tuple[int, int]] = STAGES) -> int:
    """What a generation costs, before it is run: the tokens that the model is run on, by all children together.

    The original runs besides on those of them, once a stage, whose log-probabilities are not kept. A stage runs on
    whole batches, so that it may take up to one batch more a child.

    Parameters
    ----------
    tokens : int
        Of all batches.
    offspring, stages
        See `evolve`.

    Examples
    --------
    >>> tokens_a_generation(16_384) == 32 * 2_048 + 8 * 8_192 + 2 * 16_384
    True
    """
    cost, pool = 0, offspring
    for few, survivors in stages:
        if pool > survivors and few < tokens:
            cost, pool = cost + pool * few, survivors
    return cost + pool * tokens

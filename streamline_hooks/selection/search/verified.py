"""The verified shortlist: repair each selection in closed form, and judge by what the repaired model says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import Candidate, kl_of_candidates
from streamline_hooks.passes import progress
from streamline_hooks.repair import Kind, kind_named, solve
from streamline_hooks.selection.search.judge import Attempt, Judge, Writers, given_up, writers_of
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import WindowMoments, measure_moments
from streamline_hooks.surgery.placement import move_beside

Batches = Sequence[Batch | Tensor]
_Silenced = tuple[tuple[int, Branch], ...]


@dataclass(frozen=True)
class Repair:
    """What was fitted for one window.

    Attributes
    ----------
    window : range
    module : torch.nn.Module or None
        What stands in its place; None for plain removal.
    removal_error, repaired_error : float
        Mean relative squared error of the state after the window on held-out sequences, without and with the closed
        form, in the model that the windows before it were taken out of.
    ridge : float
        Chosen for it, in units of the mean eigenvalue of the moments.
    """

    window: range
    module: nn.Module | None
    removal_error: float
    repaired_error: float
    ridge: float


@dataclass(frozen=True)
class VerifiedSelection(Selection):
    """A selection, repaired and judged.

    Attributes
    ----------
    repairs : tuple of Repair
        One a window.
    kl : float
        Mean KL to the original's next-token distribution on validation text, in nats a token; infinite where the
        selection was refused.
    refused : str
        Why it cannot go; empty where it can, as far as is seen without carrying it out.
    """

    repairs: tuple[Repair, ...] = ()
    kl: float = math.inf
    refused: str = ""


def verified(
    model: nn.Module,
    selections: Sequence[Selection],
    fit: Batches,
    held_out: Batches,
    validation: Batches,
    *,
    kind: str = "linear",
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> list[VerifiedSelection]:
    """Repair selections in closed form, and judge each by KL to the original.

    The windows of a selection are fitted in their order, each on the model in which those before it are repaired
    already and the branches before it silenced. Windows that are fitted on the same model share its pass: all single
    windows the one over the original.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    selections : sequence of Selection
        A shortlist of any searches. Its scores are kept, and not looked at.
    fit, held_out, validation : sequence of mapping or torch.Tensor
        To fit on, to choose the ridge by, and to judge on; of different documents.
    kind : str
        What stands in a window's place, see `kind_named`.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to look for branches on in a model that cannot be run on tokens alone, without padding.

    Returns
    -------
    list of VerifiedSelection
        All of them, the best first; those that cannot go, or leave no finite logits, last.

    Raises
    ------
    UnsupportedSurgery
        If every one is refused.
    StreamlineError
        If not one leaves a model with finite logits; or as `measure_moments`, `solve` and `kl_of_candidates` do.

    Notes
    -----
    One pass over `fit` and `held_out` for each model to fit on, that ends after the last block needed; one forward of
    the original over `validation`, of each single window the blocks after it, and of each other selection a forward.
    Two d×d matrices in float64 for each window fitted on one model, and d×d parameters for each linear repair.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> fit, held_out, validation = ([torch.arange(seed, seed + 24).view(2, 12)] for seed in (3, 13, 23))
    >>> shortlist = [Selection((range(1, 3),)), Selection((range(1, 2), range(4, 5)))]
    >>> best = verified(model, shortlist, fit, held_out, validation)[0]
    >>> len(best.repairs) == len(best.windows)
    True
    """
    if not selections:
        raise StreamlineError("There is no selection to verify; give the best of a search.")
    fitting = _Fitting(find_stack(model, stack), kind_named(kind), kind, probe, selections)
    depth = max(len(selection.windows) for selection in selections)
    for level in range(depth):
        fitting.fit_windows(level, fit, held_out)
    kls = fitting.judge(validation)
    judged = []
    for k, (selection, kl) in enumerate(zip(selections, kls, strict=True)):
        refused = isinstance(kl, UnsupportedSurgery)
        judged.append(
            VerifiedSelection(
                selection.windows,
                selection.silenced,
                selection.score,
                () if refused else tuple(fitting.repairs[k]),
                math.inf if isinstance(kl, UnsupportedSurgery) else kl,
                str(kl) if refused else "",
            )
        )
    if all(one.refused for one in judged):
        raise next(kl for kl in kls if isinstance(kl, UnsupportedSurgery))
    judged.sort(key=lambda one: (not math.isfinite(one.kl), bool(one.refused), one.kl))
    if not math.isfinite(judged[0].kl):
        raise StreamlineError(
            f"Not one of the {len(judged)} shortlisted selections leaves a model with finite logits. Remove less, "
            "protect other blocks, or run in a wider precision (float32 or bfloat16)."
        )
    return judged


class _Fitting:
    """Selections on the way to being repaired."""

    def __init__(
        self,
        stack: BlockStack,
        kind: Kind,
        name: str,
        probe: Batch | Tensor | None,
        selections: Sequence[Selection],
    ) -> None:
        self.stack, self.kind, self.selections = stack, kind, selections
        self.plain = name == "none"
        self.repairs: list[list[Repair]] = [[] for _ in selections]
        self.refusals: dict[int, UnsupportedSurgery] = {}
        self.writers = self._find_writers(probe)

    def _find_writers(self, probe: Batch | Tensor | None) -> Writers:
        wanted = {half for selection in self.selections for half in selection.silenced}
        if not wanted:
            return {}
        found = writers_of(self.stack, sorted({k for k, _ in wanted}), probe)
        for k, selection in enumerate(self.selections):
            for half in selection.silenced:
                paths = found[half]
                if isinstance(paths, UnsupportedSurgery):
                    self.refusals[k] = paths
        return {half: paths for half, paths in found.items() if not isinstance(paths, UnsupportedSurgery)}

    def fit_windows(self, level: int, fit: Batches, held_out: Batches) -> None:
        """Repair the window of each selection that has so many before it."""
        groups: dict[tuple[tuple[range, ...], _Silenced], list[int]] = {}
        for k, selection in enumerate(self.selections):
            if level < len(selection.windows) and k not in self.refusals:
                start = selection.windows[level].start  # the moments do not see what comes after the window
                before = tuple(half for half in selection.silenced if half[0] < start)
                groups.setdefault((selection.windows[:level], before), []).append(k)
        for number, ((done, silenced), members) in enumerate(groups.items()):
            wanted = sorted({self.selections[k].windows[level] for k in members}, key=lambda w: (w.start, w.stop))
            which = f" {level + 1}.{number + 1}" if level or len(groups) > 1 else ""
            modules = tuple(repair.module for repair in self.repairs[members[0]])
            try:
                with self._repaired(done, silenced, modules) as present:
                    windows = [range(present[w.start], present[w.stop - 1] + 1) for w in wanted]
                    fitted, chosen_by = (
                        measure_moments(self.stack.model, batches, windows, stack=self.stack.path, what=what + which)
                        for batches, what in ((fit, "fit"), (held_out, "hold out"))
                    )
            except UnsupportedSurgery as error:
                self.refusals.update(dict.fromkeys(members, error))
                continue
            solved = self._solve(wanted, fitted, chosen_by)
            for k in members:
                self.repairs[k].append(solved[self.selections[k].windows[level]])

    @contextmanager
    def _repaired(
        self, windows: tuple[range, ...], silenced: _Silenced, modules: tuple[nn.Module | None, ...]
    ) -> Iterator[dict[int, int]]:
        """The model to fit on; the present number of each of its blocks."""
        if not windows and not silenced:
            yield {k: k for k in range(len(self.stack))}
        else:
            with given_up(self.stack, Attempt(Selection(windows, silenced), modules), self.writers) as present:
                yield present

    def _solve(
        self, windows: list[range], fitted: list[WindowMoments], held_out: list[WindowMoments]
    ) -> dict[range, Repair]:
        solved = {}
        with progress(len(windows), "solve least squares", "windows") as bar:
            for window, fit, apart in zip(windows, fitted, held_out, strict=True):
                solution = solve(fit, apart)
                module = self.kind.start(solution)
                if module is not None:
                    move_beside(module, self.stack[0])
                error = solution.removal_error if self.plain else solution.held_out_error
                solved[window] = Repair(window, module, solution.removal_error, error, solution.ridge)
                bar.update()
        return solved

    def judge(self, validation: Batches) -> list[float | UnsupportedSurgery]:
        """KL of each selection; of single windows at the cost of the blocks after them."""
        alone = [
            k
            for k, selection in enumerate(self.selections)
            if len(selection.windows) == 1 and not selection.silenced and not self.kind.slots
        ]
        others = [k for k in range(len(self.selections)) if k not in alone and k not in self.refusals]
        alone = [k for k in alone if k not in self.refusals]
        kls: dict[int, float | UnsupportedSurgery] = dict(self.refusals)
        if alone:
            candidates = [Candidate(self.selections[k].windows[0], self.repairs[k][0].module) for k in alone]
            each = kl_of_candidates(self.stack.model, validation, candidates, stack=self.stack.path)
            kls.update(zip(alone, each, strict=True))
        if others:
            attempts = [Attempt(self.selections[k], tuple(r.module for r in self.repairs[k])) for k in others]
            judged = Judge(self.stack, validation, self.writers).kl(attempts, f"judge: {len(others)} selections")
            kls.update(zip(others, judged, strict=True))
        return [kls[k] for k in range(len(self.selections))]

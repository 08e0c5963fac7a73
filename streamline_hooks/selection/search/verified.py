"""The verified shortlist: repair each selection in closed form, and compare its output with the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import distances_of_candidates
from streamline_hooks.repair import LinearConfig, Repair, ReplacementConfig, StandIn
from streamline_hooks.repair.branch_linear import BranchLinear, fit_branches
from streamline_hooks.repair.fitting import start
from streamline_hooks.selection.search.judge import Attempt, Writers, distances_of_attempts, given_up, writers_of
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.task import Task

Batches = Sequence[Batch | Tensor]
_Silenced = tuple[tuple[int, Branch], ...]


@dataclass(frozen=True)
class VerifiedSelection(Selection):
    """A repaired selection and its distance from the original.

    Attributes
    ----------
    repairs : tuple of Repair
        One for each window.
    maps : tuple of BranchLinear
        One for each silenced branch that a linear map replaces.
    distance : float
        Mean distance from the original on the validation text (`Task.distance`): KL in nats a token, or 1 - cosine of
        an embedding; infinite if the selection was refused.
    refused : str
        Why it cannot be removed; empty if it can.
    """

    repairs: tuple[Repair, ...] = ()
    maps: tuple[BranchLinear, ...] = ()
    distance: float = math.inf
    refused: str = ""


@checked()
def verified(
    model: nn.Module,
    selections: Sequence[Selection],
    fit: Batches,
    held_out: Batches,
    validation: Batches,
    *,
    replacement: ReplacementConfig = LinearConfig(),
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
    task: Task | None = None,
) -> list[VerifiedSelection]:
    """Repair selections by least squares, and rank them by the distance of the repaired model from the original.

    The windows of a selection are fitted in order, each on the model in which those before it are repaired and the
    branches before it silenced. Windows that are fitted on the same model share a pass.

    Parameters
    ----------
    model : torch.nn.Module
    selections : sequence of Selection
        A shortlist of any search. Its scores are kept, but not used.
    fit, held_out, validation : sequence of mapping or torch.Tensor
        To fit on, to choose the ridge by, and to compare on; of different documents.
    replacement : ReplacementConfig
        The config of what replaces each window.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        A batch without padding, for models that cannot be probed with tokens.
    task : Task, optional
        Determines the outputs that are compared, see `Task.of`.

    Returns
    -------
    list of VerifiedSelection
        All of them, the best first; last those that are refused or have no finite output. If replacements are not
        fitted (a network with random weights), the order of the shortlist stays.

    Raises
    ------
    UnsupportedSurgery
        If every one is refused.
    StreamlineError
        If none leaves a model with finite outputs; or as `measure_moments`, `solve` and `distances_of_candidates` do.

    Notes
    -----
    The cost is one pass over `fit` and `held_out` for each model to fit on, up to the last block needed, and one for
    all branches; over `validation` one forward of the original, the blocks after each single window, and one forward of
    each other selection. Memory is two d×d float64 matrices for each window fitted on one model, and each repair.

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
    fitting = _Fitting(find_stack(model, stack), replacement, probe, selections, task)
    depth = max(len(selection.windows) for selection in selections)
    if fitting.kind.replaces_branches:
        fitting.fit_branches(fit, held_out)
    for level in range(depth):
        fitting.fit_level(level, (fit, held_out))
    distances = fitting.judge(validation)
    judged = []
    for k, (selection, distance) in enumerate(zip(selections, distances, strict=True)):
        refused = isinstance(distance, UnsupportedSurgery)
        judged.append(
            VerifiedSelection(
                selection.windows,
                selection.silenced,
                selection.score,
                () if refused else tuple(fitting.repairs[k]),
                () if refused else fitting.maps_of(selection.silenced),
                math.inf if isinstance(distance, UnsupportedSurgery) else distance,
                str(distance) if refused else "",
            )
        )
    if all(one.refused for one in judged):
        raise next(one for one in distances if isinstance(one, UnsupportedSurgery))
    judged = in_order(judged, fitting.kind)
    if not math.isfinite(judged[0].distance):
        raise StreamlineError(
            f"Not one of the {len(judged)} shortlisted selections leaves a model with finite answers. Remove less, "
            "protect other blocks, or run in a wider precision (float32 or bfloat16)."
        )
    return judged


def in_order(judged: Sequence[VerifiedSelection], kind: ReplacementConfig) -> list[VerifiedSelection]:
    """Sort verified selections, the best first."""
    return sorted(
        judged,
        key=lambda one: (
            not math.isfinite(one.distance),
            bool(one.refused),
            one.distance if kind.is_meaningful_untrained else 0.0,
        ),
    )


class _Fitting:
    """The repairs of all selections, fitted level by level: the first windows of all, then the second, and so on."""

    def __init__(
        self,
        stack: BlockStack,
        kind: ReplacementConfig,
        probe: Batch | Tensor | None,
        selections: Sequence[Selection],
        task: Task | None,
    ) -> None:
        self.stack, self.kind, self.probe, self.selections = stack, kind, probe, selections
        self.task = task or Task.of(stack.model)  # before anything long is run
        self.repairs: list[list[Repair]] = [[] for _ in selections]
        self.maps: dict[tuple[int, Branch], BranchLinear] = {}
        self.refusals: dict[int, UnsupportedSurgery] = {}
        self.writers = self._find_writers()

    def _find_writers(self) -> Writers:
        wanted = {half for selection in self.selections for half in selection.silenced}
        if not wanted:
            return {}
        found = writers_of(self.stack, sorted({k for k, _ in wanted}), self.probe)
        for k, selection in enumerate(self.selections):
            for half in selection.silenced:
                paths = found[half]
                if isinstance(paths, UnsupportedSurgery):
                    self.refusals[k] = paths
        return {half: paths for half, paths in found.items() if not isinstance(paths, UnsupportedSurgery)}

    def fit_branches(self, fit: Batches, held_out: Batches) -> None:
        """Fit a linear map for each silenced branch."""
        left = [selection for k, selection in enumerate(self.selections) if k not in self.refusals]
        wanted = sorted({half for selection in left for half in selection.silenced})
        found = fit_branches(self.stack, wanted, fit, held_out, self.probe) if wanted else {}
        self.maps = {half: one for half, one in found.items() if isinstance(one, BranchLinear)}
        for k, selection in enumerate(self.selections):
            for half in selection.silenced:
                if isinstance(refusal := found.get(half), UnsupportedSurgery):
                    self.refusals.setdefault(k, refusal)

    def maps_of(self, silenced: _Silenced) -> tuple[BranchLinear, ...]:
        """Return the maps that replace branches."""
        return tuple(self.maps[half] for half in silenced if half in self.maps)

    def fit_level(self, level: int, parts: tuple[Batches, Batches]) -> None:
        """Repair window `level` of each selection."""
        groups: dict[tuple[tuple[range, ...], _Silenced], list[int]] = {}
        for k, selection in enumerate(self.selections):
            if level < len(selection.windows) and k not in self.refusals:
                start = selection.windows[level].start  # the moments do not see what comes after the window
                before = tuple(half for half in selection.silenced if half[0] < start)
                groups.setdefault((selection.windows[:level], before), []).append(k)
        for number, ((done, silenced), members) in enumerate(groups.items()):
            wanted = sorted({self.selections[k].windows[level] for k in members}, key=lambda w: (w.start, w.stop))
            which = f" {level + 1}.{number + 1}" if level or len(groups) > 1 else ""
            fitted = self._fit(wanted, done, silenced, [r.stand_in for r in self.repairs[members[0]]], parts, which)
            for k in members:
                found = fitted[self.selections[k].windows[level]]
                if isinstance(found, UnsupportedSurgery):
                    self.refusals[k] = found
                else:
                    self.repairs[k].append(found)

    def _fit(
        self,
        windows: list[range],
        done: tuple[range, ...],
        silenced: _Silenced,
        stand_ins: list[StandIn],
        parts: tuple[Batches, Batches],
        which: str,
    ) -> dict[range, Repair | UnsupportedSurgery]:
        """Repair windows on the model with the windows `done` repaired and branches silenced."""
        fitted: dict[range, Repair | UnsupportedSurgery] = {}
        built: dict[range, StandIn] = {}
        for window in windows:  # on the model as it is: a copy of a block bears its number there
            try:
                built[window] = self.kind.build(self.stack, window, probe=self.probe)
            except UnsupportedSurgery as error:
                fitted[window] = error
        try:
            with self._repaired(done, silenced, stand_ins) as present:
                now = [range(present[w.start], present[w.stop - 1] + 1) for w in built]
                stack = find_stack(self.stack.model, self.stack.path)
                pairs = list(zip(now, built.values(), strict=True))
                found = start(stack, self.kind, pairs, *parts, probe=self.probe, what=which)
        except UnsupportedSurgery as error:
            return {**fitted, **dict.fromkeys(built, error)}
        for window, repair in zip(built, found, strict=True):
            fitted[window] = replace(repair, window=window) if isinstance(repair, Repair) else repair
        return fitted

    @contextmanager
    def _repaired(
        self, windows: tuple[range, ...], silenced: _Silenced, stand_ins: list[StandIn]
    ) -> Iterator[dict[int, int]]:
        """Apply repairs for the duration of the context; yield the present number of each block."""
        if not windows and not silenced:
            yield {k: k for k in range(len(self.stack))}
        else:
            attempt = Attempt(Selection(windows, silenced), tuple(stand_ins), self.maps_of(silenced))
            with given_up(self.stack, attempt, self.writers, self.probe) as present:
                yield present

    def _attempt(self, k: int) -> Attempt:
        selection = self.selections[k]
        return Attempt(selection, tuple(r.stand_in for r in self.repairs[k]), self.maps_of(selection.silenced))

    def judge(self, validation: Batches) -> list[float | UnsupportedSurgery]:
        """Return the distance of each selection, of single windows by running the blocks after them only."""
        left = [k for k in range(len(self.selections)) if k not in self.refusals]
        attempts = {k: self._attempt(k) for k in left}
        alone = {k: one for k in left if (one := attempts[k].candidate(self.stack)) is not None}
        others = [k for k in left if k not in alone]
        found: dict[int, float | UnsupportedSurgery] = dict(self.refusals)
        if alone:
            options: dict[str, Any] = {"stack": self.stack.path, "task": self.task}
            each = distances_of_candidates(self.stack.model, validation, list(alone.values()), **options)
            found.update(zip(alone, each, strict=True))
        if others:
            given: dict[str, Any] = {"writers": self.writers, "probe": self.probe, "task": self.task}
            whole = [attempts[k] for k in others]
            judged = distances_of_attempts(self.stack, validation, whole, f"judge: {len(others)} selections", **given)
            found.update(zip(others, judged, strict=True))
        return [found[k] for k in range(len(self.selections))]

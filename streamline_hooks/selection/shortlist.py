"""Verify a shortlist: repair each selection in closed form, and compare the repaired model with the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import Batch, Batches, StreamlineError, UnsupportedSurgery, is_text_batch, validate_arguments
from streamline_hooks.evaluation import distances_of_variants
from streamline_hooks.modeling import Branch, StateSource, Task, check_windows
from streamline_hooks.repair import (
    BranchLinear,
    LinearConfig,
    Repair,
    ReplacementConfig,
    WindowReplacement,
    fit_branches,
    fit_replacements,
)
from streamline_hooks.selection.selection import Selection
from streamline_hooks.selection.trial import Trial, Writers, branch_writers, selection_applied, trial_distances
from streamline_hooks.surgery import as_state_source

_Branches = tuple[tuple[int, Branch], ...]


@dataclass(frozen=True)
class VerifiedSelection(Selection):
    """Repaired selection and its distance from the original; returned by `verify_shortlist`.

    Attributes
    ----------
    windows, zeroed, score
        See `Selection`.
    repairs : tuple of Repair
        One repair per window.
    maps : tuple of BranchLinear
        One linear map per zeroed branch that is replaced by a map.
    distance : float
        Mean distance from the original on the validation batches (`Task.distance`): KL in nats per token, or
        1 − cosine for embedding models. Infinite if the selection cannot be removed.
    refused : str
        The reason why the selection cannot be removed; empty if it can.

    Examples
    --------
    >>> verified = VerifiedSelection((range(2, 4),), distance=0.31)
    >>> str(verified), verified.distance
    ('2-3', 0.31)
    """

    repairs: tuple[Repair, ...] = ()
    maps: tuple[BranchLinear, ...] = ()
    distance: float = math.inf
    refused: str = ""


@validate_arguments()
def verify_shortlist(
    model: nn.Module | StateSource,
    selections: Sequence[Selection],
    fit: Batches,
    held_out: Batches,
    validation: Batches,
    *,
    replacement: ReplacementConfig = LinearConfig(),
    stack: str | None = None,
    task: Task | None = None,
) -> list[VerifiedSelection]:
    """Repair selections by least squares, and rank them by the distance of the repaired model from the original.

    The windows of a selection are fitted in order: each window on the model with the earlier windows repaired and the
    earlier branches zeroed. Windows that are fitted on the same model share a pass. Repair and verification extend
    LLM-Streamline (arXiv 2403.19135), which selects by cosine alone.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
        The original model. It is not changed.
    selections : sequence of Selection
        The shortlist of a search. The scores are copied to the result, but not used.
    fit, held_out, validation : sequence of mapping or torch.Tensor
        Batches to fit on, to choose the ridge on, and to compare the models on. Use disjoint documents.
    replacement : ReplacementConfig
        The replacement of each window.
    stack : str, optional
        Path of the stack (see `find_stack`).
    task : Task, optional
        Determines the outputs that are compared (see `Task.of`).

    Returns
    -------
    list of VerifiedSelection
        All selections, best first. Selections that cannot be removed or have no finite output are last. If the
        replacement is not fitted (a network with random weights), the order of the shortlist is kept.

    Raises
    ------
    UnsupportedSurgery
        If no selection can be removed.
    StreamlineError
        If `selections` is empty, or no selection leaves a model with finite outputs.

    Notes
    -----
    Over `fit` and `held_out`, the cost is one pass per model to fit on (up to the last block needed), and one pass for
    all branches. Over `validation`, it is one forward of the original, a pass through the later blocks per single
    window, and one forward per other selection. Memory is two d×d float64 matrices per window fitted on the same model,
    plus the repairs.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> fit, held_out, validation = ([torch.arange(seed, seed + 24).view(2, 12)] for seed in (3, 13, 23))
    >>> shortlist = [Selection((range(1, 3),)), Selection((range(1, 2), range(4, 5)))]
    >>> best = verify_shortlist(model, shortlist, fit, held_out, validation)[0]
    >>> len(best.repairs) == len(best.windows)
    True
    """
    if not selections:
        raise StreamlineError(
            "verify_shortlist: selections is empty. Expected at least one Selection. Pass the result of search."
        )
    source = as_state_source(model, stack)
    check_windows(source.stack, (window for selection in selections for window in selection.windows))
    probe = None if is_text_batch(fit[0]) else fit[0]  # a model without token ids is probed with a real batch
    fitting = _ShortlistFit(source, replacement, probe, selections, task)
    if fitting.kind.replaces_branches:
        fitting.fit_branches(fit, held_out)
    for level in range(max(len(selection.windows) for selection in selections)):
        fitting.fit_level(level, (fit, held_out))
    distances = fitting.distances(validation)
    verified = []
    for k, (selection, distance) in enumerate(zip(selections, distances, strict=True)):
        base = selection.windows, selection.zeroed, selection.score
        if isinstance(distance, UnsupportedSurgery):
            verified.append(VerifiedSelection(*base, refused=str(distance)))
        else:
            maps = fitting.maps_of(selection.zeroed)
            verified.append(VerifiedSelection(*base, tuple(fitting.repairs[k]), maps, distance))
    if all(selection.refused for selection in verified):
        raise next(refusal for refusal in distances if isinstance(refusal, UnsupportedSurgery))
    verified = sort_verified(verified, fitting.kind)
    if not math.isfinite(verified[0].distance):
        raise StreamlineError(
            f"None of the {len(verified)} selections leaves a model with finite outputs. Remove less, protect other "
            "blocks, or run in float32 or bfloat16."
        )
    return verified


def sort_verified(selections: Sequence[VerifiedSelection], kind: ReplacementConfig) -> list[VerifiedSelection]:
    """Sort verified selections, best first; keep the order if replacements of this kind are not fitted."""
    by_distance = kind.is_meaningful_untrained

    def rank(selection: VerifiedSelection) -> tuple[bool, bool, float]:
        distance = selection.distance
        return not math.isfinite(distance), bool(selection.refused), distance if by_distance else 0.0

    return sorted(selections, key=rank)


class _ShortlistFit:
    """Repairs of all selections, fitted level by level: first the first window of each, then the second, and so on."""

    def __init__(
        self,
        source: StateSource,
        kind: ReplacementConfig,
        probe: Batch | Tensor | None,
        selections: Sequence[Selection],
        task: Task | None,
    ) -> None:
        self.source, self.kind, self.probe, self.selections = source, kind, probe, selections
        self.stack = stack = source.stack
        self.task = task or Task.of(stack.model)  # raises before any long computation
        self.repairs: list[list[Repair]] = [[] for _ in selections]
        self.maps: dict[tuple[int, Branch], BranchLinear] = {}
        self.refusals: dict[int, UnsupportedSurgery] = {}
        zeroed_blocks = sorted({k for selection in selections for k, _ in selection.zeroed})
        writers = branch_writers(stack, zeroed_blocks, probe) if zeroed_blocks else {}
        for k, selection in enumerate(selections):
            for branch in selection.zeroed:
                if isinstance(refusal := writers[branch], UnsupportedSurgery):
                    self.refusals[k] = refusal
        self.writers: Writers = {b: paths for b, paths in writers.items() if not isinstance(paths, UnsupportedSurgery)}

    def fit_branches(self, fit: Batches, held_out: Batches) -> None:
        """Fit a linear map for each zeroed branch."""
        removable = [selection for k, selection in enumerate(self.selections) if k not in self.refusals]
        branches = sorted({branch for selection in removable for branch in selection.zeroed})
        results = fit_branches(self.source, branches, fit, held_out, self.probe) if branches else {}
        self.maps = {branch: result for branch, result in results.items() if isinstance(result, BranchLinear)}
        for k, selection in enumerate(self.selections):
            for branch in selection.zeroed:
                if isinstance(refusal := results.get(branch), UnsupportedSurgery):
                    self.refusals.setdefault(k, refusal)

    def maps_of(self, zeroed: _Branches) -> tuple[BranchLinear, ...]:
        """Return the maps that replace these branches."""
        return tuple(self.maps[branch] for branch in zeroed if branch in self.maps)

    def fit_level(self, level: int, parts: tuple[Batches, Batches]) -> None:
        """Repair window `level` of each selection."""
        groups: dict[tuple[tuple[range, ...], _Branches], list[int]] = {}
        for k, selection in enumerate(self.selections):
            if level < len(selection.windows) and k not in self.refusals:
                start = selection.windows[level].start  # moments of a window do not depend on later branches
                before = tuple(branch for branch in selection.zeroed if branch[0] < start)
                groups.setdefault((selection.windows[:level], before), []).append(k)
        for number, ((done, zeroed), members) in enumerate(groups.items()):
            windows = sorted({self.selections[k].windows[level] for k in members}, key=lambda w: (w.start, w.stop))
            label = f" {level + 1}.{number + 1}" if level or len(groups) > 1 else ""
            modules = [repair.replacement_module for repair in self.repairs[members[0]]]
            fitted = self._fit(windows, done, zeroed, modules, parts, label)
            for k in members:
                result = fitted[self.selections[k].windows[level]]
                if isinstance(result, UnsupportedSurgery):
                    self.refusals[k] = result
                else:
                    self.repairs[k].append(result)

    def _fit(
        self,
        windows: list[range],
        done: tuple[range, ...],
        zeroed: _Branches,
        replacement_modules: list[WindowReplacement],
        parts: tuple[Batches, Batches],
        label: str,
    ) -> dict[range, Repair | UnsupportedSurgery]:
        """Repair windows on the model with the windows `done` repaired and the branches `zeroed` zeroed."""
        fitted: dict[range, Repair | UnsupportedSurgery] = {}
        built: dict[range, WindowReplacement] = {}
        for window in windows:  # before surgery, because copied blocks keep the block index of the current model
            try:
                built[window] = self.kind.build(self.stack, window, probe=self.probe)
            except UnsupportedSurgery as error:
                fitted[window] = error
        repaired: AbstractContextManager[dict[int, int]] = nullcontext({k: k for k in range(len(self.stack))})
        if done or zeroed:
            attempt = Trial(Selection(done, zeroed), tuple(replacement_modules), self.maps_of(zeroed))
            repaired = selection_applied(self.stack, attempt, self.writers, self.probe)
        try:
            with repaired as present:
                renumbered = [range(present[w.start], present[w.stop - 1] + 1) for w in built]
                pairs = list(zip(renumbered, built.values(), strict=True))
                source = self.source.current()
                results = fit_replacements(source, self.kind, pairs, *parts, probe=self.probe, desc=label)
        except UnsupportedSurgery as error:
            return {**fitted, **dict.fromkeys(built, error)}
        for window, repair in zip(built, results, strict=True):
            fitted[window] = replace(repair, window=window) if isinstance(repair, Repair) else repair
        return fitted

    def distances(self, validation: Batches) -> list[float | UnsupportedSurgery]:
        """Return the distance of each selection; for single windows only the later blocks are run."""
        attempts = {
            k: Trial(selection, tuple(r.replacement_module for r in self.repairs[k]), self.maps_of(selection.zeroed))
            for k, selection in enumerate(self.selections)
            if k not in self.refusals
        }
        candidates = {k: c for k, attempt in attempts.items() if (c := attempt.candidate(self.stack)) is not None}
        others = {k: attempt for k, attempt in attempts.items() if k not in candidates}
        distances: dict[int, float | UnsupportedSurgery] = dict(self.refusals)
        if candidates:
            desc, task = f"verify: {len(candidates)} windows", self.task or Task.of(self.source.model)
            results = distances_of_variants(self.source, validation, list(candidates.values()), desc, task)
            distances.update(zip(candidates, results, strict=True))
            # If a later block needs an earlier one (shared keys), the partial pass is refused: run the whole model.
            others |= {k: attempts[k] for k in candidates if isinstance(distances[k], UnsupportedSurgery)}
        if others:
            options: dict[str, Any] = {"writers": self.writers, "probe": self.probe, "task": self.task}
            desc = f"verify: {len(others)} selections"
            results = trial_distances(self.source, validation, list(others.values()), desc, **options)
            distances.update(zip(others, results, strict=True))
        return [distances[k] for k in range(len(self.selections))]

"""What a compression came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.core.tables import table
from streamline_hooks.evaluation import MEASURES, SpeedReport, Written
from streamline_hooks.repair import StandInSize, Trained
from streamline_hooks.selection import Attempt, VerifiedSelection
from streamline_hooks.statistics import Profile
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.pipeline.config import CompressionConfig

LABELS = {
    "original": "original",
    "removed": "plain removal",
    "repaired": "repaired",
    "trained": "repaired and trained",
    "first_removed": "the search's first, removed",
    "first_repaired": "the search's first, repaired",
}


@dataclass
class CompressionResult:
    """A compressed model and how it came about.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model that was given, shortened for good.
    tokenizer : transformers.PreTrainedTokenizerBase or None
    plan : SurgeryPlan
        Old blocks to new blocks.
    config : CompressionConfig
        What was asked for; the same in the checkpoint.
    kind : str
        The short form of the replacement's config.
    size : StandInSize
        What one of it costs.
    criterion, search : str
        What the shortlist was found by.
    candidates : list of VerifiedSelection
        The shortlist, the chosen one first.
    perplexities : dict
        Perplexity on text that nothing was chosen or fitted on, of ``original``, ``removed`` (plain removal of the
        chosen selection), ``repaired`` (as it was fitted) and ``trained``; with ``first_removed`` and
        ``first_repaired`` for the one that the search put first, where that is another. Empty for a model that is not
        for text.
    parameters, size_in_bytes : tuple of int
        Before and after.
    seconds : dict
        By step.
    peak_memory : int or None
        Of the process, in bytes; None where the system does not tell.
    data : dict
        Tokens by part, sequence length, seed and the calibration data's fingerprint.
    profile : Profile
        Of the original, on the calibration text.
    task : Task
        What the model is for.
    scores : dict of str to dict of str to float
        Of the same, by measure, for a model that is not for text: see `TaskScores.of`.
    training : Trained or None
        How the training went, if there was one.
    samples : list of (Written, Written)
        Beginnings of the test text, written on greedily by the compressed model and by the original.
    speed : SpeedReport or None
        Of both, in turn; None where the model cannot write.
    rounds : list of dict
        Where the blocks went in several, of each: the blocks that were ``removed``, numbered as in the original, the
        ``perplexity`` by label, and the ``training``, as `Trained.report` tells it. What else is told of candidates
        and of the training is of the last round, and the profile of the first, which is the original's.
    warnings : list of str
        What perplexity does not show and has to be known, in words with numbers: see `CollapseWatch`; and that a
        training brought nothing (`Trained.in_vain`), or was not begun for want of time.
    folder : Path or None
        Where it was saved.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: SurgeryPlan
    config: CompressionConfig
    kind: str
    size: StandInSize
    criterion: str
    search: str
    candidates: list[VerifiedSelection]
    perplexities: dict[str, float]
    parameters: tuple[int, int]
    size_in_bytes: tuple[int, int]
    seconds: dict[str, float]
    peak_memory: int | None
    data: dict[str, Any]
    profile: Profile
    task: Task = Task("causal-lm")  # noqa: RUF009
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    training: Trained | None = None
    samples: list[tuple[Written, Written]] = field(default_factory=list)
    speed: SpeedReport | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = field(default=None)

    @classmethod
    def of_rounds(cls, done: Sequence[CompressionResult], data: dict[str, Any]) -> CompressionResult:
        """Return one result of all rounds, in the original's numbers, with the figures of all of the data."""
        first, last = done[0], done[-1]
        plans = list(accumulate((one.plan for one in done), lambda so_far, plan: plan.after(so_far)))
        removed = [set(plan.removed) for plan in plans]
        rows = [
            {
                "removed": sorted(now - before),
                "perplexity": one.perplexities,
                "scores": one.scores,
                "training": one.training and one.training.report(),
            }
            for one, before, now in zip(done, [set(), *removed], removed, strict=False)
        ]
        data = {**last.data, **data, **({"notes": last.data["notes"]} if "notes" in last.data else {})}
        if "fitting_tokens" in data:
            data["fitting_tokens"] = sum(one.data["fitting_tokens"] for one in done)
        vain = [one.training.in_vain if one.training else "" for one in done]
        return replace(
            last,
            plan=plans[-1],
            profile=first.profile,
            perplexities={name: last.perplexities[name] for name in ("original", "trained") if last.perplexities},
            scores={name: last.scores[name] for name in ("original", "trained") if last.scores},
            parameters=(first.parameters[0], last.parameters[1]),
            size_in_bytes=(first.size_in_bytes[0], last.size_in_bytes[1]),
            seconds={step: sum(one.seconds.get(step, 0.0) for one in done) for one in done for step in one.seconds},
            data=data,
            rounds=rows,
            warnings=[
                *(f"Round {k}: {text}" for k, text in enumerate(vain, 1) if text),
                *(text for text in last.warnings if text != vain[-1]),
            ],
        )

    def report(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "config": self.config.to_dict(),
            "kind": self.kind,
            "stand_in": asdict(self.size),
            "criterion": self.criterion,
            "search": self.search,
            "candidates": [_row(candidate) for candidate in self.candidates],
            "task": str(self.task),
            "measure": self.task.distance,
            "perplexity": self.perplexities,
            "scores": self.scores,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes": {"before": self.size_in_bytes[0], "after": self.size_in_bytes[1]},
            "training": None if self.training is None else self.training.report(),
            "samples": [
                {"prompt": mine.prompt, "text": mine.text, "reference": theirs.text} for mine, theirs in self.samples
            ],
            "speed": None if self.speed is None else self.speed.to_dict(),
            "rounds": self.rounds,
            "warnings": self.warnings,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "data": self.data,
            "similarity": {
                "cosine": self.profile.cosine.tolist(),
                "angular_distance": self.profile.angular.tolist(),
            },
            "versions": {name: version(name) for name in ("streamline_hooks", "torch", "transformers")},
        }

    @property
    def title(self) -> str:
        """In a few words, for the head of a page."""
        return f"{type(self.model).__name__}: {len(self.plan.slots)} of {self.plan.old_length} blocks"

    def table(self) -> str:
        """The result for a terminal, the warnings last."""
        chosen = self.candidates[0]
        rows = [
            ("blocks", f"{self.plan.old_length} -> {len(self.plan.slots)}, {self._what()}"),
            ("in their place", f"{self.kind} ({self.size})" if chosen.windows or chosen.maps else "nothing"),
            ("found by", f"{self.search}, {self.criterion}"),
            ("parameters", _before_after(self.parameters, "")),
            ("bytes", _before_after(self.size_in_bytes, "B")),
        ]
        for name, label in LABELS.items():
            if name in self.perplexities:
                value = self.perplexities[name]
                times = value / self.perplexities["original"]
                rows.append((f"perplexity, {label}", f"{value:.2f} (x {times:.2f})"))
        for measure, words in MEASURES.items():
            for name, label in LABELS.items():
                if measure in self.scores.get(name, {}):
                    rows.append((f"{words}, {label}", f"{self.scores[name][measure]:.4f}"))
        rows += [(f"seconds, {step}", f"{seconds:.1f}") for step, seconds in self.seconds.items()]
        if self.peak_memory is not None:
            rows.append(("peak memory", f"{self.peak_memory / 1e9:.2f} GB"))
        if self.folder is not None:
            rows.append(("written to", str(self.folder)))
        return "\n".join([table(rows), *(f"\nWarning: {text}" for text in self.warnings)])

    def _what(self) -> str:
        """What went, and what is silent; in several rounds, of each what went."""
        if not self.rounds:
            return _what(self.candidates[0])
        return "removed " + ", then ".join(" ".join(map(str, one["removed"])) for one in self.rounds)


def attempts_to_measure(best: VerifiedSelection, first: VerifiedSelection, trained: bool) -> dict[str, Attempt]:
    """Return the attempts measured beside the end result, by their names in `LABELS`."""
    found = {"removed": Attempt(best)}
    repaired = _as_fitted(best)
    if trained and any(stand_in is not None for stand_in in repaired.stand_ins):
        found["repaired"] = repaired
    if first is not best and not first.refused:
        found["first_removed"] = Attempt(first)
        repaired = _as_fitted(first)
        if repaired.maps or any(stand_in is not None for stand_in in repaired.stand_ins):
            found["first_repaired"] = repaired
    return found


def expected_attempts(trained: bool) -> int:
    """Return the expected number of `attempts_to_measure`, if half of the searches' first selections are chosen."""
    return 3 if trained else 2


def _as_fitted(one: VerifiedSelection) -> Attempt:
    return Attempt(one, tuple(repair.stand_in for repair in one.repairs), one.maps)


def findings(judged: Sequence[VerifiedSelection], best: VerifiedSelection, measure: str = "KL") -> list[str]:
    """A line a judged selection, for a terminal, with a mark at the best that can go; `measure` is `Task.distance`."""
    rows: list[tuple[object, ...]] = []
    for one in judged:
        columns = list(zip(*_errors(one), strict=True)) or [()] * 3
        worst = [max((value for value in column if value is not None), default=None) for column in columns]
        errors = ["-" if e is None else f"{e:{form}}" for e, form in zip(worst, (".4f", ".4f", ".1e"), strict=True)]
        if one.refused:
            rows.append((one, "", "", "", "", "", one.refused))
        else:
            numbers = f"{one.score:.4f}", *errors, f"{one.distance:.4f}"
            rows.append((one, *numbers, "<- chosen" if one is best else ""))
    head = ["blocks", "score", "error removed", "repaired", "ridge", measure.partition(" (")[0], ""]
    return table(rows, head).split("\n")


def _what(chosen: VerifiedSelection) -> str:
    """What went, and what is silent."""
    silent = ", ".join(f"{branch} of {k}" for k, branch in chosen.silenced)
    parts = ([f"removed {chosen.gone}"] if chosen.windows else []) + ([f"silenced {silent}"] if silent else [])
    return "; ".join(parts)


_ERRORS = ("removal_error", "repaired_error", "ridge")


def _errors(judged: VerifiedSelection) -> list[tuple[float | None, ...]]:
    """Those of everything that was fitted: removed, repaired, and the ridge."""
    windows = [(r.removal_error, r.repaired_error, r.ridge) for r in judged.repairs]
    return [*windows, *((m.removal_error, m.held_out_error, m.ridge) for m in judged.maps)]


def _row(judged: VerifiedSelection) -> dict[str, Any]:
    repairs = [
        {"start": r.window.start, "stop": r.window.stop, **{name: getattr(r, name) for name in _ERRORS}}
        for r in judged.repairs
    ]
    return {
        "windows": [[w.start, w.stop] for w in judged.windows],
        "silenced": [list(half) for half in judged.silenced],
        "maps": [
            {"block": m.block, "branch": m.branch, **dict(zip(_ERRORS, errors, strict=True))}
            for m, errors in zip(judged.maps, _errors(judged)[len(judged.repairs) :], strict=True)
        ],
        "score": judged.score,
        "distance": judged.distance if math.isfinite(judged.distance) else None,
        "refused": judged.refused,
        "repairs": repairs,
    }


def _before_after(pair: tuple[int, int], unit: str) -> str:
    before, after = pair
    return f"{before / 1e6:.1f} M{unit} -> {after / 1e6:.1f} M{unit} ({after / before - 1:+.1%})"

"""Define `CompressionResult`, the result of a compression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint import STAGE_LABELS
from streamline_hooks.core import table
from streamline_hooks.distillation import TrainingResult
from streamline_hooks.evaluation import MEASURES, GeneratedText, SpeedReport
from streamline_hooks.modeling import Task
from streamline_hooks.repair import ReplacementSize
from streamline_hooks.selection import TargetOutcome, Trial, VerifiedSelection
from streamline_hooks.statistics import Profile
from streamline_hooks.surgery import SurgeryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.pipeline.config import CompressionConfig
    from streamline_hooks.pipeline.depths import ChosenDepth


@dataclass
class CompressionResult:
    """A compressed model, its plan and its measurements.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The compressed model: the given model, or a copy of it if ``inplace=False``.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        The given tokenizer.
    plan : SurgeryPlan
        Mapping from the old to the new blocks.
    config : CompressionConfig
        The config of the compression, as saved in the checkpoint.
    kind : str
        Short form of the replacement's config.
    size : ReplacementSize
        Parameters and slots of one replacement.
    criterion, search : str
        Criterion and search that produced the shortlist.
    candidates : list of VerifiedSelection
        The shortlist, after the chosen selection. With `CompressionConfig.at_most` the chosen one is a part of a
        selection of the shortlist.
    perplexities : dict of str to float
        Perplexity on the test text of the ``original``, and of the chosen selection ``removed`` (without replacement),
        ``repaired`` (as fitted) and ``trained``. If the search ranked another selection first, also its
        ``first_removed`` and ``first_repaired``. Empty for models that are not causal language models.
    parameters, size_in_bytes : tuple of (int, int)
        Size of the original and of the compressed model.
    seconds : dict of str to float
        Duration of each step.
    peak_memory : int or None
        Peak memory of the process in bytes, or None if the system does not report it.
    data : dict
        Tokens by part, sequence length, seed and the fingerprint of the calibration data.
    profile : Profile
        The profile of the original on the calibration text.
    task : Task
        The task of the model.
    scores : dict of str to dict of str to float
        Scores by label (as in `perplexities`) and measure, for models that are not causal language models; see
        `TaskScores.of`.
    training : TrainingResult or None
        The training run, or None if nothing was trained.
    samples : list of (GeneratedText, GeneratedText)
        Greedy generations of the compressed model and of the original for prompts from the test text.
    speed : SpeedReport or None
        Speed of both models, or None if it was not measured.
    rounds : list of dict
        For each round of an iterative compression: the ``removed`` blocks in the original's numbering, the
        ``perplexity`` by label, and the ``training`` (`TrainingResult.report`). `candidates` and `training` are those
        of the last round.
    target : TargetOutcome or None
        Predicted and measured value of the target, or None if the target is a number or a fraction of the blocks.
    bounded : ChosenDepth or None
        The bounds on the losses of the compressed model and of the models with fewer removed blocks, or None without
        `CompressionConfig.at_most`.
    warnings : list of str
        Degenerate generation (`CollapseCheck`), training without effect (`TrainingResult.warning`) or without time, and
        a target that was predicted wrongly (`TargetOutcome.warning`).
    folder : Path or None
        The folder with the saved model, or None if it was not saved.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import compress
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> result = compress(tiny_model("llama"), batches, remove=2)
    >>> result.title, result.parameters[1] < result.parameters[0]
    ('StreamlinedLlamaForCausalLM: 6 of 8 blocks', True)
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: SurgeryPlan
    config: CompressionConfig
    kind: str
    size: ReplacementSize
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
    training: TrainingResult | None = None
    samples: list[tuple[GeneratedText, GeneratedText]] = field(default_factory=list)
    speed: SpeedReport | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    target: TargetOutcome | None = None
    bounded: ChosenDepth | None = None
    warnings: list[str] = field(default_factory=list)
    folder: Path | None = field(default=None)

    @classmethod
    def of_rounds(cls, results: Sequence[CompressionResult], data: dict[str, Any]) -> CompressionResult:
        """Combine the results of all rounds into one, in the block numbering of the original."""
        first, last = results[0], results[-1]
        plans = list(accumulate((result.plan for result in results), lambda so_far, plan: plan.after(so_far)))
        removed = [set(plan.removed) for plan in plans]
        rows = [
            {
                "removed": sorted(now - before),
                "perplexity": result.perplexities,
                "scores": result.scores,
                "training": result.training and result.training.report(),
            }
            for result, before, now in zip(results, [set(), *removed], removed, strict=False)
        ]
        data = {**last.data, **data, **({"notes": last.data["notes"]} if "notes" in last.data else {})}
        if "fitting_tokens" in data:
            data["fitting_tokens"] = sum(result.data["fitting_tokens"] for result in results)
        training_warnings = [result.training.warning if result.training else "" for result in results]
        return replace(
            last,
            plan=plans[-1],
            profile=first.profile,
            perplexities={name: last.perplexities[name] for name in ("original", "trained") if last.perplexities},
            scores={name: last.scores[name] for name in ("original", "trained") if last.scores},
            parameters=(first.parameters[0], last.parameters[1]),
            size_in_bytes=(first.size_in_bytes[0], last.size_in_bytes[1]),
            seconds={
                step: sum(result.seconds.get(step, 0.0) for result in results)
                for result in results
                for step in result.seconds
            },
            data=data,
            rounds=rows,
            warnings=[
                *(f"Round {k}: {text}" for k, text in enumerate(training_warnings, 1) if text),
                *(text for text in last.warnings if text != training_warnings[-1]),
            ],
        )

    def report(self) -> dict[str, Any]:
        """Return everything except the model and the tokenizer as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "config": self.config.to_dict(),
            "kind": self.kind,
            "stand_in": asdict(self.size),
            "criterion": self.criterion,
            "search": self.search,
            "candidates": [_candidate_report(candidate) for candidate in self.candidates],
            "task": str(self.task),
            "measure": self.task.distance,
            "perplexity": self.perplexities,
            "scores": self.scores,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes": {"before": self.size_in_bytes[0], "after": self.size_in_bytes[1]},
            "training": None if self.training is None else self.training.report(),
            "samples": [
                {"prompt": generated.prompt, "text": generated.text, "reference": reference.text}
                for generated, reference in self.samples
            ],
            "speed": None if self.speed is None else self.speed.to_dict(),
            "rounds": self.rounds,
            "target": None if self.target is None else self.target.to_dict(),
            "bounded": None if self.bounded is None else self.bounded.to_dict(),
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
        """The class of the model, and its number of blocks after and before."""
        return f"{type(self.model).__name__}: {len(self.plan.slots)} of {self.plan.old_length} blocks"

    def table(self) -> str:
        """Return the result as a table for a terminal, followed by the warnings."""
        chosen = self.candidates[0]
        removed = "removed " + ", then ".join(
            " ".join(map(str, round_report["removed"])) for round_report in self.rounds
        )
        rows = [
            (
                "blocks",
                f"{self.plan.old_length} -> {len(self.plan.slots)}, "
                f"{removed if self.rounds else _removed_text(chosen)}",
            ),
            ("replacement", f"{self.kind} ({self.size})" if chosen.windows or chosen.maps else "none"),
            ("search", f"{self.search}, {self.criterion}"),
            ("parameters", _before_after(self.parameters, "")),
            ("bytes", _before_after(self.size_in_bytes, "B")),
            *([] if self.target is None else [("target", str(self.target))]),
            *([] if self.bounded is None else [("guarantee", str(self.bounded))]),
        ]
        for name, label in STAGE_LABELS.items():
            if name in self.perplexities:
                value = self.perplexities[name]
                times = value / self.perplexities["original"]
                rows.append((f"perplexity, {label}", f"{value:.2f} (x {times:.2f})"))
        for measure, label_of_measure in MEASURES.items():
            for name, label in STAGE_LABELS.items():
                if measure in self.scores.get(name, {}):
                    rows.append((f"{label_of_measure}, {label}", f"{self.scores[name][measure]:.4f}"))
        rows += [(f"seconds, {step}", f"{seconds:.1f}") for step, seconds in self.seconds.items()]
        if self.peak_memory is not None:
            rows.append(("peak memory", f"{self.peak_memory / 1e9:.2f} GB"))
        if self.folder is not None:
            rows.append(("saved to", str(self.folder)))
        return "\n".join([table(rows), *(f"\nWarning: {text}" for text in self.warnings)])


def trials_to_measure(best: VerifiedSelection, first: VerifiedSelection, trained: bool) -> dict[str, Trial]:
    """Return the trials to measure in addition to the end result, by their names in `STAGE_LABELS`."""
    trials = {"removed": Trial(best)}
    repaired = _as_fitted(best)
    if trained and (repaired.maps or any(module is not None for module in repaired.replacement_modules)):
        trials["repaired"] = repaired
    if first is not best and not first.refused:
        trials["first_removed"] = Trial(first)
        repaired = _as_fitted(first)
        if repaired.maps or any(replacement_module is not None for replacement_module in repaired.replacement_modules):
            trials["first_repaired"] = repaired
    return trials


def expected_trials(trained: bool) -> int:
    """Return the typical number of `trials_to_measure`."""
    return 3 if trained else 2


def _as_fitted(selection: VerifiedSelection) -> Trial:
    return Trial(selection, tuple(repair.replacement_module for repair in selection.repairs), selection.maps)


def format_candidates(verified: Sequence[VerifiedSelection], best: VerifiedSelection, measure: str = "KL") -> list[str]:
    """Return a table row for each verified selection, with the best marked; `measure` is `Task.distance`."""
    rows: list[tuple[object, ...]] = []
    for selection in verified:
        columns = list(zip(*_errors(selection), strict=True)) or [()] * 3
        worst = [max((value for value in column if value is not None), default=None) for column in columns]
        errors = ["-" if e is None else f"{e:{spec}}" for e, spec in zip(worst, (".4f", ".4f", ".1e"), strict=True)]
        if selection.refused:
            rows.append((selection, "", "", "", "", "", selection.refused))
        else:
            numbers = f"{selection.score:.4f}", *errors, f"{selection.distance:.4f}"
            rows.append((selection, *numbers, "<- chosen" if selection is best else ""))
    head = ["blocks", "score", "error removed", "repaired", "ridge", measure.partition(" (")[0], ""]
    return table(rows, head).split("\n")


def _removed_text(chosen: VerifiedSelection) -> str:
    """Describe the removed blocks and the zeroed branches."""
    zeroed = ", ".join(f"{branch} of {k}" for k, branch in chosen.zeroed)
    parts = ([f"removed {chosen.blocks_text}"] if chosen.windows else []) + ([f"zeroed {zeroed}"] if zeroed else [])
    return "; ".join(parts)


_ERRORS = ("removal_error", "repaired_error", "ridge")


def _errors(selection: VerifiedSelection) -> list[tuple[float | None, ...]]:
    """Return the removal error, the repaired error and the ridge of each fitted window and map."""
    windows = [(r.removal_error, r.repaired_error, r.ridge) for r in selection.repairs]
    return [*windows, *((m.removal_error, m.held_out_error, m.ridge) for m in selection.maps)]


def _candidate_report(selection: VerifiedSelection) -> dict[str, Any]:
    repairs = [
        {"start": r.window.start, "stop": r.window.stop, **{name: getattr(r, name) for name in _ERRORS}}
        for r in selection.repairs
    ]
    return {
        "windows": [[w.start, w.stop] for w in selection.windows],
        "silenced": [list(pair) for pair in selection.zeroed],
        "maps": [
            {"block": m.block, "branch": m.branch, **dict(zip(_ERRORS, errors, strict=True))}
            for m, errors in zip(selection.maps, _errors(selection)[len(selection.repairs) :], strict=True)
        ],
        "score": selection.score,
        "distance": selection.distance if math.isfinite(selection.distance) else None,
        "refused": selection.refused,
        "repairs": repairs,
    }


def _before_after(pair: tuple[int, int], unit: str) -> str:
    before, after = pair
    return f"{before / 1e6:.1f} M{unit} -> {after / 1e6:.1f} M{unit} ({after / before - 1:+.1%})"

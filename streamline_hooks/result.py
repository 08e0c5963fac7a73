"""What a compression came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.statistics import StateSimilarity
from streamline_hooks.surgery import SurgeryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABELS = {
    "original": "original",
    "removed": "plain removal",
    "repaired": "repaired",
    "cosine_first_removed": "cosine's first, removed",
    "cosine_first_repaired": "cosine's first, repaired",
}


@dataclass(frozen=True)
class JudgedWindow:
    """A shortlisted window and what was found out about it.

    Attributes
    ----------
    start, stop : int
        The half-open window of blocks.
    cosine : float
        Mean cosine of the states before and after it, on calibration text.
    removal_error, repaired_error : float
        Mean relative squared error of the state after it, without and with the closed form, on held-out sequences.
    ridge : float
        Chosen for it, in units of the mean eigenvalue of the moments.
    kl : float
        Mean KL to the original's next-token distribution on validation text, repaired, in nats a token.
    """

    start: int
    stop: int
    cosine: float
    removal_error: float
    repaired_error: float
    ridge: float
    kl: float


@dataclass
class CompressionResult:
    """A compressed model and how it came about.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model that was given, shortened for good.
    tokenizer : transformers.PreTrainedTokenizerBase
    plan : SurgeryPlan
        Old blocks to new blocks.
    kind : str
        What stands in the window's place.
    candidates : list of JudgedWindow
        The shortlist, the chosen one first.
    perplexities : dict
        Perplexity on text that nothing was chosen or fitted on, of ``original``, ``removed`` (plain removal of the
        chosen window) and ``repaired``; with ``cosine_first_removed`` and ``cosine_first_repaired`` for the window
        that cosine alone would have taken.
    parameters, size_in_bytes : tuple of int
        Before and after.
    seconds : dict
        By step.
    peak_memory : int or None
        Of the process, in bytes; None where the system does not tell.
    data : dict
        Tokens by part, sequence length, seed and the calibration data's fingerprint.
    similarity : StateSimilarity
        Of the states along the original, on the calibration text.
    folder : Path or None
        Where it was saved.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: SurgeryPlan
    kind: str
    candidates: list[JudgedWindow]
    perplexities: dict[str, float]
    parameters: tuple[int, int]
    size_in_bytes: tuple[int, int]
    seconds: dict[str, float]
    peak_memory: int | None
    data: dict[str, Any]
    similarity: StateSimilarity
    folder: Path | None = field(default=None)

    def report(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "kind": self.kind,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "perplexity": self.perplexities,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes": {"before": self.size_in_bytes[0], "after": self.size_in_bytes[1]},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "data": self.data,
            "similarity": {
                "cosine": self.similarity.cosine.tolist(),
                "angular_distance": self.similarity.angular.tolist(),
            },
            "versions": {name: version(name) for name in ("streamline_hooks", "torch", "transformers")},
        }

    def table(self) -> str:
        """The result for a terminal."""
        original = self.perplexities["original"]
        rows = [
            ("blocks", f"{self.plan.old_length} -> {len(self.plan.slots)}, removed {_runs(self.plan.removed)}"),
            ("in their place", self.kind),
            ("parameters", _before_after(self.parameters, "")),
            ("bytes", _before_after(self.size_in_bytes, "B")),
        ]
        for name, label in LABELS.items():
            if name in self.perplexities:
                value = self.perplexities[name]
                rows.append((f"perplexity, {label}", f"{value:10.2f}   x {value / original:.2f}"))
        rows += [(f"seconds, {step}", f"{seconds:10.1f}") for step, seconds in self.seconds.items()]
        if self.peak_memory is not None:
            rows.append(("peak memory", f"{self.peak_memory / 1e9:10.2f} GB"))
        if self.folder is not None:
            rows.append(("written to", str(self.folder)))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def findings(judged: list[JudgedWindow]) -> list[str]:
    """A line a judged window, for a terminal."""
    head = "window    cosine   error removed   repaired     ridge        KL"
    rows = [
        f"{w.start:>3}-{w.stop - 1:<3} {w.cosine:9.4f} {w.removal_error:15.4f} {w.repaired_error:10.4f} {w.ridge:9.1e} "
        f"{w.kl:9.4f}{'   <- chosen' if k == 0 else ''}"
        for k, w in enumerate(judged)
    ]
    return [head, *rows]


def _before_after(pair: tuple[int, int], unit: str) -> str:
    before, after = pair
    return f"{before / 1e6:10.1f} M{unit} -> {after / 1e6:.1f} M{unit} ({after / before - 1:+.1%})"


def _runs(blocks: Sequence[int]) -> str:
    if blocks and list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
    return ", ".join(map(str, blocks))

"""Score a model in memory and compare it with the model that it was made from.

    python -m benchmarks.quality_scores [MODEL] [--data FOLDER] [--sequences 6] [--items N] [--threads N]

A row has the perplexity of each held-out domain, KL and top-1 agreement with the original on the same text, and the
accuracy on the tasks of `benchmarks.multiple_choice`, run by lm-eval. Without MODEL only the original,
SmolLM2-135M-Instruct, is scored. Its scores are cached in ``benchmarks/results/quality_original.json`` by a digest of
all settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.multiple_choice import TASKS, task_of
from benchmarks.real_text import RESULTS, arguments, heldout
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.evaluation import (
    Agreement,
    Perplexity,
    TaskResult,
    TaskSettings,
    compare_logits,
    load_tasks,
    perplexity,
    run_paired,
    score_tokens,
)
from streamline_hooks.modeling import Task

FILE = RESULTS / "quality_original.json"
SEQUENCES, CHOICES_AT_ONCE = 6, 16
CLEARLY = 2.0  # the original must exceed chance by so many standard errors for a task to count


@dataclass(frozen=True)
class Scores:
    """Scores of one model.

    Attributes
    ----------
    perplexity : dict of str to float
        Perplexity by held-out domain.
    right : dict of str to str
        By task, a string with 1 for each correctly answered question and 0 for the others.
    chance : dict of str to float
        Accuracy of guessing, by task.
    """

    perplexity: dict[str, float]
    right: dict[str, str]
    chance: dict[str, float] = field(default_factory=dict)

    def accuracy(self, task: str) -> float:
        return self.right[task].count("1") / len(self.right[task])

    def standard_error(self, task: str) -> float:
        """Standard error of the accuracy: √(p(1 − p)/(n − 1))."""
        return statistics.stdev(map(int, self.right[task])) / math.sqrt(len(self.right[task]))


class Quality:
    """The original, the text and the questions, to score models made from the original.

    Parameters
    ----------
    original : torch.nn.Module
        The original model. It must not be changed afterwards; change a copy.
    tokenizer : PreTrainedTokenizerBase
    data : Path
        Folder with ``text/heldout`` and ``bench``.
    sequences, first : int
        Number of sequences of 512 tokens per domain and the index of the first; fewer if the domain is shorter.
    items : int, optional
        Questions per task, except for BLiMP; by default the numbers of `TASKS`.
    tasks : sequence of str
        Names in `TASKS`; empty for a model that cannot answer questions.
    seed : int
        Seed of the subsets.
    cache : Path
        File in which the scores of the original are cached.

    Attributes
    ----------
    key : str
        Digest of the original, the text and the questions; only rows with the same key are comparable.
    """

    def __init__(
        self,
        original: nn.Module,
        tokenizer: Any,
        data: Path,
        *,
        sequences: int = SEQUENCES,
        first: int = 0,
        items: int | None = None,
        tasks: Sequence[str] = tuple(TASKS),
        seed: int = 0,
        cache: Path = FILE,
    ) -> None:
        self.original, self.tokenizer = original, tokenizer
        self.text = heldout(data, tokenizer, sequences, first)
        self.tasks = {}
        for name in tasks:
            settings = TaskSettings(metric=TASKS[name].metric, batch_size=CHOICES_AT_ONCE)
            self.tasks |= load_tasks([task_of(name, data / "bench", items, seed)], settings)
        self.key, self.scores = self._cached(cache)
        self.chance = self.scores.chance

    @property
    def counted(self) -> list[str]:
        """The tasks on which the original is clearly above chance."""
        scores = self.scores
        return [t for t in scores.right if scores.accuracy(t) - self.chance[t] > CLEARLY * scores.standard_error(t)]

    def row(self, model: nn.Module, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Score a model that was made from a copy of the original.

        Parameters
        ----------
        model : torch.nn.Module
        tasks : sequence of str, optional
            Tasks to run, by default all; `counted` has those that enter the retained mean.

        Returns
        -------
        dict
            JSON values. ``mean_perplexity_ratio`` is the mean over the domains. ``retained`` is, for each counted task,
            (accuracy − chance)/(accuracy of the original − chance); ``mean_retained`` is the mean, or None if no task
            counts; ``mean_retained_standard_error`` is its standard error over questions, paired for both models.
        """
        started = time.perf_counter()
        perplexities, agreement_by_domain, seconds = {}, {}, {}
        for name, batches in self.text.items():
            sums, agreement = Perplexity(), Agreement()
            with run_paired(model, self.original, batches, name, Task("causal-lm")) as answers:
                for batch, output, *pair in answers:
                    sums += score_tokens(output.logits, batch["input_ids"], batch["attention_mask"])
                    agreement += compare_logits(*pair)
            perplexities[name], agreement_by_domain[name] = sums.value, agreement
        seconds["text"] = round(time.perf_counter() - started, 1)
        scores, whole = (
            Scores(perplexities, *self._right(model, seconds, tasks)),
            sum(agreement_by_domain.values(), Agreement()),
        )
        ratio = {name: scores.perplexity[name] / self.scores.perplexity[name] for name in self.text}
        return {
            "perplexity": scores.perplexity,
            "perplexity_ratio": ratio,
            "mean_perplexity_ratio": statistics.fmean(ratio.values()),
            "kl": whole.kl,
            "top1": whole.top1,
            "kl_by_domain": {name: agreement.kl for name, agreement in agreement_by_domain.items()},
            "tokens": whole.tokens,
            **self._answers(scores),
            **self.retained_scores(scores),
            "seconds": seconds,
        }

    def original_row(self) -> dict[str, Any]:
        """Return the cached scores of the original as JSON values."""
        return {"perplexity": self.scores.perplexity, **self._answers(self.scores), "counted": self.counted}

    def _answers(self, scores: Scores) -> dict[str, Any]:
        tasks = list(scores.right)
        return {
            "accuracy": {task: scores.accuracy(task) for task in tasks},
            "accuracy_standard_error": {task: scores.standard_error(task) for task in tasks},
            "chance": {task: self.chance[task] for task in tasks},
            "right": scores.right,
        }

    def retained_scores(self, scores: Scores) -> dict[str, Any]:
        """Return the retained accuracy above chance, with the linearized standard error from x − r·x₀ per question."""
        retained: dict[str, float] = {}
        variance = 0.0
        for task in (task for task in self.counted if task in scores.right):
            headroom = self.scores.accuracy(task) - self.chance[task]
            ratio = (scores.accuracy(task) - self.chance[task]) / headroom
            pairs = zip(scores.right[task], self.scores.right[task], strict=True)
            parts = [int(score) - ratio * int(original_score) for score, original_score in pairs]
            retained[task] = ratio
            variance += statistics.variance(parts) / len(parts) / headroom**2
        return {
            "retained": retained,
            "mean_retained": statistics.fmean(retained.values()) if retained else None,
            "mean_retained_standard_error": math.sqrt(variance) / len(retained) if retained else None,
        }

    def _right(
        self, model: nn.Module, seconds: dict[str, float], tasks: Sequence[str] | None = None
    ) -> tuple[dict[str, str], dict[str, float]]:
        results: dict[str, TaskResult] = {}
        for name in self.tasks if tasks is None else tasks:
            started = time.perf_counter()
            results[name] = self.tasks[name].run(model, self.tokenizer)
            seconds[name] = round(time.perf_counter() - started, 1)
        right = {name: "".join("01"[int(score)] for score in result.scores) for name, result in results.items()}
        return right, {name: result.chance for name, result in results.items()}

    def _cached(self, cache: Path) -> tuple[str, Scores]:
        settings = {
            "weights": fingerprint(self.original.state_dict()),
            "text": {name: fingerprint_of_text(batches) for name, batches in self.text.items()},
            "tasks": {name: task.digest() for name, task in self.tasks.items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        known = json.loads(cache.read_text()) if cache.exists() else {}
        key = digest(json.dumps(settings))
        if key not in known:
            started, seconds = time.perf_counter(), {}
            value = {name: perplexity(self.original, batches, name).value for name, batches in self.text.items()}
            seconds["text"] = round(time.perf_counter() - started, 1)
            scores = Scores(value, *self._right(self.original, seconds))
            known[key] = {"settings": settings, "seconds": seconds, "scores": asdict(scores)}
            write(cache, known)
        return key, Scores(**known[key]["scores"])


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of the names, dtypes, shapes and values of tensors."""
    digested = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digested.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digested.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digested.hexdigest()


def fingerprint_of_text(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    return fingerprint({str(k): batch["input_ids"] for k, batch in enumerate(batches)})


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(half, path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", help="folder of a compressed SmolLM2-135M-Instruct")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--items", type=int, help="questions per task, except for BLiMP")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    original, tokenizer = load_pretrained("smollm2")
    quality = Quality(original, tokenizer, options.data, sequences=options.sequences, items=options.items)
    row = quality.row(load_pretrained(options.model)[0]) if options.model else quality.original_row()
    print(json.dumps({name: value for name, value in row.items() if name != "right"}, indent=1))


if __name__ == "__main__":
    main()

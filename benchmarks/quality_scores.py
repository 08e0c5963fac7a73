"""One row of scores for a model in memory: what it has lost against the model that it was made from.

    python -m benchmarks.quality_scores [MODEL] [--data FOLDER] [--sequences 6] [--items N] [--threads N]

Perplexity for each held-out domain, KL and top-1 agreement with the original on the same text, and accuracy on the
tasks of `benchmarks.multiple_choice`, by lm-eval. Without MODEL the original alone, SmolLM2-135M-Instruct, is scored.
Its scores are kept in ``benchmarks/results/quality_original.json``, by everything that they depend on, and are not made
again.
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
from streamline_hooks.evaluation import Agreement, Perplexity, TaskResult, TaskSettings, perplexity
from streamline_hooks.evaluation.agreement import agreement_of, paired_answers
from streamline_hooks.evaluation.perplexity import score
from streamline_hooks.evaluation.tasks import load_tasks
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.task import Task

FILE = RESULTS / "quality_original.json"
SEQUENCES, CHOICES_AT_ONCE = 6, 16
CLEARLY = 2.0  # standard errors above chance that the original must reach for a task to enter the retained mean


@dataclass(frozen=True)
class Scores:
    """What one model reaches.

    Attributes
    ----------
    perplexity : dict of str to float
        By held-out domain.
    right : dict of str to str
        By task, for each question 1 where it was answered right and 0 where not.
    chance : dict of str to float
        By task, the accuracy of guessing.
    """

    perplexity: dict[str, float]
    right: dict[str, str]
    chance: dict[str, float] = field(default_factory=dict)

    def accuracy(self, task: str) -> float:
        return self.right[task].count("1") / len(self.right[task])

    def standard_error(self, task: str) -> float:
        """Of the accuracy: √(p(1 − p)/(n − 1))."""
        return statistics.stdev(map(int, self.right[task])) / math.sqrt(len(self.right[task]))


class Quality:
    """The original, the text and the questions, to score what is made from it.

    Parameters
    ----------
    original : torch.nn.Module
        It is kept, and must not be changed afterwards: change a copy.
    tokenizer : PreTrainedTokenizerBase
    data : Path
        With ``text/heldout`` and ``bench``.
    sequences, first : int
        How many of 512 tokens, of each domain, from which one on; fewer where it is shorter.
    items : int, optional
        Questions a task but BLiMP; by default each task's own number, see `TASKS`.
    tasks : sequence of str
        Some of `TASKS`; none for a model that answers no question.
    seed : int
        Of the subsets.
    cache : Path
        Where the original's scores are kept.

    Attributes
    ----------
    key : str
        Of what is asked and of whom: only rows of one key are comparable.
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
        """The tasks on which the original is clearly above chance; only of these is there something to retain."""
        scores = self.scores
        return [t for t in scores.right if scores.accuracy(t) - self.chance[t] > CLEARLY * scores.standard_error(t)]

    def row(self, model: nn.Module, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Score a model that was made from the original, and is another module in memory.

        Parameters
        ----------
        model : torch.nn.Module
        tasks : sequence of str, optional
            What is asked, by default all; `counted` is all that enters the retained mean.

        Returns
        -------
        dict
            JSON values. ``mean_perplexity_ratio`` is the mean over the domains; ``retained``, for each counted task,
            is (accuracy − chance)/(the original's − chance), and ``mean_retained`` their mean, None where no task
            counts; ``mean_retained_standard_error`` is that of drawing the questions, the same for both models.
        """
        started = time.perf_counter()
        value, agreed, seconds = {}, {}, {}
        for name, batches in self.text.items():
            sums, alike = Perplexity(), Agreement()
            with paired_answers(model, self.original, batches, name, Task("causal-lm")) as answers:
                for given, output, *pair in answers:
                    sums += score(output.logits, given["input_ids"], given["attention_mask"])
                    alike += agreement_of(*pair)
            value[name], agreed[name] = sums.value, alike
        seconds["text"] = round(time.perf_counter() - started, 1)
        scores, whole = Scores(value, *self._right(model, seconds, tasks)), sum(agreed.values(), Agreement())
        ratio = {name: scores.perplexity[name] / self.scores.perplexity[name] for name in self.text}
        return {
            "perplexity": scores.perplexity,
            "perplexity_ratio": ratio,
            "mean_perplexity_ratio": statistics.fmean(ratio.values()),
            "kl": whole.kl,
            "top1": whole.top1,
            "kl_by_domain": {name: alike.kl for name, alike in agreed.items()},
            "tokens": whole.tokens,
            **self._answers(scores),
            **self.retained_scores(scores),
            "seconds": seconds,
        }

    def original_row(self) -> dict[str, Any]:
        """The original's own scores, from the cache, as JSON values."""
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
        """What is retained above chance; the error by linearisation, each question's x − r·x₀ being its part."""
        found: dict[str, float] = {}
        variance = 0.0
        for task in (task for task in self.counted if task in scores.right):
            room = self.scores.accuracy(task) - self.chance[task]
            kept = (scores.accuracy(task) - self.chance[task]) / room
            pairs = zip(scores.right[task], self.scores.right[task], strict=True)
            parts = [int(mine) - kept * int(theirs) for mine, theirs in pairs]
            found[task] = kept
            variance += statistics.variance(parts) / len(parts) / room**2
        return {
            "retained": found,
            "mean_retained": statistics.fmean(found.values()) if found else None,
            "mean_retained_standard_error": math.sqrt(variance) / len(found) if found else None,
        }

    def _right(
        self, model: nn.Module, seconds: dict[str, float], tasks: Sequence[str] | None = None
    ) -> tuple[dict[str, str], dict[str, float]]:
        found: dict[str, TaskResult] = {}
        for name in self.tasks if tasks is None else tasks:
            started = time.perf_counter()
            found[name] = self.tasks[name].run(model, self.tokenizer)
            seconds[name] = round(time.perf_counter() - started, 1)
        right = {name: "".join("01"[int(score)] for score in result.scores) for name, result in found.items()}
        return right, {name: result.chance for name, result in found.items()}

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
            found = Scores(value, *self._right(self.original, seconds))
            known[key] = {"settings": settings, "seconds": seconds, "scores": asdict(found)}
            write(cache, known)
        return key, Scores(**known[key]["scores"])


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and values: a model that has been changed in between is another one."""
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
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(half, path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", help="a folder that a shortened SmolLM2-135M-Instruct was saved in")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--items", type=int, help="questions a task, the same for all but BLiMP")
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

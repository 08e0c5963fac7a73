"""The tasks on which changed models are scored: synthetic problems, last words, and multiple-choice questions.

The draw ``development`` has problems only, because held-out text and questions must not be used for choices. The draws
``0``, ``1`` and ``2`` have other problems, passages and questions.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.generation_scores import AT_ONCE, SAMPLING, bits
from benchmarks.heldout_pieces import last_words
from benchmarks.multiple_choice import TASKS, task_of
from benchmarks.probe_difficulty import chosen
from benchmarks.quality_scores import CHOICES_AT_ONCE
from benchmarks.short_answers import SHOTS, answer_tokens, fast_products, guessed, problems_of
from streamline_hooks.evaluation import (
    ANSWER_STOP,
    TaskSettings,
    TextGenerationConfig,
    generate_texts,
    load_tasks,
    solve_problems,
)
from streamline_hooks.evaluation.synthetic_tasks import guessing_accuracy

SEEDS = {"development": 901, "0": 902, "1": 903, "2": 904}  # of problems and passages
LAST_WORD = "last word"
SAMPLED, SAMPLES = 60, 8  # problems of each kind with sampled answers, and answers to each of them


class ScoredTasks:
    """Problems, passages and questions of one draw.

    Parameters
    ----------
    data : Path
        Folder with ``text/heldout`` and ``bench``.
    tokenizer : PreTrainedTokenizerBase
    items : int
        Items of each task, at most all.
    draw : str
        One of `SEEDS`.
    shots : int
        Examples before each problem. With another number than the default, there are problems only.
    questions : sequence of str
        Names in `benchmarks.multiple_choice.TASKS`; by default none.

    Attributes
    ----------
    chance : dict of str to float
        Accuracy of the most frequent answer to the problems of each kind, and of guessing the answers of the questions,
        which is known after `score`.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        items: int,
        draw: str,
        shots: int = SHOTS,
        questions: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.problems = problems_of(items, SEEDS[draw], chosen(), shots)
        self.chance = {kind: guessing_accuracy(problems) for kind, problems in self.problems.items()}
        self.ends: list[Any] = []
        self.questions: dict[str, Any] = {}
        if draw != "development" and shots == SHOTS:
            self.ends = last_words(data, tokenizer, items, SEEDS[draw])
            for name in questions:
                settings = TaskSettings(metric=TASKS[name].metric, batch_size=CHOICES_AT_ONCE)
                self.questions |= load_tasks([task_of(name, data / "bench", items, SEEDS[draw])], settings)

    def prompt_tokens(self) -> dict[str, float]:
        """Return the mean number of tokens of the prompts of each task that generates an answer."""
        texts = {kind: [problem.prompt for problem in problems] for kind, problems in self.problems.items()}
        texts |= {LAST_WORD: [end.context.rstrip() for end in self.ends]} if self.ends else {}
        return {kind: statistics.fmean(len(self.tokenizer(text).input_ids) for text in texts[kind]) for kind in texts}

    def score(self, model: Any) -> dict[str, str]:
        """Return for each task which items are right, as bits."""
        results = {}
        with fast_products(model):
            for kind, problems in self.problems.items():
                config = TextGenerationConfig(
                    new_tokens=answer_tokens(self.tokenizer, problems), stop=ANSWER_STOP, batch_size=AT_ONCE["probes"]
                )
                results[kind] = bits(solve_problems(model, self.tokenizer, problems, config, desc=kind).correct)
        if self.ends:
            results[LAST_WORD] = self.score_last_words(model)
        for name, task in self.questions.items():
            with fast_products(model):
                result = task.run(model, self.tokenizer)
            self.chance[name] = result.chance
            results[name] = bits([score == 1 for score in result.scores])
        return results

    def sample(self, model: Any) -> dict[str, list[int]]:
        """Return how many of `SAMPLES` sampled answers to each of the first `SAMPLED` problems are right, by kind."""
        right = {}
        with fast_products(model):
            for kind, problems in self.problems.items():
                config = TextGenerationConfig(
                    new_tokens=answer_tokens(self.tokenizer, problems),
                    samples=SAMPLES,
                    stop=ANSWER_STOP,
                    batch_size=AT_ONCE["pass_at"],
                    **SAMPLING,
                )
                solved = solve_problems(model, self.tokenizer, problems[:SAMPLED], config, desc=f"{kind}, sampled")
                right[kind] = [sum(tries) for tries in solved.solved]
        return right

    def chance_of_pass(self, k: int) -> dict[str, float]:
        """Return the accuracy of guessing k times by the frequency of the answers, for the problems of `sample`."""
        return {kind: guessed(problems[:SAMPLED], problems, k) for kind, problems in self.problems.items()}

    def score_last_words(self, model: Any) -> str:
        """Return in which passages the next word is the right one, as bits."""
        config = TextGenerationConfig(new_tokens=8, batch_size=AT_ONCE["probes"])
        contexts = [end.context.rstrip() for end in self.ends]  # the space belongs to the tokens of the word
        with fast_products(model):
            texts = generate_texts(model, self.tokenizer, contexts, config, desc="last words")
        words = [re.match(r"\s*([A-Za-z]*)", text.text) for (text,) in texts]
        return bits(
            [m is not None and m[1] == end.continuation.strip() for m, end in zip(words, self.ends, strict=True)]
        )


def share_right(row: str) -> float:
    """Return the accuracy of a task from its bits."""
    return row.count("1") / len(row)

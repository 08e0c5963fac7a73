"""The multiple-choice tasks that the benchmarks share: seeded subsets, and how each is asked.

Likelihoods a character (normalised) are taken where that is usual, for choices of very different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import TypeVar

from streamline_hooks.evaluation.questions import Question, questions_from, read_questions
from streamline_hooks.evaluation.rows import read_rows

T = TypeVar("T")
ASKED = "Question: {}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """How a file of questions is asked and counted.

    Attributes
    ----------
    file : str
        Below ``bench/``.
    normalised : bool
        Count by likelihood a character.
    asked : str
        What a query stands in.
    items : int
        Questions, unless another number is asked for; of BLiMP, of each paradigm, in any case.
    """

    file: str
    normalised: bool = False
    asked: str = "{}"
    items: int = 200


TASKS = {
    "arc_easy": Task("arc_easy.jsonl", asked=ASKED),
    "boolq": Task("boolq.jsonl", asked="{}\nAnswer:", items=50),  # long: 140 tokens a question
    "commonsense_qa": Task("commonsense_qa.jsonl", normalised=True, asked=ASKED),
    "copa": Task("copa.jsonl"),
    "hellaswag": Task("hellaswag_val.jsonl.gz", normalised=True, items=150),
    "piqa": Task("piqa.jsonl", asked=ASKED),
    "winograd_wsc": Task("winograd_wsc.jsonl"),
    "blimp": Task("blimp.zip", items=20),
}


def questions_of(name: str, bench: Path, items: int | None, seed: int) -> list[Question]:
    """A seeded subset of a task.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    bench : Path
        The folder of the files.
    items : int, optional
        How many, where there are as many; by default the task's own number, which BLiMP keeps in any case.
    seed : int
    """
    task = TASKS[name]
    if task.file.endswith(".zip"):
        return blimp(bench / task.file, task.items, seed)
    chosen = sample(read_questions(bench / task.file), items or task.items, f"{seed} {name}")
    return [replace(q, contexts=tuple(task.asked.format(context) for context in q.contexts)) for q in chosen]


def blimp(path: Path, items: int, seed: int) -> list[Question]:
    """Minimal pairs, the same number of each paradigm; the better sentence comes first in half of them."""
    found = []
    for name, rows in groupby(read_rows(path), key=attrgetter("file")):
        found += questions_from(sample(list(rows), items, f"{seed} {name}"), "minimal_pairs")
    return found


def sample(given: Sequence[T], items: int, seed: str) -> list[T]:
    """A seeded subset in the order of the whole; of the same file, a smaller one is not a part of a larger."""
    chosen = Random(seed).sample(range(len(given)), min(items, len(given)))
    return [given[k] for k in sorted(chosen)]

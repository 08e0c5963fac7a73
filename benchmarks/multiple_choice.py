"""The multiple-choice tasks that the benchmarks share: seeded subsets as tasks of lm-eval.

Log-likelihoods a character (``acc_norm``) are compared where that is usual, for choices of very different
lengths.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from streamline_hooks.evaluation import config_of_rows
from streamline_hooks.evaluation.rows import parse_rows, read_rows

T = TypeVar("T")
ASKED = "Question: {{query}}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """How a file of questions is asked and counted.

    Attributes
    ----------
    file : str
        Below ``bench/``.
    metric : str
    asked : str
        The prompt, as lm-eval's ``doc_to_text``; empty for that of the file's layout.
    items : int
        Questions, unless another number is asked for; of BLiMP, of each paradigm, in any case.
    """

    file: str
    metric: str = "acc"
    asked: str = ""
    items: int = 200


TASKS = {
    "arc_easy": Task("arc_easy.jsonl", asked=ASKED),
    "boolq": Task("boolq.jsonl", asked="{{query}}\nAnswer:", items=50),  # long: 140 tokens a question
    "commonsense_qa": Task("commonsense_qa.jsonl", "acc_norm", asked=ASKED),
    "copa": Task("copa.jsonl"),
    "hellaswag": Task("hellaswag_val.jsonl.gz", "acc_norm", items=150),
    "piqa": Task("piqa.jsonl", asked=ASKED),
    "winograd_wsc": Task("winograd_wsc.jsonl"),
    "blimp": Task("blimp.zip", items=20),
}


def task_of(name: str, bench: Path, items: int | None, seed: int) -> dict[str, Any]:
    """Return a seeded subset of a task, as a config of lm-eval.

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
        return config_of_rows(blimp(bench / task.file, task.items, seed), name)
    rows = sample(read_rows(bench / task.file), items or task.items, f"{seed} {name}")
    return config_of_rows(rows, name, **({"doc_to_text": task.asked} if task.asked else {}))


def blimp(path: Path, items: int, seed: int) -> list[dict[str, Any]]:
    """Return minimal pairs, the same number of each paradigm."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jsonl") and not any(part.startswith((".", "__")) for part in name.split("/")):
                found += sample(parse_rows(archive.read(name).decode(), name), items, f"{seed} {name}")
    return found


def sample(given: Sequence[T], items: int, seed: str) -> list[T]:
    """A seeded subset in the order of the whole; of the same file, a smaller one is not a part of a larger."""
    chosen = Random(seed).sample(range(len(given)), min(items, len(given)))
    return [given[k] for k in sorted(chosen)]

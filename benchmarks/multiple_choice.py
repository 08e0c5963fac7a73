"""The multiple-choice tasks of the benchmarks: seeded subsets as tasks of lm-eval.

Tasks with choices of very different lengths use the log-likelihood per character (``acc_norm``), as is usual.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from streamline_hooks.evaluation import parse_rows, read_rows, task_config_from_rows

T = TypeVar("T")
PROMPT = "Question: {{query}}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """Settings of a task.

    Attributes
    ----------
    file : str
        Name in the folder ``bench``.
    metric : str
    prompt : str
        The prompt as ``doc_to_text`` of lm-eval; empty for the default of the file's layout.
    items : int
        Default number of questions; for BLiMP the fixed number per paradigm.
    """

    file: str
    metric: str = "acc"
    prompt: str = ""
    items: int = 200


TASKS = {
    "arc_easy": Task("arc_easy.jsonl", prompt=PROMPT),
    "boolq": Task("boolq.jsonl", prompt="{{query}}\nAnswer:", items=50),  # long: 140 tokens per question
    "commonsense_qa": Task("commonsense_qa.jsonl", "acc_norm", prompt=PROMPT),
    "copa": Task("copa.jsonl"),
    "hellaswag": Task("hellaswag_val.jsonl.gz", "acc_norm", items=150),
    "piqa": Task("piqa.jsonl", prompt=PROMPT),
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
        Folder of the files.
    items : int, optional
        Number of questions, at most all; by default that of the task. BLiMP ignores it.
    seed : int
    """
    task = TASKS[name]
    if task.file.endswith(".zip"):
        return task_config_from_rows(blimp(bench / task.file, task.items, seed), name)
    rows = sample(read_rows(bench / task.file), items or task.items, f"{seed} {name}")
    return task_config_from_rows(rows, name, **({"doc_to_text": task.prompt} if task.prompt else {}))


def blimp(path: Path, items: int, seed: int) -> list[dict[str, Any]]:
    """Return minimal pairs, the same number per paradigm."""
    pairs = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jsonl") and not any(part.startswith((".", "__")) for part in name.split("/")):
                pairs += sample(parse_rows(archive.read(name).decode(), name), items, f"{seed} {name}")
    return pairs


def sample(rows: Sequence[T], items: int, seed: str) -> list[T]:
    """Return a seeded subset in the original order; smaller subsets are not parts of larger ones."""
    chosen = Random(seed).sample(range(len(rows)), min(items, len(rows)))
    return [rows[k] for k in sorted(chosen)]

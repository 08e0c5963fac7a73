"""Tasks for lm-eval whose data lies beside them, so that no network is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = {
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
}


def write_task(
    folder: Path, name: str, documents: Sequence[Mapping[str, Any]], kind: str, /, **settings: object
) -> Path:
    """Write a task file and its data; returns the folder to be given to lm-eval."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": kind,
        "test_split": "test",
        "metric_list": [{"metric": metric} for metric in METRICS.get(kind, ())],
        "metadata": {"version": 2.5},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def write_texts(folder: Path, name: str, texts: Sequence[str]) -> Path:
    """A task that gives the likelihood of whole documents."""
    rows = [{"text": text} for text in texts]
    return write_task(folder, name, rows, "loglikelihood_rolling", doc_to_text="", doc_to_target="text")


def write_questions(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], /, **settings: object) -> Path:
    """A task of rows with ``query``, ``choices`` and ``gold``."""
    given = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold", **settings}
    return write_task(folder, name, rows, "multiple_choice", **given)

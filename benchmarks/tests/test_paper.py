"""The replication of the paper: each preset on the same text and tasks, measured once, beside the published scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import paper
from streamline_hooks import CompressionConfig


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[nn.Module, CompressionConfig]]:
    """The compressions of a run; a compressed model answers half as many questions."""
    made: list[tuple[nn.Module, CompressionConfig]] = []
    original = nn.Linear(2, 2)

    def compress(model: nn.Module, text: Any, config: CompressionConfig, **options: Any) -> None:
        made.append((model, config))
        with torch.no_grad():
            model.weight.zero_()  # type: ignore[union-attr, operator]

    def run_tasks(model: nn.Module, tokenizer: Any, tasks: Any, settings: Any) -> dict[str, Any]:
        right = 1.0 if torch.equal(model.weight, original.weight) else 0.5  # type: ignore[arg-type]
        return {task: SimpleNamespace(scores=[right, 0.0]) for task in tasks}

    for name, value in {
        "RESULTS": tmp_path,
        "load_pretrained": lambda *args, **options: (original, None),
        "read_documents": lambda paths: ["text"],
        "split_documents": lambda *args, **options: options,
        "compress": compress,
        "run_tasks": run_tasks,
    }.items():
        monkeypatch.setattr(paper, name, value)
    return made


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["paper", "models/small", "--text", "t", "--tasks", "boolq,piqa", *arguments])
    paper.main()
    rows: dict[str, Any] = json.loads((paper.RESULTS / "paper_small.json").read_text())["rows"]
    return rows


def test_each_preset_is_measured_once_on_a_copy(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(monkeypatch, "--tokens", "4096", "--accumulate", "2")
    assert list(rows.values()) == [{"boolq": 0.5, "piqa": 0.5}] + [{"boolq": 0.25, "piqa": 0.25}] * 3
    assert run(monkeypatch, "--tokens", "4096") == rows and len(calls) == 3
    ffn, layer, none = (config for _, config in calls)
    assert ffn.distillation.gradient_accumulation_steps == layer.distillation.gradient_accumulation_steps == 2
    assert ffn.data.fitting_tokens == 4096 and none.distillation is None
    assert all(config.target.fraction == 0.25 for _, config in calls)
    with pytest.raises(SystemExit):  # other questions in the same file
        run(monkeypatch, "--tokens", "4096", "--items", "50")


@pytest.mark.usefixtures("calls")
def test_the_table_compares_with_the_published_scores_of_the_same_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--presets", "none")
    text = (paper.RESULTS / "paper_small.md").read_text()
    assert "| models/small | boolq | piqa | mean | retained |" in text
    assert "| none, 25% removed, 61,440,000 tokens in sequences of 2,048 | 25.0% | 25.0% | 25.0% | 50.0% |" in text
    assert "| Llama-2-4.7B, by LLM-Streamline | 74.7% | 74.7% | 96.1% |" in text

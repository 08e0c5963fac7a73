"""The benchmark of draft models: every draft of an equal model is accepted, and few of another one are."""

from __future__ import annotations

import pytest
import torch

from benchmarks.draft_model import measure, table
from streamline_hooks.testing import tiny_model


def test_accepted_drafts_and_tokens_per_pass() -> None:
    model, equal, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    equal.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape))
    prompts = [torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length)) for length in (4, 7)]
    rows = measure(model, {0: equal, 1: other}, prompts, [2, 4], 15)
    assert [(row["removed"], row["drafts"]) for row in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert [row["accepted"] for row in rows[:2]] == [1.0, 1.0]
    assert [row["tokens_per_pass"] for row in rows[:2]] == pytest.approx([3.0, 5.0])
    assert all(row["accepted"] < 0.5 and row["time"] > 0 for row in rows[2:])
    assert "| 0 | 2 | 100% | 3.00 |" in table(rows, "command")

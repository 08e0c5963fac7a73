"""The benchmark of large logits: each way computes them as it says, and both choose the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import head_memory
from streamline_hooks.surgery import token_outputs

SMALL = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "query_pre_attn_scalar": 8}


def test_both_ways_remove_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_memory, "SHAPE", head_memory.SHAPE | SMALL)
    monkeypatch.setattr(head_memory, "SEQUENCE", 32)
    few = SimpleNamespace(validation_tokens=128, test_tokens=128)
    monkeypatch.setattr(head_memory, "DataConfig", lambda: few)
    limit = "streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES"
    monkeypatch.setattr(limit, 2**16)  # less than the logits of a batch
    by_token: list[Any] = []

    def spy(*arguments: Any) -> Iterator[Any]:
        by_token.append(arguments)
        return token_outputs.outputs_by_token(*arguments)

    monkeypatch.setattr("streamline_hooks.surgery.model_source.outputs_by_token", spy)
    rows, calls = {}, {}
    for way in ("tokens", "whole"):  # the second sets the limit for its process
        by_token.clear()
        rows[way] = head_memory.measure(way, 512, 5)
        calls[way] = len(by_token)
    assert calls["tokens"] > 0 == calls["whole"]
    assert rows["tokens"]["removed"] == rows["whole"]["removed"] and len(rows["whole"]["removed"]) == 5
    assert rows["tokens"]["distance"] == pytest.approx(rows["whole"]["distance"], rel=1e-3)
    assert rows["whole"]["peak"] > 0 and rows["whole"]["seconds"] > 0
    lines = head_memory.table(rows, "the command").splitlines()
    assert lines[2].startswith("| of a few tokens | ") and lines[-1] == "Made by `the command`."

"""The verdicts of docs/engines.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines import engine_matrix
from tests.engines.engine_matrix import equal_tokens, is_worse, page, verdict, write_contexts

RIGHT, LATE = [[1, 2, 3, 4]], [[1, 9, 3, 4]]
"""Tokens that are generated from one prompt; those after the first difference do not count."""


def one_by_one(*tokens: int) -> list[list[int]]:
    """Return tokens that are predicted after each part of a text."""
    return [[token] for token in tokens]


@pytest.fixture(autouse=True)
def one_token_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_matrix, "STEP", 1)


ALL, MOST, HALF, FEW = one_by_one(1, 2, 3, 4), one_by_one(1, 9, 3, 4), one_by_one(1, 9, 9, 4), one_by_one(9, 9, 9, 4)


def cells(**tokens: Any) -> dict[str, Any]:
    """Return cells of SmolLM2: the original and a folded one, in float32 and int8."""
    names = {"transformers": "SmolLM2, folded | transformers", "mlx": "SmolLM2, folded | mlx"}
    names |= {"int8": "SmolLM2, folded, int8 | mlx", "original": "SmolLM2, original, int8 | mlx"}
    found = {names[key]: {"tokens": value, "engine": "x 1"} for key, value in tokens.items()}
    return {"SmolLM2, original | transformers": {"tokens": RIGHT, "engine": "x 1"}, **found}


@pytest.mark.parametrize(
    ("tokens", "name", "expected"),
    [
        ({"transformers": RIGHT, "mlx": RIGHT}, "SmolLM2, folded", "yes"),
        ({"transformers": RIGHT, "mlx": LATE}, "SmolLM2, folded", "no (25% of the tokens)"),
        ({"transformers": RIGHT, "int8": FEW, "original": FEW}, "SmolLM2, folded, int8", "no (25%; original 25%)"),
        ({"transformers": RIGHT, "int8": HALF, "original": ALL}, "SmolLM2, folded, int8", "yes (50%; original 100%)"),
        ({"transformers": RIGHT, "int8": FEW, "original": ALL}, "SmolLM2, folded, int8", "no (25%; original 100%)"),
        ({"transformers": RIGHT, "int8": MOST}, "SmolLM2, folded, int8", "no (75% of the tokens)"),
        ({"transformers": RIGHT, "int8": ALL, "original": MOST}, "SmolLM2, folded, int8", "yes"),
        ({"transformers": RIGHT, "int8": MOST, "original": HALF}, "SmolLM2, folded, int8", "yes (75%; original 50%)"),
        ({"original": MOST}, "SmolLM2, original, int8", "yes (75%)"),
        ({"original": FEW}, "SmolLM2, original, int8", "no (25%)"),
        ({"mlx": RIGHT}, "SmolLM2, folded", "not run"),
        ({"transformers": RIGHT}, "SmolLM2, folded", "not run"),
    ],
)
def test_the_verdict_of_a_cell(tokens: dict[str, Any], name: str, expected: str) -> None:
    assert verdict(cells(**tokens), name, "mlx") == expected


@pytest.mark.parametrize(("right", "expected"), [(240, False), (230, False), (220, True)])
def test_fewer_equal_tokens_are_worse_beyond_two_standard_errors(right: int, expected: bool) -> None:
    of = [True] * 240 + [False] * 16
    assert is_worse([True] * right + [False] * (256 - right), of) == expected


def test_contexts_are_the_parts_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"prompts": [[7], [8, 9]], "never": [0], "new_tokens": 3, "quantized": True}
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    written = json.loads(write_contexts(tmp_path, {"tokens": [[1, 2, 3], [4, 5, 6]]}, "x").read_text())
    assert written["prompts"] == [[7], [7, 1], [7, 1, 2], [8, 9], [8, 9, 4], [8, 9, 4, 5]]
    with monkeypatch.context() as patch:
        patch.setattr(engine_matrix, "STEP", 2)
        fewer = json.loads(write_contexts(tmp_path, {"tokens": [[1, 2, 3], [4, 5, 6]]}, "x").read_text())["prompts"]
        assert fewer == [[7], [7, 1, 2], [8, 9], [8, 9, 4, 5]]
        cell = {"tokens": one_by_one(1, 9, 4, 6)}
        assert equal_tokens(cell, {"tokens": [[1, 2, 3], [4, 5, 6]]}) == [True, False, True, True]
    with pytest.raises(SystemExit, match="SmolLM2, int8 is compared with .* Run that row first"):
        write_contexts(tmp_path, None, "SmolLM2, int8")
    assert written["new_tokens"] == 1 and written["quantized"] and written["never"] == [0]


def test_the_page_gives_the_reason_of_a_failure() -> None:
    found = cells(transformers=RIGHT) | {"SmolLM2, folded | mlx": {"error": "ValueError: not supported"}}
    text = page(found)
    assert "| SmolLM2, folded | yes | not run | not run | no | not run |" in text
    assert "- MLX, SmolLM2, folded: `ValueError: not supported`" in text

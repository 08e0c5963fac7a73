"""The verdicts of docs/engines.md."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.engine_matrix import page, verdict

RIGHT, LATE, EARLY = [[1, 2, 3, 4]], [[1, 2, 3, 9]], [[1, 9, 3, 4]]


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
        ({"transformers": RIGHT, "mlx": LATE}, "SmolLM2, folded", "no (75% of the tokens)"),
        ({"transformers": RIGHT, "int8": EARLY, "original": EARLY}, "SmolLM2, folded, int8", "no (25%; original 25%)"),
        ({"transformers": RIGHT, "int8": EARLY, "original": LATE}, "SmolLM2, folded, int8", "no (25%; original 75%)"),
        ({"transformers": RIGHT, "int8": EARLY}, "SmolLM2, folded, int8", "no (25% of the tokens)"),
        ({"transformers": RIGHT, "int8": LATE, "original": LATE}, "SmolLM2, folded, int8", "yes (75%; original 75%)"),
        ({"original": LATE}, "SmolLM2, original, int8", "yes (75%)"),
        ({"original": EARLY}, "SmolLM2, original, int8", "no (25%)"),
        ({"mlx": RIGHT}, "SmolLM2, folded", "not run"),
        ({"transformers": RIGHT}, "SmolLM2, folded", "not run"),
    ],
)
def test_the_verdict_of_a_cell(tokens: dict[str, Any], name: str, expected: str) -> None:
    assert verdict(cells(**tokens), name, "mlx") == expected


def test_the_page_gives_the_reason_of_a_failure() -> None:
    found = cells(transformers=RIGHT) | {"SmolLM2, folded | mlx": {"error": "ValueError: not supported"}}
    text = page(found)
    assert "| SmolLM2, folded | yes | not run | not run | no | not run |" in text
    assert "- MLX, SmolLM2, folded: `ValueError: not supported`" in text

"""The demo keeps most of what the original can do; its config is what `make demo` uses."""

from __future__ import annotations

import copy
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import CompressionConfig, compress
from streamline_hooks.data import read_documents
from streamline_hooks.evaluation import TextGenerationConfig, solve_problems, synthetic_problems
from streamline_hooks.modeling import find_stack

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "demo.yaml"
PROBLEMS = [*chain(*synthetic_problems(8, shots=3).values())]  # those of `CompressionResult.warnings`
MIN_SHARE_KEPT = 0.7


def share_kept(before: tuple[bool, ...], after: tuple[bool, ...]) -> float:
    """Return the share of the problems solved before that are solved after."""
    return sum(a and b for a, b in zip(before, after, strict=True)) / sum(before)


def test_a_share_counts_the_same_problems() -> None:
    assert share_kept((True, True, False, False), (True, False, True, True)) == 0.5


def test_make_demo_uses_the_config() -> None:
    (recipe,) = re.findall(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert "compress smollm2 --config examples/demo.yaml" in recipe
    lines = recipe.splitlines()
    assert "generate $(DEMO_MODEL)" in recipe and "--against smollm2" in recipe
    assert "Next:" in lines[-2] and lines[-1].endswith('/$(DEMO_MODEL)/report.html"')


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_keeps_most_of_what_is_solved(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    config = CompressionConfig.load(CONFIG)
    result = compress(model, read_documents("pydoc"), config, tokenizer=tokenizer, output=tmp_path / "small")
    assert not result.warnings
    assert len(find_stack(smollm2[0])) - len(find_stack(model)) == config.target.blocks >= 2
    before, after = (
        solve_problems(one, tokenizer, PROBLEMS, TextGenerationConfig(new_tokens=24, stop=("\n",))).correct
        for one in (smollm2[0], model)
    )
    assert sum(before) >= 12
    assert share_kept(before, after) >= MIN_SHARE_KEPT

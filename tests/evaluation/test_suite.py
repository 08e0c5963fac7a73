"""What is refused as soon as it is put together, and not after hours."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import Problem, ProblemTask, Suite


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 16, "stride": 32}, r"window=16, stride=32.*no more than the window"),
        ({"stride": 0}, r"stride=0.*1 or more"),
        ({"first": "BOS"}, r"first='BOS'.*expected.*bos.*eos"),
        ({"timed": (0, 16, 5)}, r"timed=\(0, 16, 5\).*expected tokens"),
        ({"timed": (16, -1, 5)}, r"timed=\(16, -1, 5\)"),
        ({"timed": (16, 16, 0)}, r"timed=\(16, 16, 0\)"),
        ({"timed": (16, 16)}, r"timed=\(16, 16\)"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"prompts": "once"}, r"prompts='once'.*list of strings"),
        ({"text": {"tales": "once"}}, r"'tales'.*str"),
    ],
)
def test_what_no_suite_can_hold(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(StreamlineError, match=says):
        Suite(None, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 3}, "3 samples at temperature 0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"temperature": -1.0}, "-1"),
    ],
)
def test_what_no_problem_task_can_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(StreamlineError, match=says):
        ProblemTask((Problem("One", "two"),), **settings)

"""The check of the package's structure finds each violation, and none in the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.package_structure import LEVELS, violations


def test_the_package_has_the_structure_that_is_described() -> None:
    assert violations() == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package with an empty interface per sub-package, but for `find_stack` of modeling."""
    for name in LEVELS:
        (tmp_path / "streamline_hooks" / name).mkdir(parents=True)
        exported = ["find_stack"] if name == "modeling" else []
        (tmp_path / "streamline_hooks" / name / "__init__.py").write_text(f"__all__ = {exported}\n")
    (tmp_path / "tests" / "surgery").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("streamline_hooks/surgery/a.py", "from streamline_hooks.modeling import find_stack"),
        ("streamline_hooks/surgery/a.py", "from streamline_hooks.surgery.b import inner"),
        ("tests/surgery/test_a.py", "from streamline_hooks.surgery.b import inner"),
        ("tests/surgery/test_a.py", "from streamline_hooks.testing.models import inner"),
        ("tests/state_machine/faults.py", "from streamline_hooks.surgery import b"),
    ],
)
def test_what_is_allowed_is_not_reported(file: str, code: str, root: Path) -> None:
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(code)
    assert violations(root) == []


@pytest.mark.parametrize(
    ("file", "code", "reported"),
    [
        ("streamline_hooks/loose.py", "", "loose.py: expected a sub-package"),
        ("streamline_hooks/core/a.py", "from streamline_hooks.modeling import find_stack", "is above core"),
        (
            "streamline_hooks/core/a.py",
            "def f():\n    import streamline_hooks.cli.main",
            "core/a.py:2: .*above core",
        ),
        ("streamline_hooks/core/a.py", "from streamline_hooks import load", "above core"),
        ("streamline_hooks/surgery/a.py", "from streamline_hooks.modeling.block_stack import find_stack", "interface"),
        ("streamline_hooks/surgery/a.py", "from streamline_hooks.modeling import block_stack", "interface of modeling"),
        ("tests/surgery/test_a.py", "from streamline_hooks.modeling import inner", "inner is not in the interface"),
    ],
)
def test_a_violation_is_reported_with_its_line(file: str, code: str, reported: str, root: Path) -> None:
    (root / file).write_text(code)
    (line,) = violations(root)
    assert re.search(reported, line), line

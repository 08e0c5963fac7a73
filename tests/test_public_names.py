"""Tests use public names only, so that private code can move without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("streamline_hooks", "benchmarks")
FOREIGN = {"_modules", "_parameters", "_buffers", "_name_or_path"}
"""Private names of PyTorch and Transformers that this library's code also sets."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private functions, classes, attributes and variables that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
        else:
            continue
        if is_private(name):
            yield name


def uses(tree: ast.AST, private: set[str]) -> Iterator[str]:
    """Yield each use of a private name: an import, an attribute, or the name in a string, as patches take it."""
    own = set(private_names(tree))
    in_f_strings = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            names = [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in private - own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in in_f_strings:
            last = node.value.rsplit(".", 1)[-1]
            names = [last] if last in private else []
            if "import " in node.value and "\n" in node.value:  # a script for another process
                names += [name for name in re.findall(r"[\w)\]]\.(_[a-z]\w*)", node.value) if name in private]
        else:
            continue
        for name in names:
            yield f"line {node.lineno}: {name}"


@pytest.fixture(scope="module")
def private() -> set[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {name for path in files for name in private_names(ast.parse(path.read_text()))} - FOREIGN


def test_no_test_uses_a_private_name(private: set[str]) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(uses(ast.parse(path.read_text()), private))
        for folder in ("tests", "benchmarks/tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from streamline_hooks.modeling.block_stack import _private",
        "from streamline_hooks import stack\nstack._private",
        "patch.setattr(stack, '_private', None)",
        "patch.setattr('streamline_hooks.modeling.block_stack._private', None)",
        "script = 'import streamline_hooks\\nstreamline_hooks.stack._private()'",
    ],
)
def test_each_way_of_using_one_is_found(code: str) -> None:
    assert list(uses(ast.parse(code), {"_private"}))

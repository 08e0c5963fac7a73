"""Check the package's structure: python -m tests.package_structure (`make lint`).

1. The package consists of the sub-packages of `LEVELS`; only ``__init__``, ``__main__`` and ``py.typed`` stand beside
   them.
2. A module imports from its own sub-package and from those listed before it, inside functions too.
3. From another sub-package it imports names that the sub-package's ``__init__`` lists in ``__all__``.
4. A test imports modules inside a sub-package only if it is in the folder of that sub-package, or from ``testing``.
   Those that plant faults (`PLANTING`) reach into all.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "streamline_hooks"
ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    "core",
    "modeling",
    "recording",
    "replacements",
    "surgery",
    "statistics",
    "data",
    "evaluation",
    "repair",
    "selection",
    "distillation",
    "checkpoint",
    "pipeline",
    "training",
    "testing",
    "cli",
)
"""From bottom to top."""
PLANTING = ("tests/state_machine", "tests/testing/planting.py", "tests/testing/planted_faults.py")


def imports(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the module and the name of each import of this package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and f"{node.module}.".startswith(f"{PACKAGE}."):
            yield from ((node.lineno, str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names if alias.name.startswith(f"{PACKAGE}."))


def interface(root: Path, name: str) -> set[str]:
    """Return the names in ``__all__`` of a sub-package."""
    file = root / PACKAGE / name / "__init__.py"
    stub = file.with_suffix(".pyi")  # of a sub-package whose names are imported when they are first used
    for node in ast.parse((stub if stub.exists() else file).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def violations(root: Path = ROOT) -> list[str]:
    """Return one line for each violation of the rules above."""
    package = root / PACKAGE
    found = [
        f"{path.name}: expected a sub-package of {', '.join(LEVELS)}"
        for path in sorted(package.iterdir())
        if path.name not in {"__init__.py", "__init__.pyi", "__main__.py", "py.typed", "__pycache__", *LEVELS}
    ]
    interfaces = {name: interface(root, name) for name in LEVELS}
    for path in sorted([*package.rglob("*.py"), *(root / "tests").rglob("*.py")]):
        folder, *inner = path.relative_to(root).parts
        own = inner[0] if len(inner) > 1 else ""
        if folder == PACKAGE and own not in LEVELS:
            continue
        plants = path.relative_to(root).as_posix().startswith(PLANTING)
        for line, module, name in imports(path.read_text()):
            where = f"{path.relative_to(root)}:{line}: {module}"
            _, other, *deeper = [*module.split("."), ""]
            if other == own or (not other and folder != PACKAGE):
                continue
            if folder == PACKAGE and (not other or LEVELS.index(other) > LEVELS.index(own)):
                found.append(f"{where} is above {own}")
            elif (any(deeper) or name not in interfaces[other]) and not (plants or other == "testing"):
                found.append(f"{where}.{name} is not in the interface of {other}")
    return found


if __name__ == "__main__":
    lines = violations()
    print("\n".join(lines) or "the structure is as described")
    sys.exit(bool(lines))

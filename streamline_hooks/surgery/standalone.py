"""The code that a checkpoint with splices is read by where this library is not installed.

It is this library's own: the sources of the modules that build splices and run them, one after the other in one file.
Transformers runs it only where somebody asks for that (``trust_remote_code=True``).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version

from streamline_hooks.errors import StreamlineError

MODULES = (
    "errors",
    "hidden_state",
    "surgery.splice",
    "replacements.registry",
    "replacements.linear",
    "replacements.mlp",
    "surgery.spliced_model",
)
"""Each after what it needs; of other modules of this library none needs anything."""


def standalone_code() -> str:
    """One Python file that needs torch and transformers, and can do what `MODULES` can.

    Raises
    ------
    StreamlineError
        If two of the modules define the same name, or one needs a module that is not among them.

    Examples
    --------
    >>> names = {node.name for node in ast.parse(standalone_code()).body if isinstance(node, ast.ClassDef)}
    >>> {"SwiGLUReplacement", "StreamlinedConfig"} <= names
    True
    """
    imports: dict[str, None] = {}
    bodies: list[str] = []
    defined: dict[str, str] = {}
    for module in MODULES:
        source = inspect.getsource(import_module(f"streamline_hooks.{module}"))
        lines = source.splitlines()
        statements = ast.parse(source).body[1:]  # without the docstring
        kept = [node for node in statements if not isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in statements:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.update(dict.fromkeys(foreign_names(node, module)))
            for name in names_of(node):
                if defined.setdefault(name, module) != module:
                    raise StreamlineError(f"{name} is defined in {defined[name]} and in {module}; rename one of them.")
        first = kept[0]
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
        bodies.append("\n".join(lines[start - 1 :]))
    head = (
        f'"""Reads the model in this folder, and runs it, where streamline_hooks is not installed.\n\n'
        f"Put together from the source of streamline_hooks {version('streamline_hooks')}, to be loaded with\n"
        f'``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.\n"""\n\n'
        "from __future__ import annotations\n"
    )
    return "\n".join([head, *imports, "", "", "\n\n\n".join(bodies), ""])


def foreign_names(node: ast.Import | ast.ImportFrom, module: str) -> Iterator[str]:
    """What a statement imports from elsewhere, as a statement; nothing where it imports from the modules here."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "streamline_hooks":
        here = {f"streamline_hooks.{name}" for name in MODULES[: MODULES.index(module)]}
        if node.module not in here:
            raise StreamlineError(
                f"{module} needs {node.module}, which is not a part of the standalone code before it."
            )
        return
    yield ast.unparse(node)


def names_of(node: ast.stmt) -> Iterator[str]:
    """What a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))

"""Assemble the code that loads a checkpoint with splices where this library is not installed.

The code consists of the sources of the modules that build splices and run them, concatenated into one file.
Transformers runs it only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.metadata import version

from streamline_hooks.core import StreamlineError
from streamline_hooks.replacements import REGISTERED

BEFORE_REPLACEMENTS = ("core.errors", "modeling.hidden_state", "surgery.splice", "replacements.registry")
AFTER_REPLACEMENTS = ("surgery.spliced_model",)


def standalone_modules() -> tuple[str, ...]:
    """Return the modules in the order of their dependencies; between them no other module of this library is imported.

    Every module of `streamline_hooks.replacements` that registers a class is one of them, in the order of registration.
    """
    package = "streamline_hooks.replacements."
    modules = dict.fromkeys(cls.__module__ for cls in REGISTERED.values() if cls.__module__.startswith(package))
    names = (module.removeprefix("streamline_hooks.") for module in modules)
    replacements = tuple(name for name in names if name not in BEFORE_REPLACEMENTS)
    return (*BEFORE_REPLACEMENTS, *replacements, *AFTER_REPLACEMENTS)


def standalone_code() -> str:
    """Return the source of one Python file that requires only torch and Transformers: `standalone_modules` in order.

    Raise `StreamlineError` if two modules define the same name, or a module imports from another that is not included.
    """
    imports: dict[str, None] = {}
    bodies: list[str] = []
    defined: dict[str, str] = {}
    for module in standalone_modules():
        source = inspect.getsource(import_module(f"streamline_hooks.{module}"))
        lines = source.splitlines()
        statements = ast.parse(source).body[1:]  # without the docstring
        kept = [node for node in statements if not isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in statements:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.update(dict.fromkeys(foreign_imports(node, module, defined)))
            for name in defined_names(node):
                if defined.setdefault(name, module) != module:
                    raise StreamlineError(
                        f"{name} is defined in {defined[name]} and in {module}, but all names of the "
                        "assembled file must be unique. Rename one of them."
                    )
        first = kept[0]
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
        bodies.append("\n".join(lines[start - 1 :]))
    head = (
        f'"""Load and run the model in this folder where streamline_hooks is not installed.\n\n'
        f"Assembled from the source of streamline_hooks {version('streamline_hooks')}. Load the model with\n"
        f'``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.\n"""\n\n'
        "from __future__ import annotations\n"
    )
    return "\n".join([head, *imports, "", "", "\n\n\n".join(bodies), ""])


def foreign_imports(node: ast.Import | ast.ImportFrom, module: str, defined: Collection[str]) -> Iterator[str]:
    """Yield the statement if it imports from another package. Names of this package must be `defined` already."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "streamline_hooks":
        missing = [alias.name for alias in node.names if alias.name not in defined or alias.asname]
        if missing:
            raise StreamlineError(
                f"{module} needs {missing[0]} of {node.module}, which no earlier module of the assembled file "
                "defines. Import only torch, Transformers and these names, or add that module to BEFORE_REPLACEMENTS."
            )
        return
    yield ast.unparse(node)


def defined_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))

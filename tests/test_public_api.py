"""The public names and signatures are those of tests/public_api.txt, so that a change of them shows up as a diff."""

from __future__ import annotations

import configparser
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamline_hooks
from streamline_hooks.core import Config
from tests.processes import in_a_new_process
from tests.public_api import FILE, describe, describe_object


def test_the_names_and_signatures_are_the_pinned_ones() -> None:
    changes = [*difflib.unified_diff(FILE.read_text().splitlines(), [*describe()], "pinned", "now", lineterm="", n=0)]
    assert not changes, "\n".join([*changes, "If this is meant: python -m tests.public_api > tests/public_api.txt"])


def test_a_changed_signature_is_seen() -> None:
    def function(model: object, *, blocks: int = 8) -> None: ...

    lines = ["function() -> None", "    model: object", "    *", "    blocks: int = 8"]
    assert [*describe_object("function", function)] == lines


def test_all_public_names_are_there() -> None:
    assert all(getattr(streamline_hooks, name) is not None for name in streamline_hooks.__all__)
    assert {*streamline_hooks.__all__} <= {*dir(streamline_hooks)}


def test_the_list_of_public_names_is_installed() -> None:
    """An editable installation has it in any case."""
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    assert "*.pyi" in settings["options.package_data"]["streamline_hooks"].split()


def test_the_version_needs_neither_torch_nor_transformers() -> None:
    code = """
        import sys, streamline_hooks
        from importlib.metadata import version
        assert streamline_hooks.__version__ == version("streamline_hooks")
        print({"torch", "transformers", "numpy"} & set(sys.modules))
    """
    assert in_a_new_process(code).stdout.strip() == "set()"


def test_a_name_that_is_unknown_raises() -> None:
    assert not hasattr(streamline_hooks, "compresss")


MORE_PARAMETERS = {
    "CompressionResult": "a result, which compress creates",
    "distillation.TrainingResult": "a result, which train creates",
    "evaluation.TaskResult": "a result, which run_tasks creates",
    "selection.SearchProblem": "the input of a search, which SearchConfig.problem creates",
    "modeling.BranchSites": "a result, which find_branch_sites returns",
    "surgery.StreamlinedConfig": "a config of Transformers",
    "training.Measurement": "a result, which HiddenStateMonitor.step returns",
}
"""Public functions and classes with more than eight parameters that are no configs, each with the reason."""


def count_parameters(exported: Any) -> int:
    """Return the number of parameters of a function or class; 0 for configs, errors and type aliases."""
    is_exempt = isinstance(exported, type) and issubclass(exported, (BaseException, Config))
    if is_exempt or not callable(exported):
        return 0
    try:
        return len(inspect.signature(exported).parameters)
    except (TypeError, ValueError):  # an alias such as Batch, or a class of Python's own
        return 0


def methods_of(name: str, exported: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public methods of a class of this library, with their names."""
    if isinstance(exported, type) and exported.__module__.startswith("streamline_hooks"):
        for member, value in vars(exported).items():
            function = getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", functools.partial(function, None)  # without self


def test_exported_names_take_at_most_eight_parameters() -> None:
    """Those of the package and of the interface of each sub-package, and their methods."""
    assert 20 <= len(streamline_hooks.__all__) <= 28
    exported = {name: getattr(streamline_hooks, name) for name in streamline_hooks.__all__}
    packages = [module.name for module in pkgutil.iter_modules(streamline_hooks.__path__) if module.ispkg]
    assert len(packages) == 16
    for package in packages:
        interface = importlib.import_module(f"streamline_hooks.{package}")
        exported |= {f"{package}.{name}": getattr(interface, name) for name in interface.__all__}
    for name, thing in list(exported.items()):
        exported |= dict(methods_of(name, thing))
    counts = {name: count_parameters(thing) for name, thing in exported.items()}
    assert sum(count > 0 for count in counts.values()) > 400
    more = {name for name, count in counts.items() if count > 8}
    exempt = MORE_PARAMETERS.keys()
    assert {name for name in more if name not in exempt and name.rpartition(".")[2] not in exempt} == set()
    assert exempt <= more, "an exemption that is not needed"


def test_a_ninth_parameter_is_counted() -> None:
    class Many:
        def method(self, a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int) -> None: ...

    Many.__module__ = "streamline_hooks.many"
    assert [(name, count_parameters(method)) for name, method in methods_of("Many", Many)] == [("Many.method", 9)]

"""The public names and signatures are those of tests/public_api.txt, so that a change of them shows up as a diff."""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import streamline_hooks
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
    "checkpoint.BlockwisePass",
    "recording.HiddenStateRecorder",
    "training.HiddenStateMonitor",
}
"""Names of the interfaces with more than eight parameters."""


def count_parameters(exported: Any) -> int:
    """Return the number of parameters of a function or class; 0 for configs, results, errors and type aliases."""
    is_error = isinstance(exported, type) and issubclass(exported, BaseException)
    if dataclasses.is_dataclass(exported) or is_error or not callable(exported):
        return 0
    try:
        return len(inspect.signature(exported).parameters)
    except (TypeError, ValueError):  # an alias such as Batch, or a class of Python's own
        return 0


def test_exported_names_take_at_most_eight_parameters() -> None:
    """Those of the package and of the interface of each sub-package."""
    assert 20 <= len(streamline_hooks.__all__) <= 28
    counts = {name: count_parameters(getattr(streamline_hooks, name)) for name in streamline_hooks.__all__}
    packages = [module.name for module in pkgutil.iter_modules(streamline_hooks.__path__) if module.ispkg]
    assert len(packages) == 16
    for package in packages:
        interface = importlib.import_module(f"streamline_hooks.{package}")
        counts |= {f"{package}.{name}": count_parameters(getattr(interface, name)) for name in interface.__all__}
    assert sum(count > 0 for count in counts.values()) > 200
    more = {name for name, count in counts.items() if count > 8}
    assert more - {name.rpartition(".")[2] for name in MORE_PARAMETERS} == MORE_PARAMETERS

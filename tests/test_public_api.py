"""The public names and signatures are those of tests/public_api.txt, so that a change of them shows up as a diff."""

from __future__ import annotations

import configparser
import difflib
from pathlib import Path

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

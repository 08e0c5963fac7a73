"""Registries, and the objects that installed packages add to them."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks.core import Registry, StreamlineError
from tests.installed_package import install_package

GROUP = "streamline_hooks.tests"


class Thing:
    def __init__(self, name: str) -> None:
        self.name = name


BUILT_IN = Thing("built-in")


def registry() -> Registry[Thing]:
    """A registry with one object of the library, to which packages can add things."""

    def register(name: str, entry: Any) -> None:
        if type(entry).__name__ != "Thing":
            raise StreamlineError(f"{entry!r} is no thing. Expected a Thing. Make one.")
        made.add(entry.name, entry)

    made: Registry[Thing] = Registry("thing", "register_thing", lambda one: one, group=GROUP, register=register)
    made.add("built-in", BUILT_IN)
    return made


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, code: str, **entries: str) -> None:
    points = {key.replace("_", "-"): f"{name.replace('-', '_')}:{value}" for key, value in entries.items()}
    monkeypatch.syspath_prepend(install_package(folder, name, code, {GROUP: points}))
    monkeypatch.delitem(sys.modules, name.replace("-", "_"), raising=False)


THING = "from tests.core.test_entry_points import Thing\n"


def test_without_a_package() -> None:
    things = registry()
    assert list(things) == ["built-in"] and len(things) == 1 and things.get("other") is None
    with pytest.raises(StreamlineError, match="thing 'biult-in' is unknown.*one of built-in.*Did you mean 'built-in'"):
        things["biult-in"]
    with pytest.raises(StreamlineError, match="thing 3 is unknown.*register_thing"):
        things[3]
    assert 3 not in things and repr(things) == "Registry('thing': built-in)"


def unknown(things: Registry[Thing]) -> None:
    with pytest.raises(StreamlineError, match="'other' is unknown.*built-in, added"):
        things["other"]


LISTINGS = {
    "a name": lambda things: things["added"],
    "in": lambda things: "added" in things,
    "get": lambda things: things.get("added"),
    "list": list,
    "len": len,
    "items": lambda things: list(things.items()),
    "unpacked": lambda things: {**things},
    "error": unknown,
}


@pytest.mark.parametrize("how", LISTINGS)
def test_a_package_is_imported_when_its_name_is_looked_up_or_all_are_listed(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "some-things", THING + "mine = Thing('added')", added="mine")
    things = registry()
    assert things["built-in"] is BUILT_IN and "built-in" in things and things.in_order(["built-in"]) == ["built-in"]
    assert "some_things" not in sys.modules
    LISTINGS[how](things)
    assert "some_things" in sys.modules
    assert list(things) == ["built-in", "added"] and things["added"].name == "added"
    assert things.describe("added") == "thing 'added' of the installed package some-things 1.0"
    assert things.describe("built-in") == "thing 'built-in'"
    assert things.in_order(["added", "built-in"]) == ["built-in", "added"]
    with pytest.raises(StreamlineError, match="'added' of the installed package some-things 1.0 is already registered"):
        things.add("added", Thing("added"))
    del things["added"]
    assert list(things) == ["built-in"] and things.describe("added") == "thing 'added'"


BROKEN = {
    "import": ("import there_is_no_such_module", "importing it raised ModuleNotFoundError: No module named 'there"),
    "attribute": ("", "importing it raised AttributeError"),
    "error": ("raise RuntimeError('out of order')", "importing it raised RuntimeError: out of order"),
    "exit": ("raise SystemExit(3)", "importing it raised SystemExit: 3"),
    "type": ("broken = 5", "5 is no thing. Expected a Thing"),
    "name": (THING + "broken = Thing('renamed')", "its name is 'renamed'. Expected.*'broken'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_left_out_with_a_warning(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, reason = BROKEN[case]
    install(monkeypatch, tmp_path / "a", "bad-things", code, broken="broken")
    install(monkeypatch, tmp_path / "b", "good-things", THING + "mine = Thing('good')", good="mine")
    things = registry()
    text = rf"thing 'broken' of the installed package bad-things 1.0 \(bad_things:broken\) is left out: {reason}"
    with pytest.warns(UserWarning, match=rf"{text}.*Update or uninstall bad-things") as caught:
        assert list(things) == ["built-in", "good"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(things) == ["built-in", "good"]  # said once


def test_warnings_that_are_errors_lose_no_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path / "a", "bad-things", "1 / 0", a_broken="broken")
    install(monkeypatch, tmp_path / "b", "good-things", THING + "mine = Thing('good')", good="mine")
    things = registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ZeroDivisionError"):
            list(things)
        assert list(things) == ["built-in", "good"]


def test_a_taken_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = THING + "mine, own = Thing('built-in'), Thing('same')"
    install(monkeypatch, tmp_path / "a", "a-things", code, built_in="mine", same="own")
    install(monkeypatch, tmp_path / "b", "b-things", code, same="own")
    things = registry()
    with pytest.warns(UserWarning) as caught:
        assert list(things) == ["built-in", "same"]
    first, second = (str(warning.message) for warning in caught)
    assert "'built-in' of the installed package a-things 1.0" in first
    assert "thing 'built-in' is already registered" in first
    assert "'same' of the installed package b-things 1.0" in second
    assert "thing 'same' of the installed package a-things 1.0 is already registered" in second
    assert things["built-in"] is BUILT_IN and things.describe("same").endswith("a-things 1.0")


def test_a_module_that_looks_up_names_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things = registry()
    monkeypatch.setattr("tests.installed_package.ASKED", [things])
    code = THING + "from tests.installed_package import ASKED\nassert list(ASKED[0]) and 'other' not in ASKED[0]\n"
    install(monkeypatch, tmp_path, "asking-things", code + "mine = Thing('added')", added="mine")
    assert list(things) == ["built-in", "added"]


def test_another_thread_waits_for_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = THING + "import time\ntime.sleep(0.3)\nmine = Thing('added')"
    install(monkeypatch, tmp_path, "slow-things", code, added="mine")
    things, seen = registry(), []
    first = threading.Thread(target=lambda: seen.append(list(things)))
    first.start()
    time.sleep(0.1)
    seen.append(list(things))
    first.join()
    assert seen == [["built-in", "added"]] * 2

"""The tables of options and the reference of the command line: complete, and refused without a text."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pytest

from streamline_hooks.cli import COMMANDS, make_app
from streamline_hooks.core import Config
from streamline_hooks.repair import REPLACEMENTS
from streamline_hooks.selection import SEARCHES

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("option_tables", DOCS / "option_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tables: ModuleType) -> dict[str, str]:
    return dict(tables.pages())


def test_a_table_has_a_row_for_each_field(tables: ModuleType, pages: dict[str, str]) -> None:
    for config in tables.TABLES:
        rows = [row for row in pages[config.__name__].splitlines()[2:] if row]
        assert [re.match(r"\| `(\w+)`", row)[1] for row in rows] == [field.name for field in fields(config)]  # type: ignore[index]
        assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_a_row_has_the_option_of_the_command_line_and_the_default(pages: dict[str, str]) -> None:
    assert "| `seed`<br>`--distillation-seed` | int, optional | `None` |" in pages["DistillationConfig"]
    assert "| `shortlist`<br>`--shortlist` | int | `8` |" in pages["SearchConfig"]
    assert "| `rank` | int | `16` |" in pages["HealingConfig"]
    assert "| `repair`<br>`--repair` | ReplacementConfig | `LinearConfig()` |" in pages["CompressionConfig"]


def test_families_list_every_kind(pages: dict[str, str]) -> None:
    for name, family in (("searches", SEARCHES), ("replacements", REPLACEMENTS)):
        assert all(f"| `{kind}`, " in pages[name] for kind in family)
    assert "| `disjoint`, `DisjointSearch` | `windows` | int | `2` |" in pages["searches"]


def test_every_command_has_all_its_options_in_groups(pages: dict[str, str]) -> None:
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", pages["commands"], flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    for command, text in sections.items():
        for option in make_app()[command].default_command.options:
            assert f"`{option.flag}" in text, (command, option.flag)
    assert re.findall(r"^\*\*(\w+)\*\*:$", sections["compress"], flags=re.MULTILINE)[:4] == [
        "Arguments", "Config", "Data", "Distillation",
    ]  # fmt: skip


def test_no_two_hyphens_stand_outside_code(pages: dict[str, str]) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", pages["commands"], flags=re.DOTALL)
    assert "--" not in text


def test_a_field_without_text_or_type_is_refused(tables: ModuleType) -> None:
    @dataclass(frozen=True)
    class Incomplete(Config):
        """Have two fields.

        Attributes
        ----------
        first : int
            The first field.
        """

        first: int = 1
        second: int = 2

    with pytest.raises(ValueError, match="no type or text for second"):
        tables.field_table(Incomplete)


@pytest.fixture
def option_without_text(monkeypatch: pytest.MonkeyPatch, tables: ModuleType) -> Iterator[None]:
    class App:
        def __getitem__(self, command: str) -> App:
            return self

        def assemble_argument_collection(self) -> list[Argument]:
            return [Argument()]

    class Argument:
        name = "--unexplained"
        parameter = type("Parameter", (), {"help": None})

    monkeypatch.setattr(tables, "make_app", lambda command: App())
    yield


@pytest.mark.usefixtures("option_without_text")
def test_an_option_of_a_command_without_text_is_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="no text for --unexplained"):
        tables.command_help("info")

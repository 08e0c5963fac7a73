"""Each notebook runs from top to bottom, and its stored outputs are complete and current."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks.execute import FOLDER, as_text, check, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXAMPLE = FOLDER / "2_what_blocks_do.ipynb"


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_complete_and_current(path: Path) -> None:
    problems = list(check(path.read_text(encoding="utf-8")))
    assert not problems, f"{path.name}: {problems}. Run: make notebooks NOTEBOOKS={path.stem}"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, smollm2: Any, tmp_path: Path) -> None:
    """`smollm2` skips where the weights are not installed."""
    pytest.importorskip("nbclient")
    stored = json.loads(path.read_text(encoding="utf-8"))
    executed = as_text(execute(path, tmp_path))
    assert not list(check(executed))
    assert kinds_of_outputs(json.loads(executed)) == kinds_of_outputs(stored)


def kinds_of_outputs(notebook: dict[str, Any]) -> list[list[str]]:
    return [[output["output_type"] for output in cell.get("outputs", ())] for cell in notebook["cells"]]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def without_outputs(notebook: dict[str, Any]) -> None:
    for cell in code_cells(notebook):
        cell |= {"outputs": [], "execution_count": None}


def with_a_changed_cell(notebook: dict[str, Any]) -> None:
    code_cells(notebook)[1]["source"].append("\nprint(1)")


def with_a_new_cell(notebook: dict[str, Any]) -> None:
    cell = {"cell_type": "code", "execution_count": 1, "metadata": {}, "outputs": [], "source": ["print(1)"]}
    notebook["cells"].append(cell | {"execution_count": len(code_cells(notebook)) + 1})


def with_exchanged_cells(notebook: dict[str, Any]) -> None:
    first, second, *_ = code_cells(notebook)
    first["source"], second["source"] = second["source"], first["source"]


def without_the_hash(notebook: dict[str, Any]) -> None:
    del notebook["metadata"]["streamline_hooks"]


def without_figures(notebook: dict[str, Any]) -> None:
    for cell in code_cells(notebook):
        cell["outputs"] = [output for output in cell["outputs"] if "image/png" not in output.get("data", {})]


def with_a_large_figure(notebook: dict[str, Any]) -> None:
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = "A" * 150_000


def with_an_error(notebook: dict[str, Any]) -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    code_cells(notebook)[0]["outputs"].append(error)


def with_another_order(notebook: dict[str, Any]) -> None:
    code_cells(notebook)[0]["execution_count"] = 7


def printing(name: str, text: str) -> Callable[[dict[str, Any]], None]:
    def change(notebook: dict[str, Any]) -> None:
        code_cells(notebook)[0]["outputs"].append({"output_type": "stream", "name": name, "text": [text]})

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without_outputs, "has no outputs"),
        (with_a_changed_cell, "changed after the execution"),
        (with_a_new_cell, "changed after the execution"),
        (with_exchanged_cells, "changed after the execution"),
        (without_the_hash, "changed after the execution"),
        (without_figures, "has no figure"),
        (with_a_large_figure, "more than 100 kB"),
        (with_an_error, "an error: ValueError: no"),
        (with_another_order, "execution counts"),
        (printing("stderr", "50%|=====     |"), "a warning or progress bar"),
        (printing("stdout", "saved to /home/me/model\n"), "a path of this machine: /home/me/model"),
        (printing("stdout", "<function f at 0x7f839c493a60>\n"), "a memory address: 0x7f839c493a60"),
        (printing("stdout", "loss nan\n"), "not finite"),
        (printing("stdout", "x" * 500_000), "more than 400"),
    ],
)
def test_a_fault_is_reported(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    change(notebook)
    problems = list(check(json.dumps(notebook)))
    assert any(problem in line for line in problems), problems


def test_a_changed_text_cell_needs_no_execution() -> None:
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    notebook["cells"][0]["source"].append("\nMore.")
    assert not list(check(json.dumps(notebook)))

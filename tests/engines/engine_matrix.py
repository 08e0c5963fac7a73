"""Run checkpoints in every engine and write docs/engines.md.

    python -m tests.engines.engine_matrix --folder FOLDER [--python ENGINE=PYTHON ...] [--only NAME ...] [--again]

Checkpoints are written to FOLDER once. Each engine runs in a process of its own, with the Python of its environment. A
cell passes if the new tokens of all prompts, which run in one batch, are those of Transformers; for a checkpoint in
bfloat16 or with weights of 8 bits, if at least as many of them agree as for the original in the same engine and
precision. Cells are stored in ``table.json`` at once, and those that exist are only run again with ``--again``. The
exit status is 1 if a cell passed before and fails now.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engines.engine_checkpoints import CHECKPOINTS, NEW_TOKENS, PROMPT_TOKENS, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TABLE, PAGE = Path(__file__).with_name("table.json"), ROOT / "docs" / "engines.md"
NAMES = {
    "transformers": "Transformers",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "mlx": "MLX",
    "onnx": "ONNX Runtime",
}
SECONDS = 900
PRECISIONS = ("bfloat16", "int8")
LEAST = 0.3  # agreement below which a rounded model is broken, as its original would be


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], help="interpreter of an engine, ENGINE=PYTHON")
    parser.add_argument("--only", action="append", default=[], help="checkpoints or engines to run")
    parser.add_argument("--again", action="store_true", help="run cells that are stored")
    options = parser.parse_args()
    pythons = dict.fromkeys(NAMES, sys.executable) | dict(pair.split("=", 1) for pair in options.python)
    cells: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    passed = {(name, engine) for name in CHECKPOINTS for engine in NAMES if _passes(cells, name, engine)}
    for name in CHECKPOINTS:
        for engine in NAMES:
            key = f"{name} | {engine}"
            wanted = not options.only or name in options.only or engine in options.only
            if wanted and (options.again or key not in cells):
                cells[key] = answer(write_checkpoint(options.folder, name), engine, pythons[engine])
                print(key, cells[key].get("error", "ok"), flush=True)
                TABLE.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(cells))
    if worse := [f"{name} in {NAMES[engine]}" for name, engine in passed if not _passes(cells, name, engine)]:
        sys.exit(f"These passed before: {', '.join(sorted(worse))}.")


def answer(folder: Path, engine: str, python: str) -> dict[str, Any]:
    """Return the tokens of an engine, or the last line of its error."""
    command = [python, "-m", "tests.engines.run_engine", engine, str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS} s"}
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"tokens"')]
    if process.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    errors = [line for line in process.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
    return {"error": (errors or process.stderr.splitlines() or ["no answer"])[-1][:600]}


def agreement(cell: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the fraction of new tokens that are equal, up to the first that differs of each prompt."""
    equal = 0
    for own, other in zip(cell["tokens"], reference["tokens"], strict=True):
        equal += next((k for k, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(other))
    return equal / sum(map(len, reference["tokens"]))


def verdict(cells: Mapping[str, Any], name: str, engine: str) -> str:
    """Return the content of a cell of the table."""
    cell, reference = cells.get(f"{name} | {engine}"), _reference(cells, name)
    if cell is None or reference is None or "error" in reference:
        return "not run"
    if "error" in cell:
        return "no"
    share = agreement(cell, reference)
    if share == 1.0:
        return "yes"
    precision = name.rpartition(", ")[2]
    original = f"SmolLM2, original, {precision}"
    own, own_reference = cells.get(f"{original} | {engine}"), _reference(cells, original)
    if precision in PRECISIONS and own and own_reference and not {"error"} & (set(own) | set(own_reference)):
        least = agreement(own, own_reference)
        passes = share >= max(least, LEAST)
        return f"{'yes' if passes else 'no'} ({share:.0%}{'' if name == original else f'; original {least:.0%}'})"
    return f"no ({share:.0%} of the tokens)"


def _passes(cells: Mapping[str, Any], name: str, engine: str) -> bool:
    return verdict(cells, name, engine).startswith("yes")


def _reference(cells: Mapping[str, Any], name: str) -> Any:
    """Return the cell of Transformers to compare with: that of the same weights, before they are quantized."""
    return cells.get(f"{name.removesuffix(', int8')} | transformers")


def page(cells: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    engines = {engine: {c["engine"] for key, c in cells.items() if key.endswith(f"| {engine}") and "engine" in c}
               for engine in NAMES}  # fmt: skip
    names = [name for name in CHECKPOINTS if any(f"{name} | {engine}" in cells for engine in NAMES)]
    lines = [
        "# Engines",
        "",
        f"Each cell says whether an engine generates the same {NEW_TOKENS} greedy tokens as Transformers, for "
        f"{len(PROMPT_TOKENS)} prompts of {PROMPT_TOKENS[0]} to {PROMPT_TOKENS[-1]} tokens in one batch, in float32. "
        "For checkpoints in bfloat16 and with weights of 8 bits (int8, quantized by each engine in its own way and "
        "compared with float32 in Transformers) the percentage of tokens up to the first difference of each prompt is "
        "compared with that of the original model in the same engine and precision. A tiny model is a random one "
        "with 8 blocks, of which one is removed.",
        "",
        f"| checkpoint | {' | '.join(NAMES.values())} |",
        f"|{'---|' * (len(NAMES) + 1)}",
        *(f"| {name} | {' | '.join(verdict(cells, name, engine) for engine in NAMES)} |" for name in names),
        "",
        f"Versions: {', '.join(sorted(version for found in engines.values() for version in found))}; CPU.",
        "",
        "## Reasons",
        "",
    ]
    errors: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for engine in NAMES:
            if error := cells.get(f"{name} | {engine}", {}).get("error"):
                errors.setdefault((NAMES[engine], error.replace("|", "/")), []).append(name)
    lines += [f"- {engine}, {'; '.join(names)}: `{error}`" for (engine, error), names in errors.items()]
    return "\n".join([*lines, "", "Made by `make engines`.", ""])


if __name__ == "__main__":
    main()

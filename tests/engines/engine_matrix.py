"""Run checkpoints in every engine and write docs/engines.md.

    python -m tests.engines.engine_matrix --folder FOLDER [--python ENGINE=PYTHON ...] [--only NAME ...] [--again]

Checkpoints are written to FOLDER once. Each engine runs in a process of its own, with the Python of its environment. A
cell passes if the new tokens of all prompts, which run in one batch, are those of Transformers. In bfloat16 or with
weights of 8 bits one different token would change all later ones. There each engine predicts one token after each part
of Transformers' texts, and a cell passes if not significantly fewer of them agree than for the original in the same
engine and precision. Cells are stored in ``table.json`` at once, and those that exist are only run again with
``--again``. The exit status is 1 if a cell passed before and fails now.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
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
STEP = 4  # tokens between two contexts: MLX needs seconds for each on a CPU
LEAST = 0.5  # agreement below which a rounded model is broken, as its original would be


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
                folder = write_checkpoint(options.folder, name)
                prompts = write_contexts(folder, _reference(cells, name), name) if _is_rounded(name, engine) else None
                cells[key] = answer(folder, engine, pythons[engine], prompts)
                print(key, cells[key].get("error", "ok"), flush=True)
                TABLE.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(cells))
    if worse := [f"{name} in {NAMES[engine]}" for name, engine in passed if not _passes(cells, name, engine)]:
        sys.exit(f"These passed before: {', '.join(sorted(worse))}.")


def write_contexts(folder: Path, reference: Mapping[str, Any] | None, name: str) -> Path:
    """Write a file with each prompt followed by the first 0, STEP, ... tokens of Transformers; return its path."""
    if reference is None or "tokens" not in reference:
        sys.exit(f"{name} is compared with the same weights in Transformers, which were not run. Run that row first.")
    content = json.loads((folder / "prompts.json").read_text())
    pairs = zip(content["prompts"], reference["tokens"], strict=True)
    content["prompts"] = [prompt + tokens[:k] for prompt, tokens in pairs for k in range(0, len(tokens), STEP)]
    path = folder / "contexts.json"
    path.write_text(json.dumps(content | {"new_tokens": 1}))
    return path


def answer(folder: Path, engine: str, python: str, prompts: Path | None = None) -> dict[str, Any]:
    """Return the tokens of an engine after the prompts in a file, or the last line of its error."""
    command = [python, "-m", "tests.engines.run_engine", engine, str(folder), *([str(prompts)] if prompts else [])]
    try:
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS} s"}
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"tokens"')]
    if process.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    errors = [line for line in process.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
    return {"error": shorten((errors or process.stderr.splitlines() or ["no answer"])[-1], 1500, placeholder=" ...")}


def equal_tokens(cell: Mapping[str, Any], reference: Mapping[str, Any]) -> list[bool]:
    """Return whether each token is that of Transformers; in generated text, no token after the first that differs."""
    rows = list(reference["tokens"])
    if len(cell["tokens"]) != len(rows):
        rows = [[row[k]] for row in rows for k in range(0, len(row), STEP)]
    pairs = zip(cell["tokens"], rows, strict=True)
    return [own[: k + 1] == row[: k + 1] for own, row in pairs for k in range(len(row))]


def is_worse(equal: list[bool], original: list[bool]) -> bool:
    """Whether a model agrees less than its original, by more than two standard errors, or hardly at all."""
    shares = [sum(values) / len(values) for values in (equal, original)]
    error = math.sqrt(sum(share * (1 - share) / len(equal) for share in shares))
    return shares[0] < max(shares[1] - 2 * error, LEAST)


def verdict(cells: Mapping[str, Any], name: str, engine: str) -> str:
    """Return the content of a cell of the table."""
    cell, reference = cells.get(f"{name} | {engine}"), _reference(cells, name)
    if cell is None or reference is None or "error" in reference:
        return "not run"
    if "error" in cell:
        return "no"
    equal = equal_tokens(cell, reference)
    share = sum(equal) / len(equal)
    if share == 1.0:
        return "yes"
    original = f"SmolLM2, original, {name.rpartition(', ')[2]}"
    own, own_reference = cells.get(f"{original} | {engine}"), _reference(cells, original)
    if _is_rounded(name, engine) and own and own_reference and not {"error"} & (set(own) | set(own_reference)):
        least = equal_tokens(own, own_reference)
        of_original = "" if name == original else f"; original {sum(least) / len(least):.0%}"
        return f"{'no' if is_worse(equal, least) else 'yes'} ({share:.0%}{of_original})"
    return f"no ({share:.0%} of the tokens)"


def _is_rounded(name: str, engine: str) -> bool:
    """Whether single next tokens are compared. Transformers in bfloat16 is the reference, which generates a text."""
    return name.endswith(PRECISIONS) and not (name.endswith("bfloat16") and engine == "transformers")


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
        "In bfloat16 (compared with Transformers in bfloat16) and with weights of 8 bits (int8, quantized by each "
        "engine in its own way, compared with float32 in Transformers) the percentage is that of equal next tokens "
        f"after {len(PROMPT_TOKENS) * NEW_TOKENS // STEP} parts of Transformers' texts. It has to be at most two "
        "standard errors below that of the original in the same engine and precision. The small OPT is that of "
        "`benchmarks.small_opt` or one that is trained for a tenth of its steps; a tiny model is random, with 8 "
        "blocks, of which one is removed.",
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

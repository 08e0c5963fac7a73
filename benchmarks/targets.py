"""Measure how accurately memory and time targets are predicted on SmolLM2-135M.

    python -m benchmarks.targets [--repeats 3] [--units parameters,latency]

For each target the original is compressed by the fewest blocks that meet it, without replacement or with a linear map.
The value is predicted before and measured after the compression. Times need an idle machine. The speed of a shared
machine drifts between prediction and measurement, so for a target in seconds the compressed model is timed again in
alternation with the original, and the error is that of their ratio. Each target is measured several times, and the
largest relative error must be at most 5 %. The rows are saved to ``benchmarks/results/targets.json`` and ``.md``, and
those that exist are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, show_log
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, DataConfig, LinearConfig, Target, compress
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import model_size
from streamline_hooks.data import read_documents
from streamline_hooks.evaluation import measure_speed
from streamline_hooks.pipeline import EvaluationConfig
from streamline_hooks.repair import NoneConfig, ReplacementConfig
from streamline_hooks.selection import TARGET_TOLERANCE, TargetOutcome, WindowSearch

DATA = DataConfig(sequence_length=128, calibration_tokens=4_096, validation_tokens=512, test_tokens=512)
REPAIRS = (NoneConfig(), LinearConfig())
UNITS = {"parameters": 0.15, "memory_bytes": 0.85, "latency": 0.8, "decode_latency": 0.8, "seconds_per_token": 0.8}
"""About the fraction of the original that each target asks for; of parameters, the fraction to remove."""
FILE = RESULTS / "targets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--units", default=",".join(UNITS), help="kinds of target; seconds need a constant speed")
    options = parser.parse_args()
    units = options.units.split(",")
    os.environ["TQDM_DISABLE"] = "1"
    show_log()
    texts = read_documents("pydoc")
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    command = f"python -m benchmarks.targets --repeats {options.repeats} --units {options.units}"
    content |= {"command": command, "machine": machine()}
    for repeat, repair, unit in product(range(options.repeats), REPAIRS, units):
        key = f"{repair}, {unit}, {repeat}"
        if key in content["rows"]:
            continue
        row = content["rows"][key] = {
            "repeat": repeat,
            "repair": str(repair),
            "unit": unit,
            **measure(repair, unit, texts),
        }
        print(key, f"predicted {row['predicted']:.5g}, error {row['error']:+.1%}", flush=True)
        content["largest_error"] = max(abs(row["error"]) for row in content["rows"].values())
        write(FILE, content)
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    print(table(content))
    if content["largest_error"] > TARGET_TOLERANCE:
        raise SystemExit(
            f"The largest error is {content['largest_error']:.1%}. Expected at most {TARGET_TOLERANCE:.0%}."
        )


def measure(repair: ReplacementConfig, unit: str, texts: Sequence[str]) -> dict[str, Any]:
    """Compress the original to a target; return the predicted and the measured value."""
    model, tokenizer = load_pretrained("smollm2")
    original = copy.deepcopy(model)
    config = CompressionConfig(
        remove=target_of(unit, model),
        repair=repair,
        search=WindowSearch(shortlist=1),
        data=DATA,
        evaluation=EvaluationConfig(speed=False, generation=False),
    )
    result = compress(model, texts, config, tokenizer=tokenizer)
    assert result.target is not None
    row = {"removed": len(result.plan.removed), **result.target.to_dict()}
    row["error"] = row["relative_error"]
    return row | (in_alternation(original, model, result.target) if unit == "seconds_per_token" else {})


def in_alternation(original: Any, model: Any, outcome: TargetOutcome) -> dict[str, Any]:
    """Time the compressed model and the original in alternation; return the ratio and its error."""
    models = {"original": original, "compressed": model}
    speed = measure_speed(models, repeats=11)
    seconds = {name: speed.seconds(name, "decode").median for name in models}
    ratio = seconds["compressed"] / seconds["original"]
    error = ratio / (outcome.predicted / outcome.original) - 1
    return {"seconds_in_alternation": seconds, "error": error}


def target_of(unit: str, model: Any) -> Target:
    """Return a target of about 80 % of the original."""
    if unit == "memory_bytes":
        return Target(memory_bytes=0.85 * model_size(model)[1])
    if unit == "seconds_per_token":
        speed = measure_speed({"original": model}, repeats=9)
        return Target(seconds_per_token=0.8 * speed.seconds("original", "decode").median)
    options: dict[str, Any] = {unit: UNITS[unit]}
    return Target(**options)


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown, with the largest error of each unit and replacement."""
    lines = [
        "SmolLM2-135M, float32: the fewest of 30 blocks whose removal meets a target, and its value predicted before "
        "and measured after the compression. Prompts of 512 tokens and 16 new tokens, CPU with "
        f"{content['machine']['threads']} threads. Compressions per target: "
        f"{1 + max(row['repeat'] for row in content['rows'].values())}; the largest error is shown, for seconds that "
        "of the ratio to the original, timed in alternation.",
        "",
        "| replacement | target | value | blocks removed | original | predicted | measured | error |",
        "|---" * 8 + "|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"].values():
        groups.setdefault((row["repair"], row["unit"]), []).append(row)
    for (repair, unit), rows in groups.items():
        row = max(rows, key=lambda repeat: abs(repeat["error"]))
        values = " | ".join(f"{row[name]:.5g}" for name in ("original", "predicted", "measured"))
        removed = ", ".join(map(str, sorted({repeat["removed"] for repeat in rows})))
        lines.append(f"| {repair} | {unit} | {row['target'][unit]:.5g} | {removed} | {values} | {row['error']:+.1%} |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

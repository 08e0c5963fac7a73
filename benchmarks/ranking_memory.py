"""Measure whether the memory of ranking grows with the number of batches.

    python -m benchmarks.ranking_memory [--data FOLDER] [--batches 10,100,1000]

Each number of batches (1 x 64 tokens of SmolLM2-135M) is profiled in a separate process, which reads its resident
memory before and the peak after. The results are saved to ``benchmarks/results/ranking_memory.json`` and ``.md``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from typing import Any

from benchmarks.real_text import RESULTS, arguments, split_of
from benchmarks.timing import machine

TOKENS = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", default="10,100,1000")
    parser.add_argument("--one", type=int, help="measure only this number of batches, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(options.data, options.one)))
        return
    rows = []
    for number in map(int, options.batches.split(",")):
        command = [sys.executable, "-m", "benchmarks.ranking_memory", "--one", str(number), "--data", str(options.data)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
    row = {
        "command": f"python -m benchmarks.ranking_memory --batches {options.batches}",
        "machine": machine(),
        "rows": rows,
        "growth": rows[-1]["above_model"] / rows[0]["above_model"] - 1,
    }
    (RESULTS / "ranking_memory.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "ranking_memory.md").write_text(table(row))


def peak(data: Any, number: int) -> dict[str, int]:
    """Return the resident bytes before the profile, and the increase of the peak during the profile."""
    os.environ["TQDM_DISABLE"] = "1"
    from streamline_hooks import profile
    from streamline_hooks.checkpoint import load_pretrained
    from streamline_hooks.core import split_into_batches

    model, tokenizer = load_pretrained("smollm2")
    split = split_of(data, tokenizer, calibration_tokens=8_192, validation_tokens=512)
    pieces = split_into_batches(split.calibration.view(-1, TOKENS), 1)
    gc.collect()
    give_back()
    loaded = resident()
    reset_peak()
    profile(model, [pieces[k % len(pieces)] for k in range(number)])
    return {"batches": number, "loaded": loaded, "above_model": resident("VmHWM") - loaded}


def resident(field: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes; without /proc, the peak since its start."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Return freed memory to the system (glibc), so that the profile cannot reuse it unnoticed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> None:
    """Reset the peak of the resident memory on Linux."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return


def table(row: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"SmolLM2-135M, float32, batches of 1 x {TOKENS} tokens on a CPU, each number in a separate process.",
        "",
        "| batches | before the profile | increase of the peak |",
        "|---:|---:|---:|",
        *(f"| {r['batches']:,} | {r['loaded'] / 1e6:.0f} MB | {r['above_model'] / 1e6:.1f} MB |" for r in row["rows"]),
        "",
        f"Change from the smallest to the largest number: {row['growth']:+.1%} (target: less than 5 %).",
        "",
        f"Made by `{row['command']}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

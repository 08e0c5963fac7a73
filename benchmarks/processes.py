"""Measure the speedup of two processes with one thread each over one, on SmolLM2-135M-Instruct.

    python -m benchmarks.processes [--data FOLDER] [--rounds 3] [--sequences 16]

The passes are a profile, the moments of four windows, and the training of a SwiGLU by KL, each on the same sequences of
512 tokens. Runs with one process and with two are started in turn (`torch.distributed.run`, gloo). Each pass is timed
between two barriers, after a warm-up on two sequences. The medians of the rounds, in milliseconds per token, are saved
to ``benchmarks/results/processes.json`` and ``processes.md``. Other load on the machine slows both down.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, ROOT, arguments
from benchmarks.timing import machine
from benchmarks.training_text import training_text
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import process_group, split_into_batches
from streamline_hooks.distillation import DistillationConfig, student_of, train
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import SwiGLUConfig, fit_windows
from streamline_hooks.statistics import measure_moments, profile

WINDOW, WINDOWS = range(12, 20), [range(k, k + 8) for k in (8, 10, 12, 14)]
BATCH, WARM = 4, 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--step", type=Path, help="make one measurement and save it to this file")
    options = parser.parse_args()
    if options.step is not None:
        measure(options)
        return
    seconds_by_count: dict[str, list[dict[str, float]]] = {"1": [], "2": []}
    for number in range(options.rounds):
        for count in ("1", "2") if number % 2 == 0 else ("2", "1"):
            seconds_by_count[count].append(started(options, count))
            print(count, seconds_by_count[count][-1], flush=True)
    content = {
        "command": "python -m benchmarks.processes",
        "tokens": options.sequences * 512,
        "rounds": seconds_by_count,
        "machine": machine(),
    }
    write(RESULTS / "processes.json", content)
    (RESULTS / "processes.md").write_text(table(content))
    print(table(content))


def started(options: Any, count: str) -> dict[str, float]:
    """Start processes and return their seconds per pass."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
        command += ["benchmarks.processes", "--data", str(options.data), "--sequences", str(options.sequences)]
        subprocess.run(
            [*command, "--step", str(file)], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return dict(json.loads(file.read_text()))


def measure(options: Any) -> None:
    """Run and time all passes in this process."""
    torch.set_num_threads(1)
    model, tokenizer = load_pretrained("smollm2")
    text = training_text(options.data, tokenizer, 2 * options.sequences * 512).train
    with process_group() as is_first:
        (repair,) = fit_windows(
            model, [WINDOW], SwiGLUConfig(), split_into_batches(text[:BATCH], 2), split_into_batches(text[BATCH:8], 2)
        )
        student = student_of(find_stack(model), [(repair.window, repair.replacement_module)])
        passes: dict[str, Callable[[list[Any]], Any]] = {
            "profile": lambda batches: profile(model, batches),
            "moments of four windows": lambda batches: measure_moments(model, batches, WINDOWS),
            "training by KL": lambda batches: train(student, batches, batches[:1], DistillationConfig(validations=1)),
        }
        seconds = {}
        for name, run in passes.items():
            run(split_into_batches(text[:WARM], WARM))
            _wait()
            begun = time.perf_counter()
            run(split_into_batches(text[: options.sequences], BATCH))
            _wait()
            seconds[name] = time.perf_counter() - begun
        if is_first:
            options.step.write_text(json.dumps(seconds))


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def table(content: dict[str, Any]) -> str:
    """Return the milliseconds per token and the speedup as Markdown."""
    rounds, tokens = content["rounds"], content["tokens"]
    lines = [
        f"SmolLM2-135M-Instruct, {tokens:,} tokens, CPU with one thread per process, medians of "
        f"{len(rounds['1'])} alternating rounds.",
        "",
        "| pass | one process, ms per token | two processes, ms per token | speedup |",
        "|---|---:|---:|---:|",
    ]
    for name in rounds["1"][0]:
        single, double = (statistics.median(each[name] for each in rounds[count]) for count in ("1", "2"))
        lines.append(
            f"| {name} | {1e3 * single / tokens:.2f} | {1e3 * double / tokens:.2f} | **{single / double:.2f}** |"
        )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

"""Compress a model with a vocabulary of 262,144 tokens, and measure the peak memory.

    python -m benchmarks.head_memory [--tokens 41000] [--removed 5] [--threads 1]

The model has the shape of Gemma 3 270M and random weights, because only time and memory are measured: 18 blocks of
width 640, 1.07 GB in float32, of which the embedding has 0.67 GB. It is compressed in closed form twice, in a process
each: once with the logits of a whole batch in memory, and once with those of a few tokens at a time, as in all runs
whose logits are large. Peak memory is that of the process as counted by the operating system, of which the weights
and the libraries take the part that is shown. The rows are saved to ``benchmarks/results/head_memory.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.quality_scores import write
from benchmarks.real_text import BATCH, RESULTS, SEQUENCE, show_log
from benchmarks.scale import peaks
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, Target, compress
from streamline_hooks.core import split_into_batches
from streamline_hooks.pipeline import DataConfig, EvaluationConfig
from streamline_hooks.surgery import token_outputs

FILE = RESULTS / "head_memory.json"
BLOCKS = 18
WAYS = {"whole": "of a whole batch", "tokens": "of a few tokens"}
LAYERS = ["full_attention" if k % 6 == 5 else "sliding_attention" for k in range(BLOCKS)]
SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": LAYERS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=41_000, help="calibration tokens")
    parser.add_argument("--removed", type=int, default=5, help="number of removed blocks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logits", choices=list(WAYS), help="run only this way, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.logits:
        print(json.dumps(measure(options.logits, options.tokens, options.removed)))
        return
    arguments = [f"--{name}={value}" for name, value in vars(options).items() if value is not None]
    rows = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.head_memory", *arguments, f"--logits={way}"]
        rows[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shown = f"python -m benchmarks.head_memory --tokens {options.tokens} --removed {options.removed}"
    write(FILE, {"rows": rows, "command": shown, "machine": machine()})
    FILE.with_suffix(".md").write_text(table(rows, shown))
    print(table(rows, shown))


def measure(way: str, tokens: int, removed: int) -> dict[str, Any]:
    """Compress the model in this process; return the peak memory and the seconds."""
    show_log()
    if way == "whole":
        token_outputs.WHOLE_LOGIT_BYTES = 2**62
    torch.manual_seed(0)
    with torch.no_grad():
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)).eval()
    loaded = resident()
    config = CompressionConfig(
        remove=Target(blocks=removed), evaluation=EvaluationConfig(speed=False, generation=False)
    )
    random = torch.Generator().manual_seed(0)
    counts = {"calibration": tokens, "validation": DataConfig().validation_tokens, "test": DataConfig().test_tokens}
    parts = {
        name: split_into_batches(
            torch.randint(3, SHAPE["vocab_size"], (count // SEQUENCE, SEQUENCE), generator=random), BATCH
        )
        for name, count in counts.items()
    }
    started = time.perf_counter()
    result = compress(model, parts, config)
    return {
        "seconds": time.perf_counter() - started,
        "loaded": loaded,
        "peak": peaks()["VmHWM"],
        "stages": result.seconds,
        "removed": list(result.plan.removed),
        "distance": result.candidates[0].distance,
    }


def resident() -> int:
    """Return the memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def table(rows: dict[str, Any], command: str) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| logits in memory | peak, GB | before, GB | minutes | removed blocks | KL after repair |",
        f"|{'---|' * 6}",
    ]
    for way, row in rows.items():
        cells = [WAYS[way], f"{row['peak'] / 1e9:.2f}", f"{row['loaded'] / 1e9:.2f}", f"{row['seconds'] / 60:.1f}"]
        cells += [f"{row['removed'][0]} to {row['removed'][-1]}", f"{row['distance']:.6f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "*before*: the process with the model, before the compression.", "", f"Made by `{command}`.", ""]
    )


if __name__ == "__main__":
    main()

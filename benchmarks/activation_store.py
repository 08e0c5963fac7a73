"""Measure the cost of recording hidden states to an activation store: time against a forward pass alone.

    python -m benchmarks.activation_store [--data FOLDER] [--rounds 7] [--tokens 512] [--batch-size 8] [--batches 4]

The outputs of four blocks of SmolLM2-135M-Instruct, the last among them, are recorded in bfloat16 to a folder on disk.
The same batches run in turn through the model alone, with and without its LM head. The throughput of recording is the
median time of the forward pass divided by the median time of recording. The digest of the weights, which a run computes
once, is reported separately.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, heldout
from benchmarks.timing import interleaved, machine
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import model_digest
from streamline_hooks.recording import ActivationStore

FILE = RESULTS / "activation_store.json"
BLOCKS = (7, 14, 21, 29)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--dry", action="store_true", help="print the table without writing the result")
    options = parser.parse_args()
    content = {
        "command": f"python -m benchmarks.activation_store --rounds {options.rounds} --tokens {options.tokens} "
        f"--batch-size {options.batch_size} --batches {options.batches}",
        "machine": machine() | {"load": os.getloadavg()[0]},
        "blocks": BLOCKS,
        "time": measure(options),
    }
    if not options.dry:
        write(FILE, content)
        FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


def measure(options: Any) -> dict[str, Any]:
    """Time recording and the forward pass alone, in turn."""
    model, tokenizer = load_pretrained("smollm2")
    model.eval()
    text = next(iter(heldout(options.data, tokenizer, 1).values()))
    stream = torch.cat([batch["input_ids"].flatten() for batch in text])
    count = options.batches * options.batch_size
    ids = stream.repeat(-(-count * options.tokens // len(stream)))[: count * options.tokens].view(count, -1)
    batches = list(ids.split(options.batch_size))
    started = time.perf_counter()
    model_digest(model)
    digest_seconds = time.perf_counter() - started

    def forward(part: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                part(input_ids=batch, use_cache=False)

    def record() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ActivationStore(f"{folder}/states").record(model, batches, blocks=BLOCKS, dtype=torch.bfloat16)

    ways = {
        "forward": lambda: forward(model),
        "forward without LM head": lambda: forward(model.model),
        "record": record,
    }
    seconds = interleaved(ways, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens": ids.numel(),
        "seconds": seconds,
        "median": median,
        "digest_seconds": digest_seconds,
        "throughput": {name: median[name] / median["record"] for name in ways},
    }


def table(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    timed = content["time"]
    lines = [
        f"SmolLM2-135M-Instruct, float32, {timed['tokens']:,} tokens, outputs of blocks "
        f"{', '.join(map(str, content['blocks']))} stored in bfloat16, median of "
        f"{len(timed['seconds']['record'])} alternating rounds, CPU with {content['machine']['threads']} thread(s), on "
        f"a machine with other load ({content['machine']['load']:.1f}).",
        "",
        "| run | tokens/s | throughput of recording relative to it |",
        "|---|---|---|",
    ]
    for name, seconds in timed["median"].items():
        lines.append(f"| {name} | {timed['tokens'] / seconds:,.0f} | {timed['throughput'][name]:.3f} |")
    lines += ["", f"Each call of `record` also digests the weights: {timed['digest_seconds']:.2f} s, included above."]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

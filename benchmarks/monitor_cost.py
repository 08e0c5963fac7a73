"""Measure the cost of the hidden-state monitor in training: time per step, and memory.

    python -m benchmarks.monitor_cost [--data FOLDER] [--rounds 7] [--tokens 512] [--steps 1000]

Time: steps of SmolLM2-135M-Instruct (forward, backward and AdamW on one sequence) are timed in turn without a monitor,
with a monitor in a step without measurement, and in a step with measurement. The overhead with ``every=50`` is the
extra time of one measured step divided by the time of 50 steps. Memory: a small Llama trains for a thousand steps with
a measurement in each. The memory of the process and the living tensors are compared after a tenth of the steps and at
the end.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, arguments, heldout
from benchmarks.timing import interleaved, machine
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.training import HiddenStateMonitor

FILE = RESULTS / "monitor_cost.json"
EVERY = 50


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    content = {
        "command": f"python -m benchmarks.monitor_cost --rounds {options.rounds} --tokens {options.tokens}",
        "machine": machine() | {"load": os.getloadavg()[0]},
        "every": EVERY,
        "time": time_of(options),
        "memory": memory_of(options.steps),
    }
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


def time_of(options: Any) -> dict[str, Any]:
    """Time a training step without a monitor, without and with a measurement."""
    model, tokenizer = load_pretrained("smollm2")
    model.train()
    text = next(iter(heldout(options.data, tokenizer, 1).values()))
    ids = text[0]["input_ids"][:1, : options.tokens]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    monitor = HiddenStateMonitor(model, every=2)

    def step(monitored: bool) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitored:
            monitor.step()

    def with_monitor(measured: bool) -> Callable[[], None]:
        def run() -> None:
            monitor.open(0 if measured else 1)
            step(True)
            monitor.close()

        return run

    ways = {"without": lambda: step(False), "not measured": with_monitor(False), "measured": with_monitor(True)}
    seconds = interleaved(ways, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    extra = median["measured"] - median["without"]
    return {
        "tokens": options.tokens,
        "seconds": seconds,
        "median": median,
        "measured_to_without": median["measured"] / median["without"],
        "not_measured_to_without": median["not measured"] / median["without"],
        "extra_of_every": extra / (EVERY * median["without"]),
    }


def memory_of(steps: int) -> dict[str, Any]:
    """Return the memory after a tenth of the steps and after all steps, with a measurement in each."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    memory_by_step: dict[int, dict[str, float]] = {}
    with HiddenStateMonitor(model, every=1) as monitor:
        for number in range(1, steps + 1):
            ids = torch.randint(512, (4, 64))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            if number in (steps // 10, steps):
                gc.collect()
                alive = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
                memory_by_step[number] = {
                    "resident_mb": resident_mb(),
                    "tensors": len(alive),
                    "tensor_mb": sum(tensor.numel() * tensor.element_size() for tensor in alive) / 1e6,
                }
    return {"steps": steps, "held": memory_by_step}


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def table(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    timed, memory = content["time"], content["memory"]
    (early, first), (late, last) = memory["held"].items()
    lines = [
        f"SmolLM2-135M-Instruct, time of a training step on {timed['tokens']} tokens, median of "
        f"{len(timed['seconds']['without'])} alternating rounds, CPU with {content['machine']['threads']} thread(s), "
        "on a machine with other load.",
        "",
        "| step | ms | ratio |",
        "|---|---|---|",
    ]
    labels = {
        "without": "without monitor",
        "not measured": "monitor, no measurement in this step",
        "measured": "monitor, measurement in this step",
    }
    for name, label in labels.items():
        share = timed["median"][name] / timed["median"]["without"]
        lines.append(f"| {label} | {1e3 * timed['median'][name]:.0f} | {share:.3f} |")
    lines += [
        "",
        f"Overhead with every={content['every']}: {timed['extra_of_every']:.2%}.",
        "",
        f"| a small Llama, measurement in every step | after {early} steps | after {late} steps |",
        "|---|---|---|",
        f"| resident memory (MB) | {first['resident_mb']:.1f} | {last['resident_mb']:.1f} |",
        f"| living tensors | {first['tensors']} | {last['tensors']} |",
        f"| size of living tensors (MB) | {first['tensor_mb']:.2f} | {last['tensor_mb']:.2f} |",
    ]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

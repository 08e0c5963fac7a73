"""What the monitor costs a training: time of a step that is measured, of one that is not, and memory.

    python -m benchmarks.monitor_cost [--data FOLDER] [--rounds 7] [--tokens 512] [--steps 1000]

Time: steps of SmolLM2-135M-Instruct (forward, backward and AdamW on one sequence) without a monitor, with one in a step
that it does not measure, and in one that it does, in turn. The cost with ``every=50`` is the extra time of a measured
step over that of 50 steps. Memory: a small Llama trains for a thousand steps that are all measured; what the process
holds at the end is compared with what it held after a tenth of them, and so are the tensors that are alive.
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
from streamline_hooks import HiddenStateMonitor
from streamline_hooks.pretrained import load_pretrained

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
    """Seconds of a step in three ways, in turn."""
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
    """What a process holds after a tenth of the steps and at the end, all of them measured."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    held: dict[int, dict[str, float]] = {}
    with HiddenStateMonitor(model, every=1) as monitor:
        for number in range(1, steps + 1):
            ids = torch.randint(512, (4, 64))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            if number in (steps // 10, steps):
                gc.collect()
                alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
                held[number] = {
                    "resident_mb": resident_mb(),
                    "tensors": len(alive),
                    "tensor_mb": sum(tensor.numel() * tensor.element_size() for tensor in alive) / 1e6,
                }
    return {"steps": steps, "held": held}


def resident_mb() -> float:
    """What the operating system says that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def table(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    timed, memory = content["time"], content["memory"]
    (early, first), (late, last) = memory["held"].items()
    lines = [
        f"SmolLM2-135M-Instruct, a training step on {timed['tokens']} tokens, median of "
        f"{len(timed['seconds']['without'])} rounds in turn, {content['machine']['threads']} threads, beside whatever "
        "else the machine did.",
        "",
        "| step | ms | of one without a monitor |",
        "|---|---|---|",
    ]
    for name in ("without", "not measured", "measured"):
        share = timed["median"][name] / timed["median"]["without"]
        lines.append(f"| {name} | {1e3 * timed['median'][name]:.0f} | {share:.3f} |")
    lines += [
        "",
        f"With every={content['every']}: {timed['extra_of_every']:.2%} more time.",
        "",
        f"| a small Llama, every step measured | after {early} steps | after {late} steps |",
        "|---|---|---|",
        f"| resident (MB) | {first['resident_mb']:.1f} | {last['resident_mb']:.1f} |",
        f"| tensors alive | {first['tensors']} | {last['tensors']} |",
        f"| their size (MB) | {first['tensor_mb']:.2f} | {last['tensor_mb']:.2f} |",
    ]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

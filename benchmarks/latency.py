"""Measure latency, cache size and memory of SmolLM2-135M with 8 of 30 blocks removed, by replacement.

    python -m benchmarks.latency [--batch 1] [--tokens 256] [--new-tokens 32] [--rounds 9]

The original and the compressed models are timed in turn: prefill, decoding with a cache, and time to the first token.
Ratios are ratios of medians; the ideal ratio is the fraction of remaining blocks. Replacements are not fitted, because
the values of the weights do not affect the time. The KV cache is measured after a prompt. Peak memory is that of a
separate process that loads one model and generates. No text is needed. The results are saved to
``benchmarks/results/latency.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.real_text import RESULTS
from benchmarks.timing import machine
from streamline_hooks import LayerSurgeon, LinearConfig, SwiGLUConfig, find_stack
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.evaluation import PHASES, measure_speed
from streamline_hooks.repair import BlockConfig, NoneConfig, ReplacementConfig, SilencedConfig, insert_replacement

START, REMOVED = 12, 8
REPAIRS = (NoneConfig(), LinearConfig(), SwiGLUConfig(), BlockConfig(), SilencedConfig())
ORIGINAL = "original"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    sizes = {"batch": options.batch, "tokens": options.tokens, "new_tokens": options.new_tokens}
    model = load_pretrained("smollm2")[0]
    repairs: dict[str, ReplacementConfig | None] = {ORIGINAL: None, **{str(repair): repair for repair in REPAIRS}}
    ways: dict[str, Callable[[], AbstractContextManager[nn.Module]]] = {
        name: opened(model, repair) for name, repair in repairs.items()
    }
    speed = measure_speed(ways, **sizes, repeats=options.rounds)
    whole, first = len(find_stack(model)), {phase: speed.seconds(ORIGINAL, phase).median for phase in PHASES}
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        with way() as shorter:
            rows[name] = {
                "ideal": len(find_stack(shorter)) / whole,
                "parameters": sum(p.numel() for p in shorter.parameters()),
                "cache_bytes_per_token": cache_bytes(shorter),
                "seconds_to_first_token": speed.seconds(name, "prefill").median,
                "prefill_tokens_per_second": speed.tokens_per_second(name, "prefill"),
                "decode_tokens_per_second": speed.tokens_per_second(name, "decode"),
                **{f"{phase}_ratio": speed.seconds(name, phase).median / first[phase] for phase in PHASES},
            }
        rows[name]["peak_memory"] = peak_of(repairs[name], **sizes)
    size_options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in sizes.items())
    content = {
        "command": f"python -m benchmarks.latency {size_options} --rounds {options.rounds}",
        "machine": machine(),
        "rows": rows,
        "speed": speed.to_dict(),
    }
    (RESULTS / "latency.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "latency.md").write_text(table(content, options))
    print(table(content, options))


def opened(model: nn.Module, repair: ReplacementConfig | None) -> Callable[[], AbstractContextManager[nn.Module]]:
    """Return a function that opens a context with the replaced window, or with the original model."""
    if repair is None:
        return lambda: nullcontext(model)
    window = range(START, START + REMOVED + repair.slots)
    replacement_module = repair.build(find_stack(model), window)

    @contextmanager
    def way() -> Iterator[nn.Module]:
        with LayerSurgeon(model) as surgeon:
            insert_replacement(surgeon, window, replacement_module)
            yield model

    return way


@torch.no_grad()
def cache_bytes(model: Any) -> float:
    """Return the bytes of keys and values per token of one sequence."""
    tokens = 16
    layers = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / tokens


def peak_of(repair: ReplacementConfig | None, batch: int, tokens: int, new_tokens: int) -> int:
    """Return the peak memory, in bytes, of a process that loads the compressed model and generates."""
    model: Any = load_pretrained("smollm2")[0]
    if repair is not None:
        window = range(START, START + REMOVED + repair.slots)
        replacement_module = repair.build(find_stack(model), window)
        with LayerSurgeon(model) as surgeon:
            insert_replacement(surgeon, window, replacement_module)
            surgeon.commit()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, "-c", PEAK, folder, str(batch), str(tokens), str(new_tokens)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


PEAK = """
import sys, torch, streamline_hooks
from transformers import AutoModelForCausalLM
folder, batch, tokens, new = sys.argv[1], *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(folder)
model.generate(torch.ones(batch, tokens, dtype=torch.long), max_new_tokens=new, min_new_tokens=new, do_sample=False)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
"""
"""Script of a process that loads a model from a folder and generates."""


def table(content: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"SmolLM2-135M, float32, {REMOVED} of 30 blocks removed (one more by block replacements): {options.batch} x "
        f"{options.tokens} prompt tokens and {options.new_tokens} new tokens, CPU with {content['machine']['threads']} "
        f"threads, medians of {options.rounds} alternating rounds. Prefill and decode time are ratios to the original; "
        "ideal is the fraction of remaining blocks. Peak memory is that of a process that loads a model and generates.",
        "",
        "| replacement | ideal | prefill time | decode time | first token | prefill tok/s | decode tok/s | "
        "KV bytes per token | parameters | peak memory |",
        "|---" * 10 + "|",
    ]
    for name, row in content["rows"].items():
        lines.append(
            f"| {name} | {row['ideal']:.3f} | {row['prefill_ratio']:.3f} | {row['decode_ratio']:.3f} | "
            f"{1e3 * row['seconds_to_first_token']:.0f} ms | {row['prefill_tokens_per_second']:.0f} | "
            f"{row['decode_tokens_per_second']:.1f} | {row['cache_bytes_per_token']:,.0f} | "
            f"{row['parameters'] / 1e6:.1f} M | {row['peak_memory'] / 1e6:.0f} MB |"
        )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

"""Measure the stages of a compression on models of the paper's sizes, with random weights.

    python -m benchmarks.model_shapes [--shape llama-2-7b] [--device auto] [--dtype bfloat16] [--batch 1]
        [--tokens 2048] [--batches 8] [--steps 100] [--rounds 5] [--threads N]

Time and memory do not depend on the values of the weights, so no checkpoint is needed. Per shape: the time of a ranking
relative to a bare forward on the same text (in turn, ratio of medians), of the least-squares fit of a window of a
quarter of the blocks, of a number of training steps of its SwiGLU replacement by KL, and of generation before and after
the removal, relative to the fraction of remaining blocks. The peak memory of each stage, in addition to the model, is
compared with the formula of `compression_bytes`; more than 1 GB above it is marked. On a GPU it is what PyTorch has
allocated; on a CPU it is that of the process, and includes its libraries. Each shape is saved to
``benchmarks/results/model_shapes.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from benchmarks.quality_scores import write
from benchmarks.ranking_memory import give_back, reset_peak, resident
from benchmarks.real_text import RESULTS
from benchmarks.timing import interleaved, machine, ratio
from streamline_hooks import (
    DistillationConfig,
    LayerSurgeon,
    LinearConfig,
    SwiGLUConfig,
    fit_windows,
    profile,
    train,
)
from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation import student_of
from streamline_hooks.evaluation import measure_speed
from streamline_hooks.evaluation.speed import synchronize
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline.cost import compression_bytes
from streamline_hooks.repair import insert_replacement

FILE = RESULTS / "model_shapes.json"
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-2-7b": lambda: LlamaConfig(vocab_size=32_000, max_position_embeddings=4096),
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=8192
    ),
    "opt-6.7b": lambda: OPTConfig(
        hidden_size=4096, ffn_dim=16_384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    ),
}
"""Configs by name, with the sizes of the published checkpoints; `tiny` tests the benchmark."""
STAGES = {"rank": "rank", "fit": "least squares", "train": "train"}
ALLOWED = 10**9  # bytes in addition to the formula
NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1, help="sequences per forward pass")
    parser.add_argument("--tokens", type=int, default=2048, help="per sequence")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = Bench(options).row()
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    content[f"{options.shape}, {row['device']}"] = row
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


class Bench:
    """A model with random weights and random text."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.device = LoadingConfig(device=options.device).torch_device()
        torch.manual_seed(0)
        before = self.resident()
        self.model = self.random_model()
        self.stack = find_stack(self.model)
        self.loaded = self.resident() - before
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, options.tokens)
        vocabulary = self.model.config.vocab_size
        self.batches = [
            {"input_ids": torch.randint(3, vocabulary, shape, generator=generator).to(self.device)}
            for _ in range(max(options.batches, options.steps))
        ]
        length = len(self.stack)
        self.window = range(length // 2, length // 2 + length // 4)

    def random_model(self) -> Any:
        """Return the model in its dtype on the device; weights are made there, in turn, at their final size."""
        dtype = getattr(torch, self.options.dtype)
        standard = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return AutoModelForCausalLM.from_config(SHAPES[self.options.shape](), dtype=dtype).eval()
        finally:
            torch.set_default_dtype(standard)

    def row(self) -> dict[str, Any]:
        """Measure all stages."""
        options, text = self.options, self.batches[: self.options.batches]
        seconds = interleaved(
            {"forward": lambda: self.forward(text), "rank": lambda: self.waited(lambda: profile(self.model, text))},
            options.rounds,
        )
        peaks, stages = {}, {}
        _, _, peaks["rank"] = self.measured(lambda: profile(self.model, text))
        stages["rank"] = statistics.median(seconds["rank"])
        fits, stages["fit"], peaks["fit"] = self.measured(
            lambda: fit_windows(self.model, [self.window], LinearConfig(), text, text[:1])
        )
        (start,) = fit_windows(self.model, [self.window], SwiGLUConfig(), text[:1], text[:1])
        student = student_of(self.stack, [(self.window, start.replacement_module)])
        trained = sum(p.numel() for p in student.parameters().values())
        steps = self.batches[: options.steps]
        _, stages["train"], peaks["train"] = self.measured(
            lambda: train(student, steps, text[:1], DistillationConfig(validations=1), hardware=HardwareConfig())
        )
        size = options.batch * options.tokens
        formula = compression_bytes(
            self.stack, batch=size, text=size * (len(steps) + 1), trained=trained, hardware=self.cached_states
        )
        return {
            "device": self.device_name(),
            "command": self.command(),
            "machine": machine(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "blocks": len(self.stack),
            "removed": len(self.window),
            "rank / forward": ratio(seconds, "rank", "forward"),
            "forward": statistics.median(seconds["forward"]),
            "stages": stages,
            "tokens": {"rank": size * len(text), "fit": size * len(text), "train": size * len(steps)},
            "loaded": self.loaded,
            "peaks": peaks,
            "formula": {stage: formula[stage] for stage in STAGES},
            "speed": self.speed(fits[0].replacement_module),
        }

    def speed(self, replacement: Any) -> dict[str, Any]:
        """Return the times of generation without the window relative to the original, and the fraction of blocks."""

        def shortened() -> Any:
            surgeon = LayerSurgeon(self.model)
            return _Shortened(surgeon, self.window, replacement)

        tokens = min(512, self.options.tokens)
        report = measure_speed(
            {"original": self.model, "shortened": shortened},
            tokens=tokens,
            new_tokens=NEW_TOKENS,
            repeats=self.options.rounds,
        )
        return {
            "ideal": 1 - len(self.window) / len(self.stack),
            "prefill": report.ratio("shortened", "prefill").median,
            "decode": report.ratio("shortened", "decode").median,
            "tokens_per_second": report.tokens_per_second("original", "decode"),
        }

    @torch.no_grad()
    def forward(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Run a bare forward pass."""
        for batch in batches:
            self.model(**batch, use_cache=False)
        synchronize(self.model)

    def waited(self, run: Callable[[], Any]) -> Any:
        """Run a function and wait for the device."""
        result = run()
        synchronize(self.model)
        return result

    def measured(self, run: Callable[[], Any]) -> tuple[Any, float, int]:
        """Return the result of a function, its seconds, and its peak memory in addition to the model."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            give_back()
            reset_peak()
        before, started = self.resident(), time.perf_counter()
        result = self.waited(run)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM")
        return result, seconds, peak - before

    def resident(self) -> int:
        """Return the memory in use: on a GPU that of tensors, on a CPU that of the process."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident("VmRSS")

    @property
    def cached_states(self) -> HardwareConfig:
        """Config of the formula: the teacher's states are kept in the memory of the host, not of a GPU."""
        return HardwareConfig() if self.device.type == "cpu" else HardwareConfig(state_memory=0)

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads, {self.options.dtype}"

    def command(self) -> str:
        shown = {k: v for k, v in vars(self.options).items() if k not in ("device", "threads")}
        return "python -m benchmarks.model_shapes " + " ".join(f"--{name} {value}" for name, value in shown.items())


class _Shortened:
    """A model without a window, while it is open."""

    def __init__(self, surgeon: LayerSurgeon, window: range, replacement: Any) -> None:
        self.surgeon, self.window, self.replacement = surgeon, window, replacement

    def __enter__(self) -> nn.Module:
        self.surgeon.__enter__()
        insert_replacement(self.surgeon, self.window, self.replacement)
        return self.surgeon.stack.model

    def __exit__(self, *error: Any) -> None:
        self.surgeon.__exit__(*error)


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "Random weights. A quarter of the blocks is fitted, trained and removed, in the middle of the model. *Rank* is "
        "relative to a bare forward on the same text. *Prompt* and *token* are the times of generation without the "
        "window and with a linear map, and in brackets the achieved fraction of the ideal saving. Training includes "
        "the teacher and two validations. Memory is the peak in addition to the model, next to the formula of "
        "`compression_bytes`; at most 1 GB more is allowed.",
        "",
        "| shape and device | parameters | rank | prompt | token | tokens/s: fit | tokens/s: train "
        "| GB: rank | GB: fit | GB: train |",
        f"|{'---|' * 10}",
    ]
    for name, row in content.items():
        speed, ideal = row["speed"], 1 - row["speed"]["ideal"]
        cells = [name, f"{row['parameters'] / 1e9:.2f}e9", f"{row['rank / forward']:.2f}"]
        cells += [f"{speed[phase]:.2f} ({(1 - speed[phase]) / ideal:.2f})" for phase in ("prefill", "decode")]
        cells += [f"{row['tokens'][stage] / row['stages'][stage]:,.0f}" for stage in ("fit", "train")]
        for stage in STAGES:
            above = row["peaks"][stage] > row["formula"][stage] + ALLOWED
            cells.append(f"{row['peaks'][stage] / 1e9:.2f} ({row['formula'][stage] / 1e9:.2f}){' above' * above}")
        lines.append(f"| {' | '.join(cells)} |")
    commands = "\n".join(f"- {name}: `{row['command']}`" for name, row in content.items())
    return "\n".join([*lines, "", commands, ""])


if __name__ == "__main__":
    main()

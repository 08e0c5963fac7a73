"""Estimate the cost of block-by-block compression for models with 7 to 405 billion parameters.

    python -m benchmarks.plan

The estimate uses `streamline_hooks.pipeline.cost` and the shapes of Llama-2-7B, Llama-3-70B, Llama-3.1-405B and of a
mixture of experts with 400 billion parameters (the text model of Llama 4 Maverick: 128 experts in every second block,
one expert per token). No weights are needed. The table is saved to ``benchmarks/results/plan.md``. `benchmarks.scale`
compares the same formula with timed runs.
"""

from __future__ import annotations

from functools import partial

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, PreTrainedModel

from benchmarks.real_text import RESULTS
from streamline_hooks import CompressionConfig, DataConfig
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import Rates, StageWork, blockwise_work, format_duration

CONFIG = CompressionConfig(
    data=DataConfig(sequence_length=2048, calibration_tokens=1_000_000, validation_tokens=16_384, test_tokens=65_536)
)
MEMORY = 64 * 10**9  # bytes of hidden states
ITEMSIZE = 2  # bfloat16


def h100(processes: int = 1) -> Rates:
    """Return the rates of an H100 SXM at 40 % of its data sheet, with one NVMe drive."""
    return Rates(0.4 * 989e12, 0.4 * 67e12, eigen=3e11, read=3e9, write=2e9, processes=processes)


def llama(width: int, intermediate: int, blocks: int, heads: int, kv_heads: int, vocabulary: int) -> PreTrainedModel:
    """Build a Llama model from the sizes in its published configuration."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def mixture_of_400b() -> PreTrainedModel:
    """Build the text model of Llama 4 Maverick (400.7 billion parameters, 17 billion active)."""
    config = Llama4TextConfig(
        hidden_size=5120,
        intermediate_size=8192,
        intermediate_size_mlp=16384,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=128,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        vocab_size=202048,
    )
    return Llama4ForCausalLM(config)


MODELS = {
    "Llama-2-7B": partial(llama, 4096, 11008, 32, 32, 32, 32_000),
    "Llama-3-70B": partial(llama, 8192, 28672, 80, 64, 8, 128_256),
    "Llama-3.1-405B": partial(llama, 16384, 53248, 126, 128, 8, 128_256),
    "Llama 4 Maverick (text model)": mixture_of_400b,
}


def table(stages: list[StageWork], rates: Rates) -> str:
    """Return the stages as Markdown."""
    lines = [
        "| stage | reads | writes | hidden states | FLOPs | FLOPs in float64 | time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in stages:
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (stage.read, stage.written, stage.states))
        flops = f"{stage.products:.1e} | {stage.float64 + stage.eigen:.1e}"
        lines.append(f"| {stage.name} | {sizes} | {flops} | {format_duration(stage.seconds(rates))} |")
    return "\n".join(lines)


def main() -> None:
    single, eight_gpus = h100(), h100(8)
    lines = [
        "Estimated cost of removing a quarter of the blocks and repairing them in closed form, on "
        f"{CONFIG.data.calibration_tokens:,} tokens in sequences of {CONFIG.data.sequence_length:,}, in bfloat16, with "
        f"{MEMORY // 10**9} GB of hidden states in memory and the rest in files. Nothing was run. Assumed hardware: an "
        "H100 at 40 % of its data sheet (989 TFLOP/s in bfloat16, 67 in float64) and a disk that reads "
        f"{single.read / 1e9:.0f} GB/s and writes {single.write / 1e9:.0f} GB/s. The times of the stages are for one "
        "H100. All models go block by block, which runs on the CPU today, so the times are hypothetical. The formula "
        "is compared with a timed run of three billion parameters on two CPU cores in scale.md.",
    ]
    for name, make in MODELS.items():
        with init_empty_weights(include_buffers=True):
            stack = find_stack(make())
        stages, resident = blockwise_work(stack, CONFIG, len(stack) // 4, memory=MEMORY, itemsize=ITEMSIZE)
        hours = " and ".join(
            f"{sum(stage.seconds(rates) for stage in stages) / 3600:.2f} h on {n}"
            for n, rates in (("one H100", single), ("eight", eight_gpus))
        )
        parameters = sum(p.numel() for p in stack.model.parameters())
        about = f"{parameters / 1e9:.2f} billion parameters, peak memory {resident / 1e9:.1f} GB"
        lines += ["", f"**{name}**: {about}; {hours}.", "", table(stages, single)]
    text = "\n".join([*lines, "", "Made by `python -m benchmarks.plan`.", ""])
    (RESULTS / "plan.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""What a compression block by block would take for models that no machine here holds.

    python -m benchmarks.plan

By `streamline_hooks.pipeline.flops`, from the shapes of Llama-3-70B and of a mixture of 400 billion parameters (the
text part of Llama 4 Maverick: 128 experts in every second block, of which a token goes to one), without a weight of
either. The table goes to ``benchmarks/results/plan.md``. `benchmarks.scale` compares the same formula with timed runs.
"""

from __future__ import annotations

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, PreTrainedModel

from benchmarks.real_text import RESULTS
from streamline_hooks import CompressionConfig, DataConfig
from streamline_hooks.pipeline.blockwise_cost import duration
from streamline_hooks.pipeline.flops import Rates, StageWork, blockwise_work
from streamline_hooks.stack import find_stack

CONFIG = CompressionConfig(
    data=DataConfig(sequence_length=2048, calibration_tokens=1_000_000, validation_tokens=16_384, test_tokens=65_536)
)
MEMORY = 64 * 10**9  # bytes of states
ITEMSIZE = 2  # bfloat16


def h100(processes: int = 1) -> Rates:
    """NVIDIA H100 SXM at 40 % of its data sheet, with an assumed rate of eigendecompositions and one NVMe drive."""
    return Rates(0.4 * 989e12, 0.4 * 67e12, eigen=3e11, read=3e9, write=2e9, processes=processes)


def llama_3_70b() -> PreTrainedModel:
    """70.6 billion parameters, by its published configuration."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def mixture_of_400b() -> PreTrainedModel:
    """400.7 billion parameters, 17 billion of them active, by the published configuration of Llama 4 Maverick."""
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


def table(stages: list[StageWork], rates: Rates) -> str:
    """Return the stages as Markdown."""
    lines = [
        "| stage | reads | writes | states | FLOPs | in float64 | time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in stages:
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (one.read, one.written, one.states))
        flops = f"{one.products:.1e} | {one.float64 + one.eigen:.1e}"
        lines.append(f"| {one.name} | {sizes} | {flops} | {duration(one.seconds(rates))} |")
    return "\n".join(lines)


def main() -> None:
    one, eight = h100(), h100(8)
    lines = [
        f"A quarter of the blocks removed and repaired in closed form, on {CONFIG.data.calibration_tokens:,} tokens in "
        f"sequences of {CONFIG.data.sequence_length:,}, in bfloat16, {MEMORY // 10**9} GB of states in "
        "memory and the rest in files. Computed, not run: an H100 at 40 % of its data sheet (989 TFLOP/s in bfloat16, "
        "67 in float64), "
        f"a disk that reads {one.read / 1e9:.0f} GB/s and writes {one.write / 1e9:.0f} GB/s; the times of the stages "
        "are those of one H100. Held against three billion parameters on two cores, by the rates of that machine: see "
        "scale.md.",
    ]
    for name, make in (("Llama-3-70B", llama_3_70b), ("a mixture of 400 billion", mixture_of_400b)):
        with init_empty_weights(include_buffers=True):
            stack = find_stack(make())
        stages, resident = blockwise_work(stack, CONFIG, len(stack) // 4, memory=MEMORY, itemsize=ITEMSIZE)
        hours = " and ".join(
            f"{sum(stage.seconds(rates) for stage in stages) / 3600:.2f} h on {n}"
            for n, rates in (("one", one), ("eight", eight))
        )
        parameters = sum(p.numel() for p in stack.model.parameters())
        about = f"{parameters / 1e9:.2f} billion parameters, at most {resident / 1e9:.1f} GB in memory"
        lines += ["", f"**{name}**: {about}; {hours}.", "", table(stages, one)]
    text = "\n".join([*lines, "", "Made by `python -m benchmarks.plan`.", ""])
    (RESULTS / "plan.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

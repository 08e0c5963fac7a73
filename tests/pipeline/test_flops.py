"""FLOPs and bytes by shape, against what torch counts and a model that is computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan import MODELS
from streamline_hooks import CompressionConfig, StreamlineError
from streamline_hooks.core import HardwareConfig
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline.cost import Rates, block_work, blockwise_work, compression_bytes
from streamline_hooks.testing import tiny_model
from tests.configured import configured

TOKENS = 12
SMALL = configured(
    sequence_length=10, calibration_tokens=1000, validation_tokens=100, test_tokens=50, shortlist=3
)  # fmt: skip


def counted(model: Any, k: int) -> int:
    """FLOPs of a block on one sequence, as torch counts them; attention to all tokens, later ones too."""
    stack = find_stack(model)
    model.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # nor the grouped products of experts
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + TOKENS)[None])
    counts = counter.get_flop_counts()
    return sum(counts[f"{type(model).__name__}.{stack.path}.{k}"].values())


@pytest.mark.parametrize("type_", ["llama", "gpt2", "opt", "gpt_neox", "phi", "qwen3"])
def test_dense_blocks_take_what_torch_counts(type_: str) -> None:
    model = tiny_model(type_)
    work = block_work(find_stack(model))
    for k in (0, 3):
        assert counted(model, k) == TOKENS * (2 * work[k].active + 4 * work[k].query * TOKENS)
        assert work[k].parameters == sum(p.numel() for p in find_stack(model)[k].parameters())


@pytest.mark.parametrize("type_", ["mixtral", "qwen2_moe", "olmoe"])
def test_of_a_mixture_only_the_chosen_experts_are_run(type_: str) -> None:
    model = tiny_model(type_)
    work = block_work(find_stack(model))[2]
    assert work.active < sum(p.numel() for p in find_stack(model)[2].parameters() if p.ndim > 1)
    assert counted(model, 2) == pytest.approx(TOKENS * (2 * work.active + 4 * work.query * TOKENS), rel=0.02)


def test_experts_without_a_number_of_chosen_ones_are_refused() -> None:
    model = tiny_model("mixtral")
    object.__setattr__(model.config, "num_experts_per_tok", None)
    with pytest.raises(StreamlineError, match=r"4 experts.*num_experts_per_tok.*Set it"):
        block_work(find_stack(model))


def test_a_block_without_attention_has_no_query() -> None:
    assert {work.query for work in block_work(find_stack(tiny_model("mamba")))} == {0}


def test_a_model_of_70_billion_is_computed_by_hand() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        stack = find_stack(MODELS["Llama-3-70B"]())
    config = configured(sequence_length=2, calibration_tokens=1_000_000, validation_tokens=2, test_tokens=2)
    found, _ = blockwise_work(stack, config, 20, itemsize=2)
    matrices = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672  # of a block
    weights = matrices + 2 * 8192
    stages = {stage.name: stage for stage in found}
    assert sum(p.numel() for p in stack.model.parameters()) == 80 * weights + 8192 + 2 * 128256 * 8192 == 70_553_706_496
    assert stages["rank"].products == 1e6 * 80 * (2 * matrices + 4 * 8192 * 1.5)
    assert stages["rank"].float64 == 2 * 1e6 * 81**2 * 8192
    assert stages["rank"].states == stages["rank"].written == 81 * 1e6 * 8192 * 2
    assert stages["rank"].read == 80 * weights * 2 + stages["rank"].states
    assert stages["check"].read == 80 * weights * 2
    assert stages["save"].written == 2 * (70_553_706_496 - 20 * weights)
    assert stages["verify"].eigen == 8 * 2 * 10 * 8192**3
    one = Rates(products=4e14, float64=2.7e13, eigen=3e11, read=3e9, write=2e9)
    alone = sum(s.read / one.read + s.written / one.write + s.eigen / one.eigen for s in found)
    times = [sum(stage.seconds(one._replace(processes=count)) for stage in found) for count in (1, 8)]
    assert times[1] - alone == pytest.approx((times[0] - alone) / 8)


def test_memory_holds_states_that_would_be_in_files() -> None:
    stack = find_stack(tiny_model("llama"))
    (files, resident), (held, more) = (blockwise_work(stack, SMALL, 2, memory=memory) for memory in (0, 2**30))
    assert all(stage.written == 0 for stage in held if stage.name != "save")
    assert more - resident == max(stage.states for stage in files) == max(stage.states for stage in held)
    assert sum(s.read for s in files) > sum(s.read for s in held)


def test_more_of_anything_takes_longer() -> None:
    stack, rates = find_stack(tiny_model("llama")), Rates(1e9, 1e8, 1e8, 1e7, 1e6)

    def seconds(config: CompressionConfig) -> float:
        return sum(stage.seconds(rates) for stage in blockwise_work(stack, config, 2)[0])

    for more in ({"calibration_tokens": 2000}, {"validation_tokens": 200}, {"test_tokens": 100}, {"shortlist": 6}):
        assert seconds(configured(SMALL, **more)) > seconds(SMALL), more


def test_searches_and_kinds_that_run_the_whole_model_read_it_more_often() -> None:
    stack = find_stack(tiny_model("llama"))

    def reads(**options: Any) -> dict[str, float]:
        config = configured(SMALL, **options)
        return {stage.name: stage.read for stage in blockwise_work(stack, config, 2, memory=2**30)[0]}

    plain, blocks = reads(), reads()["check"]
    for options, further in (
        ({"repair": "folded"}, {"verify": 3 * SMALL.search.shortlist, "choose": 2, "measure": 6, "save": 2}),
        ({"repair": "scale"}, {"verify": 5 * SMALL.search.shortlist, "choose": 4, "measure": 10, "save": 4}),
        ({"search": "greedy", "shortlist": 1}, {"rank": 2}),
        ({"search": "attention", "shortlist": 3}, {"rank": 2, "verify": 3, "measure": 2}),
    ):
        found = {name: round((read - plain[name]) / blocks) for name, read in reads(**options).items()}
        assert {name: found[name] for name in further} == further, options
    width, (_, resident) = stack.config.hidden_size, blockwise_work(stack, SMALL, 2)
    for options, maps in (({"repair": "folded"}, 3), ({"repair": "scale"}, 0), ({"search": "mlp", "shortlist": 3}, 5)):
        assert blockwise_work(stack, configured(SMALL, **options), 2)[1] - resident == maps * 8 * width**2


def test_an_untied_head_is_read_when_it_is_needed() -> None:
    tied, untied = tiny_model("gpt2"), tiny_model("llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    for model, own in ((tied, 0), (untied, untied.lm_head.weight.numel() * 4)):
        stages = {stage.name: stage for stage in blockwise_work(find_stack(model), SMALL, 2, memory=2**30)[0]}
        assert stages["measure"].read - stages["check"].read == own


def test_peaks_hold_what_a_stage_keeps() -> None:
    stack = find_stack(tiny_model("llama"))
    n, width, vocabulary = len(stack), 32, stack.model.lm_head.out_features

    def peaks(**more: int) -> dict[str, int]:
        return compression_bytes(stack, **{"batch": 64, "text": 1000, **more})

    assert peaks()["rank"] >= (n + 1) * 64 * width * 4
    assert peaks()["verify"] >= 3 * 64 * vocabulary * 4
    large = peaks(batch=2**22)  # logits of 1 GB
    assert large["verify"] - 2**22 * width * 4 == 4 * 2**26 and large["evaluate"] - 2**22 * width * 4 == 2 * 2**29
    assert peaks(windows=3)["fit"] == 3 * peaks()["fit"] and peaks()["fit"] >= 2 * 8 * width**2
    assert peaks(trained=1000)["train"] - peaks()["train"] == 16_000
    assert peaks(text=2000)["train"] - peaks()["train"] == 1000 * 2 * width * 4
    assert peaks(text=2000, hardware=HardwareConfig(state_memory=0))["train"] == peaks(text=0)["train"]

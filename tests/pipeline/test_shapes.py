"""Cost of a compression from the shape of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import (
    CompressionConfig,
    DataConfig,
    DistillationConfig,
    HealingConfig,
    StreamlineError,
    Target,
)
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import DeviceRates, ModelShape, blockwise_work, estimate_from_shape
from streamline_hooks.pipeline.cost import block_work
from streamline_hooks.testing import tiny_model

SHAPE = ModelShape(hidden_size=64, layers=8, intermediate_size=96, heads=4, kv_heads=2, vocab_size=128)


def test_the_weights_are_those_of_a_model_of_the_shape() -> None:
    stack = SHAPE.stack()
    assert len(stack) == 8 and {p.device.type for p in stack.model.parameters()} == {"meta"}
    attention, mlp = (64 * 64 + 2 * 64 * 32 + 64 * 64), 3 * 64 * 96
    parameters = 8 * (attention + mlp + 2 * 64) + 2 * 128 * 64 + 64
    assert estimate_from_shape(SHAPE).weights == 2 * parameters
    assert ModelShape(hidden_size=256, layers=2, vocab_size=10).stack().config.num_attention_heads == 2


def test_matrices_of_blocks_take_4_bit_and_a_scale_for_each_64_weights() -> None:
    shape = ModelShape(64, 4, intermediate_size=128, heads=4, vocab_size=100, weight_dtype="4bit")
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    others = 2 * 100 * 64 + 4 * 2 * 64 + 64  # embedding, LM head and norms
    assert shape.weight_bytes(shape.stack()) == matrices // 2 + 4 * matrices // 64 + 2 * others
    assert estimate_from_shape(shape).peak == estimate_from_shape(replace(shape, weight_dtype="bfloat16")).peak


def test_the_stages_are_those_of_the_model_itself() -> None:
    model = tiny_model("llama")
    config = CompressionConfig(remove=2, data=DataConfig(16, 320, validation_tokens=64, test_tokens=64))
    stack = find_stack(model)
    text = stack.config
    shape = ModelShape(
        text.hidden_size, len(stack), text.intermediate_size, text.num_attention_heads, text.num_key_value_heads,
        text.vocab_size, "float32",
    )  # fmt: skip
    expected, _ = blockwise_work(stack, config, 2, memory=2**62)
    found = estimate_from_shape(shape, config=config)
    assert [stage.products for stage in found.stages] == [stage.products for stage in expected]
    assert found.weights == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_an_architecture_is_that_of_the_config_without_its_weights(family: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    config = CompressionConfig(remove=2, data=DataConfig(16, 320, validation_tokens=64, test_tokens=64))
    stack = find_stack(model)
    expected, _ = blockwise_work(stack, config, 2, memory=2**62)
    for name in (tmp_path, tmp_path / "config.json"):
        found = estimate_from_shape(ModelShape(architecture=str(name), weight_dtype="float32"), config=config)
        assert [stage.products for stage in found.stages] == [stage.products for stage in expected]
        assert found.weights == sum(p.numel() * 4 for p in model.parameters())
        assert f"{type(model).__name__} with {len(stack)} blocks" in found.table()


def test_an_architecture_is_refused_with_a_shape_or_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="hidden_size and layers was given with architecture"):
        ModelShape(hidden_size=64, layers=4, architecture=str(tmp_path))
    with pytest.raises(StreamlineError, match="cannot be built.*folder with config.json"):
        ModelShape(architecture=str(tmp_path)).stack()


def test_training_with_healing_runs_all_kept_blocks_from_the_first_healed_one_on() -> None:
    def training(healing: HealingConfig | None) -> float:
        config = CompressionConfig(remove=2, distillation=DistillationConfig(), healing=healing)
        return next(s.products for s in estimate_from_shape(SHAPE, config=config).stages if s.name == "train")

    every, after, none = training(HealingConfig("lora")), training(HealingConfig("lora", "after")), training(None)
    assert after == none
    # With all blocks healed the student runs three more blocks, forward and backward, and in validations.
    data = CompressionConfig().data
    tokens = 3 * data.calibration_tokens + DistillationConfig().validations * data.validation_tokens
    block = block_work(SHAPE.stack())[0].flops(data.sequence_length)
    assert every - none == pytest.approx(3 * tokens * block)


def test_training_runs_the_teacher_once_and_the_student_forward_and_backward() -> None:
    def training(**more: float) -> float:
        config = CompressionConfig(
            remove=2,
            data=DataConfig(32, 10_000, validation_tokens=32),
            distillation=DistillationConfig(validations=1, **more),  # type: ignore[arg-type]
        )
        stages = {stage.name: stage for stage in estimate_from_shape(SHAPE, config=config).stages}
        return float(stages["train"].products)

    assert "train" not in {stage.name for stage in estimate_from_shape(SHAPE).stages}
    once, twice = training(), training(epochs=2)
    short = CompressionConfig(data=DataConfig(32))
    head, block = 2 * 128 * 64, estimate_from_shape(SHAPE, config=short).stages[0].products / 32 / 8  # of 32 tokens
    after = 3 * block
    assert twice - once == pytest.approx(10_000 * 3 * (after + head), rel=0.05)
    assert once == pytest.approx(10_000 * (8 * block + head) + 10_000 * 3 * (after + head), rel=0.05)


def test_rates() -> None:
    slow, fast = (estimate_from_shape(SHAPE, DeviceRates(rate, rate / 10)).seconds for rate in (1e9, 2e9))
    assert slow == pytest.approx(2 * fast)
    assert DeviceRates(flops=15.0).rates().float64 == 1.0
    assert DeviceRates(flops=15.0, flops_float64=5.0).rates().float64 == 5.0
    assert estimate_from_shape(SHAPE).report()["seconds"] == estimate_from_shape(SHAPE).seconds


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(StreamlineError, match=r"latency:0.8 must be measured on a model.*Change remove"):
        estimate_from_shape(SHAPE, config=CompressionConfig(remove=Target(latency=0.8)))
    with pytest.raises(StreamlineError, match="heads to divide hidden_size"):
        estimate_from_shape(ModelShape(hidden_size=64, heads=3))
    with pytest.raises(StreamlineError, match="layers=1"):
        ModelShape(layers=1)

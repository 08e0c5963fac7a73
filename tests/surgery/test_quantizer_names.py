"""What a quantizer's settings say of a block follows it to its new number."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.surgery.special_weights import QuantizerSettings
from tests.other_models import whisper
from tests.tiny_models import BLOCKS, tiny_model

NAMED = ["lm_head", "model.layers.0.mlp", "layers.2.self_attn.q_proj", "model.layers.4.mlp", f"layers.{BLOCKS - 1}"]


def said_by_a_dict(**values: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", **values}


def said_by_an_object(**values: Any) -> Any:
    settings = transformers.FbgemmFp8Config()
    vars(settings).update(values)
    return settings


@pytest.mark.parametrize("settings", [said_by_a_dict, said_by_an_object])
def test_names_follow_their_blocks_and_come_back(settings: Any) -> None:
    model = tiny_model("llama")
    held = model.config.quantization_config = settings(modules_to_not_convert=list(NAMED))
    before = copy.deepcopy(held if isinstance(held, dict) else vars(held))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        now = model.config.quantization_config
        values = now if isinstance(now, dict) else vars(now)
        assert values["modules_to_not_convert"] == [
            "lm_head",
            "model.layers.0.mlp",
            "model.layers.2.mlp",
            f"layers.{BLOCKS - 3}",
        ]
        assert {**values, "modules_to_not_convert": NAMED} == before and type(now) is type(held)
    assert model.config.quantization_config is held
    assert (held if isinstance(held, dict) else vars(held)) == before


def test_a_committed_checkpoint_names_the_blocks_that_it_has(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = said_by_a_dict(modules_to_not_convert=list(NAMED))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    model.config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert kept == ["lm_head", "model.layers.0.mlp", "model.layers.2.mlp", f"layers.{BLOCKS - 3}"]


def test_settings_by_name_follow_wherever_they_stand() -> None:
    model = tiny_model("llama")
    by_name = {"model.layers.3.mlp": {"bits": 8}, "model.layers.1.mlp": {"bits": 4}}
    model.config.quantization_config = said_by_a_dict(
        rules={"dynamic": by_name}, groups=[{"targets": ("layers.3.mlp", "Linear")}], ignore={"layers.1.mlp"}
    )
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        assert model.config.quantization_config == said_by_a_dict(
            rules={"dynamic": {"model.layers.2.mlp": {"bits": 8}}},
            groups=[{"targets": ("layers.2.mlp", "Linear")}],
            ignore=set(),
        )


def test_a_copy_is_named_beside_its_block() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = said_by_a_dict(ignore=["layers.1.mlp", "layers.2"])
    names = QuantizerSettings(find_stack(model))
    ((config, value),) = names.renumbered([0, 1, 1, None, 2])
    assert config is model.config and value["ignore"] == ["layers.1.mlp", "layers.2.mlp", "layers.4"]


def test_what_names_no_block_of_the_stack_stays() -> None:
    model = tiny_model("llama")
    held = said_by_a_dict(
        ignore=["tower.layers.3", f"model.layers.{BLOCKS}", "layers", "layers.x", "mlp", r"layers\.(\d"]
    )
    model.config.quantization_config = held
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        assert model.config.quantization_config is held


@pytest.mark.parametrize(
    ("pattern", "first"),
    [(r"re:.*layers\.[0-2]\..*", 3), (r"model\.layers\.(0|1)\.mlp", 2), (r".*\.0\.mlp", 1), ("2.mlp", 3)],
)
def test_a_pattern_of_numbers_is_refused_where_it_would_mean_others(pattern: str, first: int) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = said_by_a_dict(modules_to_not_convert=["lm_head", pattern])
    with LayerSurgeon(model) as surgeon:
        (hazard,) = surgeon.check([first - 1])
        assert hazard.cause == "quantized-by-index"
        with pytest.raises(UnsupportedSurgery) as refused:
            surgeon.remove([first - 1])
        assert f"modules_to_not_convert: {pattern}" in str(refused.value)
        assert "list the full names of the modules" in str(refused.value)
        surgeon.remove([first])  # from here on it means none


@pytest.mark.parametrize("pattern", ["mlp", r"re:.*layers\.\d+\.mlp", ".*down_proj", r"model\.layers\..*q_proj"])
def test_a_pattern_that_means_all_blocks_alike_goes_on_meaning_them(pattern: str) -> None:
    model = tiny_model("llama")
    held = model.config.quantization_config = said_by_a_dict(modules_to_not_convert=[pattern])
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        assert model.config.quantization_config is held


def test_a_short_name_that_two_stacks_have_is_refused() -> None:
    model: Any = whisper()
    model.config.quantization_config = said_by_a_dict(modules_to_not_convert=["layers.1.fc1"])
    stack = find_stack(model, "model.decoder.layers")
    assert QuantizerSettings(stack).pattern(0) == "modules_to_not_convert: layers.1.fc1"
    model.config.quantization_config = said_by_a_dict(
        modules_to_not_convert=["model.encoder.layers.1.fc1", "decoder.layers.1.fc1", "decoder.layers.2.fc1"]
    )
    ((_, value),) = QuantizerSettings(stack).renumbered([0, 2, 3])
    assert value["modules_to_not_convert"] == ["model.encoder.layers.1.fc1", "decoder.layers.1.fc1"]

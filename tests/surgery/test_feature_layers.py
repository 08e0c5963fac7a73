"""Removals in a vision tower of which the model around it works with inner hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack, load, save
from streamline_hooks.surgery.bypass import bypassing
from streamline_hooks.testing.model_state import ModelState
from tests.other_models import OTHERS, PICTURE, TEXT, pictures

BLOCKS = 5


def llava(feature_layer: int | list[int]) -> Any:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**{**PICTURE, "num_hidden_layers": BLOCKS})
    text = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 2}, num_key_value_heads=4)
    given = {"image_token_index": 63, "vision_feature_layer": feature_layer}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, **given)
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**OTHERS["llava pictures"].batch).logits
    return logits


def deleted(model: Any, k: int) -> torch.Tensor:
    """What the model gives with the block deleted by hand."""
    model = copy.deepcopy(model)
    stack = find_stack(model, "vision")
    del stack.container[k]
    stack.config.num_hidden_layers -= 1
    return answer(model)


EXACT: list[tuple[int | list[int], int]] = [
    (-2, BLOCKS - 2), (-2, 0), (-2, 2), (-1, BLOCKS - 1), ([-2], BLOCKS - 2), ([-1, -2], 0), ([-2, -3], 1),
    (2, 3), (2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("feature_layer", "k"), EXACT)
def test_a_removal_equals_the_deleted_and_the_bypassed_block(feature_layer: int | list[int], k: int) -> None:
    model = llava(feature_layer)
    answer(model)  # Transformers installs its capture hooks now, before any other hook
    with bypassing(model, range(k, k + 1), stack="vision"):
        expected = answer(model)
    torch.testing.assert_close(deleted(model, k), expected)
    with LayerSurgeon(model, "vision") as surgeon:
        surgeon.remove([k])
        torch.testing.assert_close(answer(model), expected)


REFUSED: list[tuple[int | list[int], int]] = [
    (2, 0), (2, 1), (BLOCKS, 0), (-2, BLOCKS - 1), ([-1, -3], BLOCKS - 1), ([1, 3], 2),
]  # fmt: skip


@pytest.mark.parametrize(("feature_layer", "k"), REFUSED)
def test_a_feature_layer_that_would_be_another_is_refused(feature_layer: int | list[int], k: int) -> None:
    """By an absolute number behind the block, or because the block is not among those whose states are used."""
    model = llava(feature_layer)
    before = ModelState(model)
    with LayerSurgeon(model, "vision") as surgeon, pytest.raises(UnsupportedSurgery, match=f"Block {k} of"):
        surgeon.remove([k])
    assert before.changes() == []


@pytest.mark.parametrize(("k", "left"), [(0, [1, 4]), (1, [1, 4]), (3, [2, 4]), (4, [2, 4])])
def test_a_backbone_gives_the_states_behind_the_same_blocks(k: int, left: list[int]) -> None:
    """Or behind the last one that is left before them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "image_size": 16}
    config = transformers.Dinov2Config(**sizes, patch_size=8, out_indices=[2, BLOCKS])
    model: Any = transformers.Dinov2Backbone(config).eval()

    @torch.no_grad()
    def states() -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = model(pictures()["pixel_values"]).feature_maps
        return found

    with bypassing(model, range(k, k + 1)):
        expected = states()
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.remove([k])
        assert model.config.out_indices == left
        torch.testing.assert_close(states(), expected)


def qwen_tower() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1}
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    config = modeling.Qwen3VLVisionConfig(
        **sizes, depth=6, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[1, 3]
    )
    grid = torch.tensor([[1, 4, 4]])
    return modeling.Qwen3VLVisionModel(config), {"hidden_states": torch.randn(16, 3 * 4 * 4), "grid_thw": grid}


def depth_model() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    necks = {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16, "is_hybrid": False}
    config = transformers.DPTConfig(**sizes, **necks, num_hidden_layers=8, backbone_out_indices=[0, 2, 4, 6])
    return transformers.DPTForDepthEstimation(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


@pytest.mark.parametrize(
    ("build", "k", "left"),
    [
        (qwen_tower, 0, [0, 2]), (qwen_tower, 1, [0, 2]), (qwen_tower, 2, [1, 2]), (qwen_tower, 3, [1, 2]),
        (qwen_tower, 5, [1, 3]), (depth_model, 1, [0, 1, 3, 5]), (depth_model, 4, [0, 2, 3, 5]),
        (depth_model, 7, [0, 2, 4, 6]),
    ],
)  # fmt: skip
def test_states_inside_a_tower_are_read_after_the_same_blocks(
    build: Callable[[], tuple[Any, dict[str, torch.Tensor]]], k: int, left: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that each block changes the state clearly
    model.eval()

    @torch.no_grad()
    def states(model: Any) -> tuple[torch.Tensor, ...]:
        output = model(**batch)
        return tuple(getattr(output, "deepstack_features", None) or [output.predicted_depth])

    before = states(model)
    with bypassing(model, range(k, k + 1)):
        expected = states(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([k])
        torch.testing.assert_close(states(model), expected)
    torch.testing.assert_close(states(model), before)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([k])
        surgeon.commit()
    loaded = load(save(model, tmp_path / "tower"))
    assert left in (getattr(loaded.config, name, None) for name in ("deepstack_visual_indexes", "backbone_out_indices"))
    for shorter in (model, loaded):
        torch.testing.assert_close(states(shorter), expected)


@pytest.mark.parametrize(("build", "window"), [(qwen_tower, [2, 3]), (qwen_tower, [0, 1]), (depth_model, [0])])
def test_states_inside_a_tower_that_would_coincide_are_refused(build: Callable[[], Any], window: list[int]) -> None:
    model, _ = build()
    before = ModelState(model.eval())
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match="no block would remain"):
        surgeon.remove(window)
    assert before.changes() == []

"""Hierarchical models: a stage is a stack, and only its own number changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, UnsupportedSurgery, find_stack, load, profile, save
from streamline_hooks.modeling import find_stacks
from streamline_hooks.replacements import LinearReplacement

STAGE = "encoder.layers.1.blocks"


@pytest.fixture
def swin() -> Any:
    torch.manual_seed(0)
    sizes = {"depths": [2, 6], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4}
    model = transformers.SwinModel(transformers.SwinConfig(image_size=64, patch_size=4, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))}


def answer(model: Any, pictures: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**pictures).last_hidden_state


def test_each_stage_is_a_stack(swin: Any) -> None:
    found = find_stacks(swin)
    assert [stack.path for stack in found] == ["encoder.layers.0.blocks", STAGE]
    assert [(stack.count_attribute, stack.stage, len(stack)) for stack in found] == [("depths", 0, 2), ("depths", 1, 6)]
    assert str(found[1]).endswith("described by SwinConfig.depths[1]")
    assert find_stack(swin).path == STAGE


def test_its_blocks_are_profiled(swin: Any, pictures: dict[str, torch.Tensor]) -> None:
    measured = profile(swin, [pictures], stack=STAGE)
    with torch.no_grad(), HiddenStateRecorder(swin, stack=STAGE) as record:
        record(**pictures)
    assert (measured.length, measured.tokens) == (6, 2 * 64)
    x, y = record.inputs[2][0], record.outputs[3][0]
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean()
    assert measured.value("cosine", range(2, 4)) == pytest.approx(float(cosine), rel=1e-5)


def test_a_pair_goes_and_comes_back(swin: Any, pictures: dict[str, torch.Tensor]) -> None:
    before = answer(swin, pictures)
    with LayerSurgeon(swin, STAGE) as surgeon:
        surgeon.remove([2, 3])
        assert swin.config.depths == [2, 4] and swin.config.num_heads == [2, 4]
        assert not torch.allclose(answer(swin, pictures), before, atol=1e-3)
    assert torch.equal(answer(swin, pictures), before) and swin.config.depths == [2, 6]


@pytest.mark.parametrize("repaired", [False, True])
def test_a_stage_is_saved_and_loaded(
    repaired: bool, swin: Any, pictures: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with LayerSurgeon(swin, STAGE) as surgeon:
        if repaired:
            map_ = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
            surgeon.replace([2, 3], LinearReplacement.from_map(map_))
        else:
            surgeon.remove([2, 3])
        surgeon.commit()
    expected = answer(swin, pictures)
    save(swin, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.config.depths == [2, 4]
    torch.testing.assert_close(answer(loaded, pictures), expected, rtol=1e-6, atol=1e-6)


def test_the_first_pair_goes_though_its_first_block_has_no_stochastic_depth(
    pictures: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sizes = {"depths": [4, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4}
    model = transformers.SwinModel(transformers.SwinConfig(image_size=64, patch_size=4, **sizes)).eval()
    with LayerSurgeon(model, "encoder.layers.0.blocks") as surgeon:
        surgeon.remove([0, 1])
        surgeon.commit()
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved").eval()
    assert loaded.config.depths == [2, 2]
    assert torch.equal(answer(loaded, pictures), answer(model, pictures))


def test_an_odd_number_would_shift_windows_otherwise_when_it_is_loaded(swin: Any) -> None:
    """Every second block of Swin shifts its windows, which the class decides by the block's number."""
    with LayerSurgeon(swin, STAGE) as surgeon:
        surgeon.remove([2])
        with pytest.raises(UnsupportedSurgery, match=r"Block 2.*shift_size.*2 and.*0"):
            surgeon.commit()

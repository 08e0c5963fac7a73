"""What models without text are held against: surgery on them is checked on images, sounds and pairs too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.surgery.probe import given_to_probe, observe
from tests.test_watched_mask import PICTURE, SHAPE, bart, bert, clip, t5


@pytest.fixture(autouse=True)
def every_warning_is_an_error() -> Iterator[None]:
    """Where a removal is not held against anything, a warning says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held against")
        yield


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE, num_labels=5))


def dinov2() -> nn.Module:
    sizes = {name: value for name, value in PICTURE.items() if name != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def whisper() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 3), ("ffn_dim", 64))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 24}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(d_model=32, vocab_size=64, **sides, **heads, **sizes, **ids)
    )


def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SHAPE, conv_dim=(32,) * 7))


CASES = {
    "bert": (bert, "encoder.layer", {"input_ids"}),
    "t5 encoder": (t5, "encoder.block", {"input_ids", "decoder_input_ids"}),
    "t5 decoder": (t5, "decoder.block", {"input_ids", "decoder_input_ids"}),
    "bart decoder": (bart, "model.decoder.layers", {"input_ids", "decoder_input_ids"}),
    "vit": (vit, "vit.layers", {"pixel_values"}),
    "dinov2": (dinov2, "encoder.layer", {"pixel_values"}),
    "clip text": (clip, "text_model.encoder.layers", {"input_ids", "pixel_values"}),
    "clip pictures": (clip, "vision_model.encoder.layers", {"input_ids", "pixel_values"}),
    "whisper encoder": (whisper, "model.encoder.layers", {"input_features", "decoder_input_ids"}),
    "whisper decoder": (whisper, "model.decoder.layers", {"input_features", "decoder_input_ids"}),
    "wav2vec2": (wav2vec2, "encoder.layers", {"input_values"}),
}


def made(case: str) -> tuple[Any, str]:
    make, path, _ = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    path = find_stack(model).path if case == "vit" else path
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model, path


@pytest.mark.parametrize("case", CASES)
def test_a_removal_is_held_against_the_bypassed_blocks(case: str) -> None:
    model, path = made(case)
    assert set(given_to_probe(model)) == CASES[case][2]
    truth = observe(find_stack(model, path), range(1, 2))
    assert truth is not None
    assert truth.cached == ("decoder_input_ids" in truth.given), "a decoder has a cache, and nothing else here has"
    with LayerSurgeon(model, path) as surgeon:
        surgeon.remove([1])


@pytest.mark.parametrize("case", CASES)
def test_a_block_that_does_more_without_another_is_seen(case: str) -> None:
    """A planted fault: the last block adds something once it has another number of blocks before it."""
    model, path = made(case)
    stack = find_stack(model, path)
    forward = stack[2].forward

    def faulty(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        shorter = len(list(stack.container.children())) < 3
        return write_output(output, read_output(output) + torch.arange(32).sin()) if shorter else output

    stack[2].forward = faulty
    with LayerSurgeon(model, path) as surgeon, pytest.raises(UnsupportedSurgery, match="other logits than with them"):
        surgeon.remove([1])

"""What models without text are held against: surgery on them is checked on images, sounds and pairs too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import candidate_inputs, choose_probe_inputs, find_stacks, read_output, write_output
from streamline_hooks.surgery.probe import run_reference
from tests.other_models import OTHERS, PICTURE, made

# Transformers 4 gives Qwen2-VL's tokens their positions anew at each step, unless it is told where they are.
# A T5 encoder cannot become shorter than its decoder before Transformers 5.
REMOVABLE = [name for name in OTHERS if name != "t5 encoder" or transformers.__version__ >= "5"]
DECODERS = ("llava text", "gemma3 text", *(["qwen2-vl text"] if transformers.__version__ >= "5" else []))


@pytest.fixture(autouse=True)
def every_warning_is_an_error() -> Iterator[None]:
    """A removal that is not compared with a reference warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compared with")
        yield


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", REMOVABLE)
def test_a_removal_is_held_against_the_bypassed_blocks(name: str) -> None:
    model, case = made(name), OTHERS[name]
    stack = find_stack(model, case.path(model))
    assert set(choose_probe_inputs(model, stack[1])) == set(case.given)
    reference = run_reference(stack, range(1, 2))
    assert reference is not None
    decodes = "decoder_input_ids" in reference.inputs or name in DECODERS
    assert reference.cached == decodes, "a decoder has a cache, and nothing else here has"
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", REMOVABLE)
def test_a_block_that_does_more_without_another_is_seen(name: str) -> None:
    """A planted fault: the last block adds something once it has another number of blocks before it."""
    model, case = made(name), OTHERS[name]
    stack = find_stack(model, case.path(model))
    forward, length = stack[2].forward, len(stack)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if len(list(stack.container.children())) == length:
            return output
        return write_output(output, read_output(output) + torch.arange(32).sin())

    stack[2].forward = faulty
    with (
        LayerSurgeon(model, case.path(model)) as surgeon,
        pytest.raises(UnsupportedSurgery, match="other logits"),
    ):
        surgeon.remove([1])


def test_patches_come_with_their_grid_and_their_places() -> None:
    """Wider than a window, so that a block which attends to all of an image differs from one that does not."""
    model = made("qwen2.5-vl pictures")
    takes = {"input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    *_, given = candidate_inputs(model, takes)
    assert given["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6]]
    assert given["pixel_values"].shape == (2 * 24, 3 * 2 * 2 * 2)
    assert torch.equal(given["mm_token_type_ids"], (given["input_ids"] == 63).long())
    assert given["mm_token_type_ids"].sum(dim=1).tolist() == [6, 6]


def test_images_have_three_channels_where_a_configuration_does_not_say() -> None:
    """BLIP-2's names none, and its patches are made of three."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.Blip2VisionConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.Blip2VisionModel(config).eval()
    assert not hasattr(config, "num_channels")
    (given,) = candidate_inputs(model, {"pixel_values"})
    assert given["pixel_values"].shape == (2, 3, 16, 16)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])  # otherwise it warns that it is not compared with a reference


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_text_that_is_written_of_an_image(side: str) -> None:
    """TrOCR and Donut: the tower's configuration is that of an encoder."""
    text = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 64, "eos_token_id": 2}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**PICTURE), transformers.GPT2Config(**text, add_cross_attention=True)
    )
    model: Any = transformers.VisionEncoderDecoderModel(config=config).eval()
    stack = find_stack(model, next(s.path for s in find_stacks(model) if s.path.startswith(side)))
    truth = run_reference(stack, range(1, 2))
    assert truth is not None and set(truth.inputs) == {"pixel_values", "decoder_input_ids"} and truth.cached
    with LayerSurgeon(model, stack.path) as surgeon:
        surgeon.remove([1])


def test_what_a_forward_keeps_on_the_model_is_as_it_was() -> None:
    """Qwen2-VL keeps by how much the images of its last call shift positions, and uses that when it decodes."""
    model, case = made("qwen2-vl pictures"), OTHERS["qwen2-vl pictures"]
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        surgeon.zero_branch(2, "mlp")
        assert model.model.rope_deltas is None
    model(**case.batch)
    before = model.model.rope_deltas
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
    assert before is not None and model.model.rope_deltas is before

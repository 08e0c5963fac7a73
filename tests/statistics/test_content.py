"""A sequence is all that a model is given of it: told apart by it, and the same in whatever batch it comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import StreamlineError, find_stack, profile
from streamline_hooks.statistics.bootstrap import sequence_contents
from tests import other_models
from tests.tiny_models import padded, tiny_model


def contents(model: nn.Module, batch: dict[str, Tensor], stack: str | None = None) -> list[bytes]:
    """Of a text's stack: its real tokens are those of the mask."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return sequence_contents(find_stack(model, stack), batch, real)


def row(batch: dict[str, Tensor], k: int, **others: Any) -> dict[str, Tensor]:
    """One text of a batch without its padding, with its own pictures."""
    kept = batch["attention_mask"][k].bool()
    text = {name: value[k : k + 1, kept] for name, value in batch.items() if value.shape == batch["input_ids"].shape}
    return {**text, **{name: value for name, value in others.items() if value is not None}}


def test_a_text_alone_is_its_tokens_whatever_stands_beside() -> None:
    model, batch = tiny_model("llama"), padded([5, 3], "left")
    ids = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    expected = [one.numpy().tobytes() for one in ids]
    beside = {"labels": batch["input_ids"], "cache_position": torch.arange(2), "position_ids": torch.zeros(2, 8).long()}
    assert contents(model, batch) == contents(model, {**batch, **beside}) == expected
    assert contents(model, padded([5, 3], "right")) == expected


def test_pictures_tell_apart_what_is_asked_of_them() -> None:
    model = other_models.made("llava text")
    seen = other_models.SEEN
    batch = {name: seen[name][:1].repeat(6, 1) for name in ("input_ids", "attention_mask")}
    batch["pixel_values"] = torch.randn(6, *seen["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(0))
    tower = other_models.OTHERS["llava pictures"].path(model)
    for stack in (None, tower):
        low, high = profile(model, [batch], stack=stack).interval("cosine", range(0, 2))
        assert high - low > 1e-3
    batch["pixel_values"][1] = batch["pixel_values"][0]
    assert len(set(contents(model, batch))) == 5
    batch["input_ids"][1, 0] += 1
    assert len(set(contents(model, batch))) == 6
    patches = torch.ones(6, 5, dtype=torch.bool)
    found = sequence_contents(find_stack(model, tower), batch, patches)  # which sees no question
    assert len(set(found)) == 5 and found == [picture.numpy().tobytes() for picture in batch["pixel_values"]]


def test_patches_of_all_pictures_in_one_row_go_to_their_texts() -> None:
    model, batch = other_models.made("qwen2-vl text"), other_models.PATCHED
    patches, grid = batch["pixel_values"], batch["image_grid_thw"]
    parts = [row(batch, k, pixel_values=patches[16 * k :][:16], image_grid_thw=grid[k : k + 1]) for k in range(2)]
    assert contents(model, batch) == [contents(model, part)[0] for part in parts]
    other = {**batch, "pixel_values": patches.flip(0)}
    assert not set(contents(model, batch)) & set(contents(model, other))
    whole, alone = profile(model, [batch]), profile(model, parts)
    torch.testing.assert_close(whole.replicates("cosine"), alone.replicates("cosine"), rtol=1e-5, atol=1e-6)
    tower = other_models.OTHERS["qwen2-vl pictures"].path(model)
    assert profile(model, [batch], stack=tower).sequences == 1  # all patches are one row of states


def test_several_pictures_a_text_and_none() -> None:
    model, mask = other_models.made("llava text"), torch.ones(3, 10).long()
    ids = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    ids[0, :8] = ids[2, 1:5] = 63  # four places a picture
    pictures = other_models.pictures(3)["pixel_values"]
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}
    parts = [row(batch, k, pixel_values=own) for k, own in enumerate((pictures[:2], None, pictures[2:]))]
    assert contents(model, batch) == [contents(model, part)[0] for part in parts]
    with pytest.raises(
        StreamlineError,
        match=r"pixel_values.*\(5, 3, 16, 16\).*3 seq.*batches of one sequence.*replicates=0",
    ):
        contents(model, {**batch, "pixel_values": torch.cat([pictures, pictures[:2]])})


def test_a_decoder_is_given_a_source_and_a_target() -> None:
    model = other_models.made("t5 decoder")
    encoder, decoder = (other_models.OTHERS[f"t5 {side}"].path(model) for side in ("encoder", "decoder"))
    batch = {**other_models.LONG, **other_models.padded([9, 4], 9, "decoder_", seed=1)}
    part = {name: value[1:, : 4 if "decoder" in name else 5] for name, value in batch.items()}

    def read(side: str, given: dict[str, Tensor]) -> list[bytes]:
        mask = given["decoder_attention_mask" if side == decoder else "attention_mask"]
        return sequence_contents(find_stack(model, side), given, mask.bool())

    for changed, told in (("decoder_input_ids", [decoder]), ("input_ids", [encoder, decoder])):
        other = {**batch, changed: batch[changed].roll(1, dims=1)}
        assert [side for side in (encoder, decoder) if read(side, other)[0] != read(side, batch)[0]] == told
    for side in (encoder, decoder):
        assert read(side, batch)[1:] == read(side, part)
    derived = {**other_models.LONG, "labels": batch["decoder_input_ids"]}
    changed = {**derived, "labels": derived["labels"].roll(1, dims=1)}
    real = torch.ones(2, 9, dtype=torch.bool)
    assert contents(model, derived, encoder) == contents(model, changed, encoder)
    found = [sequence_contents(find_stack(model, decoder), one, real) for one in (derived, changed)]
    assert found[0] != found[1]


def test_sound_is_told_apart_without_its_padding() -> None:
    model = other_models.made("wav2vec2")
    waves, mask = other_models.WAVES["input_values"].clone(), torch.ones(2, 4000).long()
    mask[1, 3000:] = 0
    batch, real = {"input_values": waves, "attention_mask": mask}, torch.ones(2, 12, dtype=torch.bool)
    alone = {"input_values": waves[1:, :3000], "attention_mask": mask[1:, :3000]}
    assert sequence_contents(find_stack(model), batch, real)[1:] == sequence_contents(
        find_stack(model), alone, real[1:]
    )


def test_nothing_that_tells_them_apart() -> None:
    with pytest.raises(StreamlineError, match=r"\['attention_mask'\].*2 sequences"):
        sequence_contents(find_stack(tiny_model("llama")), {"attention_mask": torch.ones(2, 3)}, torch.ones(2, 3) > 0)

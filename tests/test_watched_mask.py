"""Which tokens count, stack by stack: of an encoder and a decoder, of towers, of blocks inside a model that masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, WindowMoments, find_stack, measure_moments, profile
from streamline_hooks.testing import tiny_model
from streamline_hooks.watched_mask import WatchedMask

SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
PICTURE: dict[str, Any] = {**SHAPE, "image_size": 16, "patch_size": 8}
TEXT: dict[str, Any] = {**SHAPE, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def padded(lengths: list[int], width: int, prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {f"{prefix}input_ids": ids.where(mask.bool(), 1), f"{prefix}attention_mask": mask}


def pictures(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=64)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 3), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(d_model=32, vocab_size=64, max_position_embeddings=64, **sizes, **heads)
    )


def clip() -> nn.Module:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=PICTURE))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**{k: v for k, v in TEXT.items() if not k.startswith("bos")}))


DECODED = padded([6, 4], 6, "decoder_", seed=1)
WHOLE = {"decoder_input_ids": DECODED["decoder_input_ids"]}
LONG, SHORT = padded([9, 5], 9), padded([6, 2], 6)  # the second as wide as what is decoded
CASES = {
    "t5 encoder": (t5, "encoder.block", LONG | DECODED, LONG["attention_mask"]),
    "t5 decoder": (t5, "decoder.block", LONG | DECODED, DECODED["decoder_attention_mask"]),
    "t5 decoder without a mask": (t5, "decoder.block", SHORT | WHOLE, None),
    "bart encoder": (bart, "model.encoder.layers", LONG | DECODED, LONG["attention_mask"]),
    "bart decoder": (bart, "model.decoder.layers", LONG | DECODED, DECODED["decoder_attention_mask"]),
    "bart decoder without a mask": (bart, "model.decoder.layers", SHORT | WHOLE, None),
    "clip text": (clip, "text_model.encoder.layers", LONG | pictures(2), LONG["attention_mask"]),
    "clip pictures": (clip, "vision_model.encoder.layers", LONG | pictures(2), None),
    "clip pictures as many as tokens": (clip, "vision_model.encoder.layers", padded([5, 3], 5) | pictures(2), None),
    "bert": (bert, "encoder.layer", LONG, LONG["attention_mask"]),
    "llama": (lambda: tiny_model("llama", blocks=3), "model.layers", LONG, LONG["attention_mask"]),
    "gpt2": (lambda: tiny_model("gpt2", blocks=3), "transformer.h", LONG, LONG["attention_mask"]),
}


@pytest.mark.parametrize("case", CASES)
def test_moments_count_the_stacks_own_tokens(case: str) -> None:
    make, path, batch, mask = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad(), HiddenStateRecorder(model, stack=path) as record:
        record(**batch)
    entering, leaving = record.inputs[1][0], record.outputs[2][0]
    expected = WindowMoments(32)
    real = torch.ones(entering.shape[:2]) if mask is None else mask
    expected.update(entering, leaving, real)
    (found,) = measure_moments(model, [batch], [range(1, 3)], stack=path)
    assert found.tokens == int(real.sum()) == profile(model, [batch], stack=path).tokens
    torch.testing.assert_close(found.xx, expected.xx, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.xd, expected.xd, rtol=1e-9, atol=1e-12)


def test_a_mask_is_of_one_call_and_the_hooks_go() -> None:
    model = t5().eval()
    with torch.no_grad(), WatchedMask(find_stack(model, "decoder.block")) as watched:
        model(**LONG, **DECODED)
        assert torch.equal(watched.mask, DECODED["decoder_attention_mask"])
        model(**LONG, **WHOLE)
        assert watched.mask is None
    assert not any(module._forward_pre_hooks for module in model.modules())

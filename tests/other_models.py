"""Tiny models that are no causal language models, and what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from streamline_hooks.modeling import find_stacks

SHAPE: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
PICTURE: dict[str, Any] = {**SHAPE, "image_size": 16, "patch_size": 8}
TEXT: dict[str, Any] = {**SHAPE, "vocab_size": 64, "eos_token_id": 2, "pad_token_id": 1}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 4), ("ffn_dim", 64))}
HEADS = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}


def padded(lengths: list[int], width: int, prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    """Tokens padded on the right, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {f"{prefix}input_ids": ids.where(mask.bool(), 1), f"{prefix}attention_mask": mask}


def pictures(count: int = 2, size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Other:
    """A kind of model, one of its stacks, and a batch for it.

    Attributes
    ----------
    make : callable
    stack : str
        A part of its path, which is another one in some versions; empty where there is one stack.
    given : tuple of str
        What a forward needs.
    batch : dict
        With padding, where there is some.
    real : torch.Tensor or None
        Which of the stack's tokens are real; None where all are.
    removed : tuple of int
        Blocks that can go and be saved.
    decodes : bool
        Whether it writes with a cache.
    encodes : bool
        Whether it is the encoder of a model that generates.
    """

    make: Callable[[], nn.Module]
    stack: str
    given: tuple[str, ...]
    batch: dict[str, Tensor]
    real: Tensor | None = None
    removed: tuple[int, ...] = (1,)
    decodes: bool = False
    encodes: bool = False

    def path(self, model: nn.Module) -> str:
        """Where the stack is in a model."""
        return next(stack.path for stack in find_stacks(model) if self.stack in stack.path)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE, num_labels=5))


def deit() -> nn.Module:
    return transformers.DeiTModel(transformers.DeiTConfig(**PICTURE))


def dinov2() -> nn.Module:
    sizes = {name: value for name, value in PICTURE.items() if name != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=PICTURE))


def clip() -> nn.Module:
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**TEXT, "bos_token_id": 0}, vision_config=PICTURE)
    )


def swin() -> nn.Module:
    sizes = {"depths": [2, 6], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(image_size=64, patch_size=4, **sizes))


def swinv2() -> nn.Module:
    """Its norms come behind what is normed."""
    sizes = {"depths": [2, 6], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4}
    return transformers.Swinv2Model(transformers.Swinv2Config(image_size=64, patch_size=4, **sizes))


def beit() -> nn.Module:
    """Each block has a relative position bias of its own."""
    config = transformers.BeitConfig(**PICTURE, use_relative_position_bias=True, num_labels=5)
    return transformers.BeitForImageClassification(config)


def data2vec() -> nn.Module:
    """All blocks share one relative position bias, which the encoder holds."""
    config = transformers.Data2VecVisionConfig(**PICTURE, use_shared_relative_position_bias=True)
    return transformers.Data2VecVisionModel(config)


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT))


def classifier() -> nn.Module:
    """It says one thing of a whole text."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=5))


def distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64, "pad_token_id": 1}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))


def xlm_roberta() -> nn.Module:
    """Its positions are counted from the padding on."""
    return transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**TEXT, bos_token_id=0))


def modernbert() -> nn.Module:
    """Every third block attends to all tokens, and the others to those nearby."""
    ids = {"bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**{**TEXT, "num_hidden_layers": 5}, **ids, local_attention=4)
    return transformers.ModernBertModel(config)


def mpnet() -> nn.Module:
    return transformers.MPNetModel(transformers.MPNetConfig(**TEXT))


def rwkv() -> nn.Module:
    """Its own model is not handed the mask."""
    config = transformers.RwkvConfig(hidden_size=32, num_hidden_layers=4, vocab_size=64, context_length=32)
    return transformers.RwkvForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=64)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(d_model=32, vocab_size=64, max_position_embeddings=64, **SIDES, **HEADS)
    return transformers.BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 24, "d_model": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(vocab_size=64, **SIDES, **HEADS, **sizes, **ids)
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SHAPE, conv_dim=(32,) * 7))


def llava() -> nn.Module:
    llama = transformers.LlamaConfig(**TEXT, num_key_value_heads=4)
    config = transformers.LlavaConfig(
        text_config=llama,
        vision_config=transformers.CLIPVisionConfig(**PICTURE),
        image_token_index=63,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    text = transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 4)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**PICTURE),
        mm_tokens_per_image=4,
        image_token_index=63,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    return qwen("Qwen2VL", embed_dim=32, hidden_size=32, mlp_ratio=2)


def qwen2_5_vl() -> nn.Module:
    """Of its tower's blocks one attends to all of an image, and the others to windows of one cell."""
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    return qwen("Qwen2_5_VL", **sizes, window_size=4, fullatt_block_indexes=[2])


def qwen3_vl() -> nn.Module:
    """What its tower's blocks 0 and 2 see is added behind blocks 0 and 1 of the text."""
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}
    return qwen("Qwen3VL", **sizes, deepstack_visual_indexes=[0, 2])


def qwen(name: str, **tower: Any) -> nn.Module:
    """A model whose pictures come as patches, all in one row, and whose tokens have positions of three numbers."""
    positions = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**TEXT, "num_key_value_heads": 2, "rope_scaling": positions}
    vision = {"depth": 4, "num_heads": 4, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = getattr(transformers, f"{name}Config")
    places = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return getattr(transformers, f"{name}ForConditionalGeneration")(
        config(text_config=text, vision_config={**vision, **tower}, **places)
    )


def patched() -> dict[str, Tensor]:
    """A text padded on the right, with places for an image of 2 x 2 cells, of 2 x 2 patches each, in each row."""
    batch = {name: value for name, value in with_pictures(4).items() if name != "pixel_values"}
    types = batch.pop("token_type_ids")
    if TYPES in inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters:
        batch[TYPES] = types
    patches = torch.randn(2 * 16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(4))
    return {**batch, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def with_pictures(count: int) -> dict[str, Tensor]:
    """A text padded on the right, with places for one image in each row."""
    ids, mask = LONG["input_ids"], LONG["attention_mask"]
    places = torch.full((2, count), 63)
    types = torch.cat([torch.zeros(2, 2), torch.ones(2, count), torch.zeros(2, 7)], dim=1).long()
    return {
        "input_ids": torch.cat([ids[:, :2], places, ids[:, 2:]], dim=1),
        "attention_mask": torch.cat([mask[:, :2], torch.ones_like(places), mask[:, 2:]], dim=1),
        "token_type_ids": types,
        **pictures(),
    }


LONG, SHORT, DECODED = padded([9, 5], 9), padded([6, 2], 6), padded([6, 4], 6, "decoder_", seed=1)
WHOLE = {"decoder_input_ids": DECODED["decoder_input_ids"]}
BOTH = ("input_ids", "decoder_input_ids")
PAIRS, BESIDE, TYPED = LONG | pictures(), ("input_ids", "pixel_values"), with_pictures(4)
SEEN = {name: value for name, value in TYPED.items() if name != "token_type_ids"}
SOUND = {"input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))}
TYPES = "mm_token_type_ids"  # which Transformers 4 does not take
PATCHED = patched()
WAVES = {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))}
PATCHES = ("input_ids", "pixel_values", "image_grid_thw", *({TYPES} & set(PATCHED)))

OTHERS: dict[str, Other] = {
    "vit": Other(vit, "", ("pixel_values",), pictures()),
    "deit": Other(deit, "", ("pixel_values",), pictures()),
    "dinov2": Other(dinov2, "encoder.layer", ("pixel_values",), pictures()),
    "swin": Other(swin, "encoder.layers.1.blocks", ("pixel_values",), pictures(size=64), removed=(2, 3)),
    "swinv2": Other(swinv2, "encoder.layers.1.blocks", ("pixel_values",), pictures(size=64), removed=(2, 3)),
    "beit": Other(beit, "", ("pixel_values",), pictures()),
    "data2vec": Other(data2vec, "encoder.layer", ("pixel_values",), pictures()),
    "siglip text": Other(siglip, "text_model.encoder.layers", BESIDE, PAIRS, LONG["attention_mask"]),
    "siglip pictures": Other(siglip, "vision_model.encoder.layers", BESIDE, PAIRS),
    "clip text": Other(clip, "text_model.encoder.layers", BESIDE, PAIRS, LONG["attention_mask"]),
    "clip pictures": Other(clip, "vision_model.encoder.layers", BESIDE, PAIRS),
    "llava text": Other(llava, "language_model", ("input_ids",), SEEN, SEEN["attention_mask"], decodes=True),
    "llava pictures": Other(llava, "vision_tower", BESIDE, SEEN),
    "gemma3 text": Other(gemma3, "language_model", ("input_ids",), TYPED, TYPED["attention_mask"], decodes=True),
    "gemma3 pictures": Other(gemma3, "vision_tower", BESIDE, TYPED),
    "qwen2-vl text": Other(
        qwen2_vl, "language_model", ("input_ids",), PATCHED, PATCHED["attention_mask"], decodes=True
    ),
    "qwen2-vl pictures": Other(qwen2_vl, "visual", PATCHES, PATCHED),
    "qwen2.5-vl pictures": Other(qwen2_5_vl, "visual", PATCHES, PATCHED),
    "bert": Other(bert, "encoder.layer", ("input_ids",), LONG, LONG["attention_mask"]),
    "bert classifier": Other(classifier, "encoder.layer", ("input_ids",), LONG, LONG["attention_mask"]),
    "distilbert": Other(distilbert, "transformer.layer", ("input_ids",), LONG, LONG["attention_mask"]),
    "xlm-roberta": Other(xlm_roberta, "encoder.layer", ("input_ids",), LONG, LONG["attention_mask"]),
    "modernbert": Other(modernbert, "layers", ("input_ids",), LONG, LONG["attention_mask"], removed=(1, 2, 3)),
    "mpnet": Other(mpnet, "encoder.layer", ("input_ids",), LONG, LONG["attention_mask"]),
    "t5 encoder": Other(t5, "encoder.block", BOTH, LONG | DECODED, LONG["attention_mask"], encodes=True),
    "t5 decoder": Other(t5, "decoder.block", BOTH, LONG | DECODED, DECODED["decoder_attention_mask"], decodes=True),
    "t5 decoder without a mask": Other(t5, "decoder.block", BOTH, SHORT | WHOLE),
    "bart encoder": Other(bart, "model.encoder.layers", BOTH, LONG | DECODED, LONG["attention_mask"], encodes=True),
    "bart decoder": Other(
        bart, "model.decoder.layers", BOTH, LONG | DECODED, DECODED["decoder_attention_mask"], decodes=True
    ),
    "bart decoder without a mask": Other(bart, "model.decoder.layers", BOTH, SHORT | WHOLE),
    "whisper encoder": Other(
        whisper, "model.encoder.layers", ("input_features", "decoder_input_ids"), SOUND | WHOLE, encodes=True
    ),
    "whisper decoder": Other(
        whisper, "model.decoder.layers", ("input_features", "decoder_input_ids"), SOUND | WHOLE, decodes=True
    ),
    "wav2vec2": Other(wav2vec2, "encoder.layers", ("input_values",), WAVES),
}


def made(name: str) -> Any:
    """A model with weights large enough that every block matters, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OTHERS[name].make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            else:  # biases, and norms as they are after training
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def answer(model: Any, name: str) -> Tensor:
    """What a model says to its batch."""
    with torch.no_grad():
        output = model(**OTHERS[name].batch)
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(value for value in (getattr(output, each, None) for each in names) if value is not None)

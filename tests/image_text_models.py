"""Tiny models that take images with texts, and their processors, built without downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = [*(f"w{k}" for k in range(40)), "which", "color?", "user:", "assistant:"]
SPECIAL = ["<pad>", "<unk>", "</s>", "<s>"]
LLAVA_TOKENS = ["<image>"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
IDEFICS_TOKENS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
TEXT: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 64, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 3,
    "max_position_embeddings": 128,
}  # fmt: skip


def tokenizer_with(images: list[str], padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, some of which stand for images; each text begins with BOS."""
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side=padding_side, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": images})
    return tokenizer


def template(image: str) -> str:
    """Return a chat template that begins with BOS and has the image where the conversation has it."""
    return (
        "{{ '<s> ' }}{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + " {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )


def llava_processor(padding_side: str = "right") -> Any:
    """An image becomes four patches and the state of the class."""
    sizes = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=sizes, crop_size=sizes)
    return transformers.LlavaProcessor(
        images, tokenizer_with(LLAVA_TOKENS, padding_side), patch_size=8, vision_feature_select_strategy="full",
        chat_template=template("<image>"), num_additional_image_tokens=1,
    )  # fmt: skip


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=48,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return _filled(transformers.LlavaForConditionalGeneration, config)


def qwen_processor(padding_side: str = "right") -> Any:
    """An image becomes cells of 2 x 2 patches, as many as its size has."""
    images = transformers.Qwen2VLImageProcessor(
        patch_size=2, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=128
    )
    tokenizer = tokenizer_with(QWEN_TOKENS, padding_side)
    video = transformers.Qwen2VLVideoProcessor(patch_size=2, temporal_patch_size=2, merge_size=2)
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return transformers.Qwen2VLProcessor(images, tokenizer, video, chat_template=template(image))


def qwen() -> Any:
    positions = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "num_heads": 4, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": positions},
        vision_config={**vision, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        vision_start_token_id=48, vision_end_token_id=49, image_token_id=50, video_token_id=51,
    )  # fmt: skip
    return _filled(transformers.Qwen2VLForConditionalGeneration, config)


def idefics_processor(padding_side: str = "right") -> Any:
    """An image becomes two patches for each of its tiles and for the whole, each after tokens that say which."""
    tokenizer = tokenizer_with(IDEFICS_TOKENS, padding_side)
    tokenizer.add_tokens(["<global-img>", *TILES])
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=2, chat_template=template("<image>"))


BOTH = {"llava": (llava, llava_processor), "qwen2-vl": (qwen, qwen_processor)}
IMAGE_TOKENS = {"llava": 48, "qwen2-vl": 50}


def picture(number: int) -> Image.Image:
    """Return an image that differs from all others, of one of three sizes."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (8 + 4 * (number % 2), 8 + 4 * (number % 3), 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def text_of(number: int) -> str:
    """Return a text of three to seven words."""
    return " ".join(f"w{(number * 7 + k * k) % 40}" for k in range(3 + number % 5))


def write_rows(folder: Path, count: int, **more: str) -> Path:
    """Write images and a JSONL file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        picture(k).save(folder / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "text": text_of(k), **more}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def _filled(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model

"""Models, tokens, documents, pairs and images of the golden runs: the same on every machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests import other_models, tiny_models

SPECIAL = ("[PAD]", "<s>", "</s>", "[UNK]")  # the ids that the configurations of the tiny models name
WORDS = 57
IMAGE_SIZE = 16
CLASSES = ("ant", "bee", "cat", "dog", "elk")
FACTORS = (0.9, 1.2, 0.5, 0.7, 1.1, 0.8)  # of the weights of each block
OTHER = {"bert": "bert", "bart": "bart decoder", "vit": "vit"}


def model_named(name: str) -> nn.Module:
    """Return a fresh tiny model with fixed random weights, in which some blocks do much less than the others."""
    is_decoder = name in tiny_models.FAMILIES
    model: nn.Module = tiny_models.tiny_model(name) if is_decoder else other_models.made(OTHER[name])
    if name == "vit":
        model.config.id2label = dict(enumerate(CLASSES))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            block = re.search(r"\.(\d+)\.", path)
            if block is not None and parameter.ndim > 1:
                parameter *= FACTORS[int(block[1]) if is_decoder else int(block[1]) + 1]
    return model


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits at spaces; word n has the id 4 + n."""
    names = [*SPECIAL, *map(str, range(WORDS))]
    core = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **named, **options)


def words(random: Random, count: int) -> list[str]:
    """Return a random walk over the words, so that the text has some structure."""
    word, found = random.randrange(WORDS), []
    for _ in range(count):
        found.append(str(word))
        word = (2 * word + random.choice((1, 1, 5, 17))) % WORDS
    return found


def documents(count: int = 120, length: int = 40) -> list[str]:
    return [" ".join(words(Random(f"document {k}"), length)) for k in range(count)]


def pairs(count: int = 80) -> list[tuple[str, str]]:
    random = Random("pairs")
    return [(" ".join(words(random, 8)), " ".join(words(random, 5))) for _ in range(count)]


def token_batches() -> dict[str, list[dict[str, Tensor]]]:
    """Return calibration, validation and test batches of 4 sequences, the second of each two with left padding."""
    counts = {"calibration": (0, 10), "validation": (100, 4), "test": (200, 4)}

    def batch(seed: int) -> dict[str, Tensor]:
        ids = tiny_models.tokens(4, 24, seed)
        return tiny_models.left_padded(4, 24, seed) if seed % 2 else {"input_ids": ids, "attention_mask": ids > 0}

    return {part: [batch(seed) for seed in range(first, first + count)] for part, (first, count) in counts.items()}


def pair_batches() -> dict[str, list[dict[str, Tensor]]]:
    """Return batches for an encoder with a decoder, with labels for the decoder."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for part, (first, count) in {"calibration": (0, 8), "validation": (100, 3), "test": (200, 3)}.items():
        found[part] = []
        for seed in range(first, first + count):
            batch = other_models.padded([12, 9, 7, 5], 12, seed=seed)
            batch |= other_models.padded([8, 6, 7, 4], 8, "decoder_", seed=1_000 + seed)
            mask = batch["decoder_attention_mask"].bool()
            found[part].append(batch | {"labels": batch["decoder_input_ids"].where(mask, -100)})
    return found


def text_batches() -> dict[str, list[dict[str, Tensor]]]:
    """Return batches for an encoder, padded on the right."""
    counts = {"calibration": (0, 10), "validation": (100, 4), "test": (200, 4)}
    return {
        part: [other_models.padded([20, 14, 17, 9], 20, seed=seed) for seed in range(first, first + count)]
        for part, (first, count) in counts.items()
    }


def image_batches() -> dict[str, list[dict[str, Tensor]]]:
    """Return batches of images; those of the test part have labels."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for part, (first, count) in {"calibration": (0, 12), "validation": (100, 4), "test": (200, 4)}.items():
        found[part] = []
        for seed in range(first, first + count):
            pixels = pixels_of(seed, 8).permute(0, 3, 1, 2) / 127.5 - 1.0
            labels = {"labels": torch.arange(8) % len(CLASSES)} if part == "test" else {}
            found[part].append({"pixel_values": pixels, **labels})
    return found


def pixels_of(seed: int, count: int) -> Tensor:
    """Return images as bytes, of shape (count, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8)


def write_model(name: str, folder: Path) -> Path:
    """Save a tiny model with its tokenizer or image processor."""
    model_named(name).save_pretrained(folder)
    if name == "vit":
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
    return folder


def write_documents(path: Path) -> Path:
    path.write_text("\n\n\n".join(documents()))
    return path


def write_pairs(path: Path) -> Path:
    path.write_text("".join(json.dumps({"source": one, "target": other}) + "\n" for one, other in pairs()))
    return path


def write_images(folder: Path, count: int = 60) -> Path:
    """Write a folder of images for each class."""
    from PIL import Image

    for k, pixels in enumerate(pixels_of(7, count)):
        path = folder / CLASSES[k % len(CLASSES)] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def write_questions(path: Path, count: int = 12) -> Path:
    """Write multiple-choice questions with two choices."""
    random = Random("questions")
    rows = [
        {"query": " ".join(words(random, 6)), "choices": [words(random, 1)[0], words(random, 2)[0]], "gold": k % 2}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""A small byte-level tokenizer for random models."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def small_tokenizer(folder: Path, size: int) -> Path:
    """Save a tokenizer of `size` tokens without BOS."""
    letters = {chr(33 + k): k for k in range(size - 1)}
    first, second, *_ = letters
    tokenizer = Tokenizer(models.BPE(vocab={**letters, first + second: size - 1}, merges=[(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder

"""The text that repairs are fitted and trained on: every training domain alike, and none of what is scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_text import SEQUENCE
from streamline_hooks.calibration import read_documents, split_documents

VALIDATION = 2 * SEQUENCE  # tokens of each domain
TOLD_BY = 60  # characters of a paragraph


@dataclass(frozen=True)
class TrainingText:
    """Sequences of SEQUENCE tokens.

    Attributes
    ----------
    train : torch.Tensor
        The domains in turn, so that any beginning of it is a mixture of all.
    validation : torch.Tensor
        Of other documents.
    shares : dict of str to int
        Training tokens of each domain.
    """

    train: Tensor
    validation: Tensor
    shares: dict[str, int]


def training_text(data: Path, tokenizer: Any, tokens: int, seed: int = 0) -> TrainingText:
    """As many tokens of each domain under text/train.

    The tokenised WikiText has ``<unk>`` in the place of rare words, which no model should learn to expect: they are
    left out. So is every document that shares a paragraph with the held-out text: four of 2,230 quote a text that is
    held out.
    """
    scored = {
        paragraph for path in sorted(_texts(data, "heldout")) for paragraph in paragraphs(path.read_text("utf-8"))
    }
    paths = sorted(_texts(data, "train"))
    wanted = tokens // SEQUENCE
    counts = [wanted // len(paths) + (k < wanted % len(paths)) for k in range(len(paths))]
    found = {}
    for path, count in zip(paths, counts, strict=True):
        documents = [text.replace("<unk> ", "").replace("<unk>", "") for text in read_documents(path)]
        documents = [text for text in documents if scored.isdisjoint(paragraphs(text))]
        split = split_documents(
            documents,
            tokenizer,
            seed=seed,
            sequence_length=SEQUENCE,
            calibration_tokens=max(1, count) * SEQUENCE,
            validation_tokens=VALIDATION,
            test_tokens=SEQUENCE,
        )
        if len(split.calibration) < count or len(split.validation) < VALIDATION // SEQUENCE:
            raise SystemExit(f"{path} holds {split.calibration.numel():,} tokens, fewer than {count * SEQUENCE:,}.")
        found[path.stem] = split.calibration[:count], split.validation
    places = [torch.linspace(0, 1, len(rows) + 2)[1:-1] for rows, _ in found.values()]
    order = torch.cat(places).argsort(stable=True)
    train = torch.cat([rows for rows, _ in found.values()])[order]
    shares = {name: rows.numel() for name, (rows, _) in found.items()}
    return TrainingText(train, torch.cat([validation for _, validation in found.values()]), shares)


def paragraphs(text: str) -> set[str]:
    """The paragraphs, or lines, that are long enough to be told by."""
    found = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in found if len(line) >= TOLD_BY}


def _texts(data: Path, part: str) -> Iterator[Path]:
    return (data / "text" / part).glob("*.txt")

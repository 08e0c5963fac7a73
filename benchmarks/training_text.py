"""Training text for repairs: equal parts of all training domains, without text that is scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_text import SEQUENCE
from streamline_hooks.data import read_documents, split_documents

VALIDATION = 2 * SEQUENCE  # tokens of each domain
LEAST_CHARACTERS = 60  # characters of a paragraph that identifies a document


@dataclass(frozen=True)
class TrainingText:
    """Sequences of equal length, by default of SEQUENCE tokens.

    Attributes
    ----------
    train : torch.Tensor
        The domains alternate, so that every prefix is a mixture of all.
    validation : torch.Tensor
        Sequences of other documents.
    shares : dict of str to int
        Training tokens by domain.
    domains : torch.Tensor
        Number of the domain of each training sequence.
    """

    train: Tensor
    validation: Tensor
    shares: dict[str, int]
    domains: Tensor


def training_text(
    data: Path,
    tokenizer: Any,
    tokens: int,
    seed: int = 0,
    *,
    left_out: str = "",
    only: str = "",
) -> TrainingText:
    """Return training text with equal numbers of tokens of each domain in ``text/train``, or of all but one, or of one.

    The ``<unk>`` of the tokenized WikiText are deleted. Documents that share a paragraph with the held-out text are
    left out (four of 2,230). The text of one domain, with which repairs are scored that were trained without it, also
    has no document that shares a paragraph with another domain (63 of 484 in ``blog_18f``).
    """
    scored = {
        paragraph for path in sorted(_texts(data, "heldout")) for paragraph in paragraphs(path.read_text("utf-8"))
    }
    if only:
        others = (path for path in _texts(data, "train") if path.stem != only)
        scored |= {paragraph for path in others for text in read_documents(path) for paragraph in paragraphs(text)}
    if left_out and not (data / "text" / "train" / f"{left_out}.txt").is_file():
        raise SystemExit(f"{data / 'text' / 'train'} has no domain {left_out!r} to leave out. Expected a file name.")
    paths = sorted(path for path in _texts(data, "train") if path.stem != left_out and only in ("", path.stem))
    if not paths:
        raise SystemExit(f"{data / 'text' / 'train'} has no domain {only!r}. Expected the name of a file without .txt.")
    wanted = tokens // SEQUENCE
    counts = [wanted // len(paths) + (k < wanted % len(paths)) for k in range(len(paths))]
    rows_by_domain = {}
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
            raise SystemExit(
                f"{path} has {split.calibration.numel():,} training tokens. Expected at least {count * SEQUENCE:,}."
            )
        rows_by_domain[path.stem] = split.calibration[:count], split.validation
    positions = [torch.linspace(0, 1, len(rows) + 2)[1:-1] for rows, _ in rows_by_domain.values()]
    order = torch.cat(positions).argsort(stable=True)
    train = torch.cat([rows for rows, _ in rows_by_domain.values()])[order]
    domains = torch.cat([torch.full((len(rows),), k) for k, (rows, _) in enumerate(rows_by_domain.values())])[order]
    shares = {name: rows.numel() for name, (rows, _) in rows_by_domain.items()}
    return TrainingText(train, torch.cat([rows for _, rows in rows_by_domain.values()]), shares, domains)


def paragraphs(text: str) -> set[str]:
    """Return the paragraphs, or lines, that are long enough to identify a document."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in lines if len(line) >= LEAST_CHARACTERS}


def _texts(data: Path, part: str) -> Iterator[Path]:
    return (data / "text" / part).glob("*.txt")

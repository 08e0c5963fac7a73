"""Shared text of the benchmarks: calibration on ``text/train``, scores on ``text/heldout``."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch

from streamline_hooks.core import split_into_batches
from streamline_hooks.data import TokenSplit, read_documents, split_documents

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEQUENCE, BATCH = 512, 4


def show_log() -> None:
    """Print the log of the library on stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("streamline_hooks").setLevel(logging.INFO)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--data`` (default: STREAMLINE_DATA), and print the log of the library."""
    show_log()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    default = os.environ.get("STREAMLINE_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    return parser


def split_of(data: Path, tokenizer: Any, **options: Any) -> TokenSplit:
    """Return calibration and validation sequences of the training text, split as in `compress`."""
    train, heldout = (read_documents(data / "text" / part) for part in ("train", "heldout"))
    return split_documents(train, tokenizer, test_documents=heldout, sequence_length=SEQUENCE, **options)


def scored_text(data: Path, tokenizer: Any, sequences: int) -> list[dict[str, torch.Tensor]]:
    """Return the first sequences of each held-out domain as batches."""
    rows = []
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids[: sequences * SEQUENCE]
        rows.append(torch.tensor(ids).view(-1, SEQUENCE))
    return split_into_batches(torch.cat(rows), BATCH)


def heldout(data: Path, tokenizer: Any, sequences: int, first: int = 0) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return batches of sequences by held-out domain, starting at sequence `first`."""
    batches_by_domain = {}
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = ids[first * SEQUENCE : (first + sequences) * SEQUENCE]
        if len(ids) < SEQUENCE:
            where = f", from sequence {first} on," if first else ""
            raise SystemExit(f"{path} has{where} {len(ids)} tokens, less than one sequence of {SEQUENCE}.")
        batches_by_domain[path.stem] = split_into_batches(
            torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE), BATCH
        )
    if not batches_by_domain:
        raise SystemExit(f"There is no held-out text in {data / 'text' / 'heldout'}. Expected domains as *.txt.")
    return batches_by_domain

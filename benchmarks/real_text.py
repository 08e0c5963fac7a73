"""The real model and the real text that the benchmarks share: calibration from train, scores on heldout."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import read_documents, split_documents
from streamline_hooks.calibration.split import TokenSplit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEQUENCE, BATCH = 512, 4


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the folder of texts: ``--data``, or STREAMLINE_DATA."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    default = os.environ.get("STREAMLINE_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    return parser


def split_of(data: Path, tokenizer: Any, **options: Any) -> TokenSplit:
    """Calibration and validation sequences from the training texts, dealt as `compress` deals them."""
    train, heldout = (read_documents(data / "text" / part) for part in ("train", "heldout"))
    return split_documents(train, tokenizer, test_documents=heldout, sequence_length=SEQUENCE, **options)


def scored_text(data: Path, tokenizer: Any, sequences: int) -> list[dict[str, torch.Tensor]]:
    """The first sequences of each held-out domain, in order."""
    rows = []
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids[: sequences * SEQUENCE]
        rows.append(torch.tensor(ids).view(-1, SEQUENCE))
    return batches_of(torch.cat(rows), BATCH)


def heldout(data: Path, tokenizer: Any, sequences: int, first: int = 0) -> dict[str, list[dict[str, torch.Tensor]]]:
    """So many sequences of each held-out domain from the first on, in batches; fewer where a text is shorter."""
    found = {}
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = ids[first * SEQUENCE : (first + sequences) * SEQUENCE]
        if len(ids) < SEQUENCE:
            where = f", from the sequence {first} on," if first else ""
            raise SystemExit(f"{path} has{where} {len(ids)} tokens, less than one sequence of {SEQUENCE}.")
        found[path.stem] = batches_of(torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE), BATCH)
    if not found:
        raise SystemExit(f"There is no held-out text in {data / 'text' / 'heldout'}; expected domains as *.txt.")
    return found

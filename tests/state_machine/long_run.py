"""The long campaign: ``python -m tests.state_machine.long_run --steps 100000 --seed 0 --file PROGRESS.json``.

A chunk is a family and a seed. Each finished chunk is appended to the file with its number of steps, so that an
interrupted campaign continues where it stopped. With ``--part 0/2`` and ``--part 1/2``, each with its own file, two
processes share the chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.state_machine.campaign import run_chunk
from tests.state_machine.models import FAMILIES


def read_progress(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the finished chunks of a campaign with the same settings.

    Raises
    ------
    SystemExit
        If the file is of another campaign.
    """
    if not file.exists():
        return {**settings, "chunks": []}
    progress: dict[str, Any] = json.loads(file.read_text())
    for name, value in settings.items():
        if progress.get(name) != value:
            raise SystemExit(f"{file} is of a campaign with {name}={progress.get(name)}, not {value}. Name a new file.")
    return progress


def write_progress(file: Path, progress: dict[str, Any]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(progress, indent=1) + "\n")
    beside.replace(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="in total, of all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="which part of how many: 0/2")
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    progress = read_progress(options.file, {"seed": options.seed, "part": options.part})
    finished = {(chunk["family"], chunk["seed"]) for chunk in progress["chunks"]}
    steps, wanted = sum(chunk["steps"] for chunk in progress["chunks"]), -(-options.steps // parts)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tqdm(total=wanted, initial=min(steps, wanted), unit="step") as bar:
        for number in count():
            if steps >= wanted:
                break
            chunk = (list(FAMILIES)[number % len(FAMILIES)], options.seed + number)
            if number % parts != part or chunk in finished:
                continue
            began = time.monotonic()
            try:
                done = run_chunk(*chunk)
            except BaseException as error:
                error.add_note(f"In the chunk family={chunk[0]!r}, seed={chunk[1]}.")
                raise
            seconds = round(time.monotonic() - began, 1)
            progress["chunks"].append({"family": chunk[0], "seed": chunk[1], "steps": done, "seconds": seconds})
            write_progress(options.file, progress)
            steps += done
            bar.set_postfix_str(chunk[0])
            bar.update(done)
    print(f"{steps} steps in {len(progress['chunks'])} chunks, no failure: {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

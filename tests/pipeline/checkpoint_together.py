"""Compress a checkpoint block by block in two processes: python -m tests.pipeline.checkpoint_together FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from streamline_hooks.checkpoint import BlockwiseSource
from streamline_hooks.pipeline import BlockwiseOptions, compress_checkpoint
from tests.checkpoint.block_by_block import AMOUNTS, reader
from tests.configured import configured

CONFIG = {**AMOUNTS, "search": "mixed", "remove": 3, "protect": (), "batch_size": 3, "state_memory": 2**12}


def results(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Compress the checkpoint; return what was found."""
    tokenizer, texts = reader()
    found = compress_checkpoint(
        folder / "llama",
        texts,
        configured(**CONFIG),
        tokenizer=tokenizer,
        output=folder / name,
        blockwise=BlockwiseOptions(**options),
    )
    return {
        "removed": found.plan.removed,
        "windows": [str(one.windows) for one in found.candidates],
        "distances": [one.distance for one in found.candidates],
        "perplexities": found.perplexities,
        "sums": found.profile.sums.state_dict(),
        "maps": [repair.replacement_module.state_dict() for repair in found.candidates[0].repairs],
    }


class Interrupted(Exception):
    pass


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cached, work = BlockwiseSource.cached, folder / "work"

    def broken(self: BlockwiseSource, name: str, *args: Any, **options: Any) -> Any:
        """Interrupt both processes; only the second one has the result of the step."""
        if name == "verify" and rank == 0:
            raise Interrupted
        return cached(self, name, *args, **options)

    BlockwiseSource.cached = broken  # type: ignore[method-assign]
    try:
        results(folder, "two", work_folder=work)
        said = "nothing was raised"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    BlockwiseSource.cached = cached  # type: ignore[method-assign]
    kept = sorted(str(path.relative_to(work)) for path in work.glob("rank_*/*.safetensors"))
    dist.barrier()
    if rank == 0:  # killed before it could write what the other process has
        (work / "rank_0" / "profile.safetensors").unlink()
    found = results(folder, "two", work_folder=work)
    torch.save({**found, "said": said, "kept": kept, "left": work.exists()}, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's last work may be given back by a thread of its own, which then waits for this one


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    mp.start_processes(process, (folder,), nprocs=2, start_method="fork")  # before anything is computed
    torch.save(results(folder, "one"), folder / "one.pt")


if __name__ == "__main__":
    main()

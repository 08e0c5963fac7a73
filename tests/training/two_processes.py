"""Train alone, then in two processes under DDP and FSDP2: python -m tests.training.two_processes FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from streamline_hooks import StreamlineError
from streamline_hooks.training import HiddenStateMonitor, ProgressiveRemoval
from tests.tiny_models import tiny_model, tokens

BATCH = tokens(4, 9)
MASK = torch.ones_like(BATCH)
MASK[1, :3] = MASK[3, :3] = 0  # each process has as many real tokens
LABELS = BATCH.masked_fill(MASK == 0, -100)
LABELS[1, 3] = LABELS[3, 3] = -100


def train(model: nn.Module, part: slice, file: Path) -> None:
    with HiddenStateMonitor(model, every=2, file=file) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            given = {"input_ids": BATCH[part], "attention_mask": MASK[part], "labels": LABELS[part]}
            model(**given, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()


def process(rank: int, wrapping: str, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{wrapping}", rank=rank, world_size=2)
    model = tiny_model("llama").train()
    if wrapping == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        try:
            ProgressiveRemoval(model, {1: range(1, 3)})
        except StreamlineError as error:
            (folder / f"refused-{rank}.txt").write_text(str(error))
        parallel = tiny_model("llama")
        parallel.lm_head.weight = nn.Parameter(distribute_tensor(parallel.lm_head.weight.data, mesh, [Shard(0)]))
        try:
            HiddenStateMonitor(parallel).open()
        except StreamlineError as error:
            (folder / f"parallel-{rank}.txt").write_text(str(error))
    # The first process alone writes: the other is given a place where it could not.
    file = folder / f"{wrapping}.jsonl"
    train(model, slice(2 * rank, 2 * rank + 2), file if rank == 0 else file / "nowhere")
    dist.barrier()
    # Gloo's last work may be given back by a thread of its own, which then waits for the one that waits for it.
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1])
    for wrapping in ("ddp", "fsdp"):  # before anything is computed
        mp.start_processes(process, (wrapping, folder), nprocs=2, start_method="fork")
    train(tiny_model("llama").train(), slice(0, 4), folder / "one.jsonl")


if __name__ == "__main__":
    main()

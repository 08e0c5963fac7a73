"""Measure alone, then in two processes: python -m tests.statistics.measured_together FOLDER."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from streamline_hooks import fit_windows, profile, verify_shortlist
from streamline_hooks.core import current_processes, single_process
from streamline_hooks.repair import FoldedConfig, LinearConfig, fit_branch_linear, measure_fold_moments
from streamline_hooks.selection import Selection
from streamline_hooks.statistics import measure_moments
from tests.tiny_models import left_padded, tiny_model, tokens

BATCHES = [left_padded(3, 11), *(left_padded(rows, 9 + rows, seed=rows) for rows in (2, 1, 4, 3))]
MASKS = [torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"]) % 3 > 0 for batch in BATCHES]
HELD_OUT = [left_padded(4, 14, seed=8)]  # fewer than processes: one has an empty share
VALIDATION = [left_padded(2, 14, seed=9), left_padded(2, 8, seed=10)]
WINDOWS = [range(1, 3), range(2, 5)]
MASSIVE = 7  # a token that makes this batch's states infinite
SHORTLIST = [Selection((range(k, k + 2),)) for k in range(4)] + [Selection((range(1, 2), range(4, 5)))]


def results(model: nn.Module) -> dict[str, Any]:
    """What one process and several are to find alike."""
    found: dict[str, Any] = {
        "profile": told_of(profile(model, BATCHES, replicates=20)),
        "one batch": told_of(profile(model, BATCHES[:1], replicates=20)),
        "masked": told_of(profile(model, BATCHES, tokens=MASKS, skip=1, protect=[-1], replicates=0)),
        "none": profile(model, [], shard=False).sums.state_dict(),
        "moments": [one.state_dict() for one in measure_moments(model, BATCHES, WINDOWS)],
        "plain moments": [one.state_dict() for one in measure_moments(model, HELD_OUT, WINDOWS, weighted=False)],
        "fold moments": [one.state_dict() for one in measure_fold_moments(model, BATCHES, WINDOWS)],
        "no moments": measure_moments(model, [], WINDOWS, shard=False),
    }
    repairs = fit_windows(model, WINDOWS, LinearConfig(), BATCHES, HELD_OUT)
    found["repairs"] = [(one.replacement_module.state_dict(), one.ridge, one.repaired_error) for one in repairs]  # type: ignore[union-attr]
    folded = fit_windows(model, WINDOWS, FoldedConfig(), BATCHES, HELD_OUT)
    found["folded"] = [(one.replacement_module.map, one.ridge, one.repaired_error) for one in folded]  # type: ignore[union-attr]
    branches = fit_branch_linear(model, [(1, "attention"), (3, "mlp")], BATCHES, HELD_OUT)
    found["branches"] = [(one.map, one.ridge, one.held_out_error) for one in branches]
    judged = verify_shortlist(model, SHORTLIST, BATCHES, HELD_OUT, VALIDATION)
    found["judged"] = [str(one.windows) for one in judged]
    found["kl"] = torch.tensor([one.distance for one in judged])
    found["best map"] = judged[0].repairs[0].replacement_module.state_dict()  # type: ignore[union-attr]
    return found


def told_of(found: Any) -> dict[str, Any]:
    intervals = torch.tensor(found.interval("angular", range(1, 4))) if found.sums.replicates else torch.zeros(2)
    return {
        "sums": found.sums.state_dict(),
        "cosine": found.cosine,
        "interval": intervals,
        "median": found.median_norms,
        "massive": found.massive_activation_blocks,
        "tokens": (found.tokens, found.sequences),
    }


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model("llama")
    found = results(model)
    found["its own"] = told_of(profile(model, BATCHES[:4] if rank == 0 else BATCHES[4:], replicates=20, shard=False))
    own = [] if rank == 0 else BATCHES
    found["its own moments"] = [one.state_dict() for one in measure_moments(model, own, WINDOWS, shard=False)]
    if rank == 1:
        with single_process():
            found["alone"] = told_of(profile(model, BATCHES, replicates=20))
    broken = tiny_model("llama")
    broken.model.embed_tokens.weight.data[MASSIVE] = float("nan")
    clean = [ids.masked_fill(ids == MASSIVE, 5) for ids in (tokens(2, 9, seed) for seed in range(5))]
    nan = [*clean[:3], clean[3].masked_fill(clean[3] == clean[3][0, 0], MASSIVE), clean[4]]
    other = tiny_model("llama")
    other.model.layers[3].mlp.up_proj.weight.data.add_(0.1 * rank)
    found["said"] = {
        "nan": said(lambda: profile(broken, nan)),
        "nan in fit": said(lambda: fit_windows(broken, WINDOWS, LinearConfig(), clean, nan)),
        "argument": said(lambda: profile(model, BATCHES, protect=[99])),
        "argument of one": said(lambda: profile(model, BATCHES, protect=[99 * rank])),
        "batches": said(lambda: profile(model, BATCHES[rank:], replicates=0)),
        "option": said(lambda: profile(model, BATCHES, skip=rank)),
        "model": said(lambda: measure_moments(other, BATCHES, WINDOWS)),
        "shard": said(lambda: measure_moments(model, BATCHES, WINDOWS, shard=rank == 0)),
        "wrapped": said(lambda: profile(DistributedDataParallel(model), BATCHES)),
    }
    assert current_processes().count == 2
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    if rank == 0:
        (folder / "lost.txt").write_text(said(lambda: profile(model, BATCHES)))
    else:
        time.sleep(0.2)
    # Gloo's last work may be given back by a thread of its own, which then waits for the one that waits for it.
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    mp.start_processes(process, (folder,), nprocs=2, start_method="fork")  # before anything is computed
    torch.save(results(tiny_model("llama")), folder / "one.pt")


if __name__ == "__main__":
    main()

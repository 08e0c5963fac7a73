"""Run code in a process that has seen nothing of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def in_a_new_process(code: str, *args: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    """On as many threads as this one, which products of matrices depend on in their last digits."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=check, env=environment, cwd=ROOT, timeout=_LONGEST
    )


def in_processes(code: str, folder: Path, count: int = 2, *args: Any, timeout: float = 240.0) -> list[dict[str, Any]]:
    """Run code in processes of one group; it finds ``rank``, ``count``, ``folder``, ``args``, and fills ``said``.

    Returns
    -------
    list of dict
        What each process said, by rank. Where one fails, what it wrote is shown, and none is left behind.
    """
    whole = "\n".join(map(textwrap.dedent, (_BEFORE, code, _AFTER)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    runs = []
    try:
        for rank in range(count):
            command = [sys.executable, "-c", whole, *map(str, (rank, count, folder, *args))]
            out, err = ((folder / f"process-{rank}.{kind}").open("w+") for kind in ("out", "err"))
            run = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)
            runs.append((run, out, err))
        ends = time.monotonic() + timeout
        while any(run.poll() is None for run, _, _ in runs) and time.monotonic() < ends:
            if any(run.poll() for run, _, _ in runs):  # one has failed: the others notice soon, or never
                ends = min(ends, time.monotonic() + 10.0)
            time.sleep(0.05)
    finally:
        for run, _, _ in runs:
            run.kill()
            run.wait()
    texts = []
    for _, out, err in runs:
        with out, err:
            out.seek(0)
            err.seek(0)
            texts.append((out.read(), err.read()))
    for rank, (run, (_, told)) in enumerate(zip((run for run, _, _ in runs), texts, strict=True)):
        assert run.returncode == 0, f"process {rank} of {count} ended with {run.returncode}:\n{told[-6000:]}"
    return [json.loads(text.splitlines()[-1]) for text, _ in texts]


def in_two_processes(code: str, folder: Path) -> list[dict[str, Any]]:
    """Run code in two processes of one group, see `in_processes`."""
    return in_processes(code, folder)


_LONGEST = 600  # seconds
_BEFORE = """
    import datetime, json, os, sys, warnings
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    rank, count, folder, args, said = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:], {}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=patience
    )
"""
# Gloo's last work may be given back by a thread of its own, which then waits for the one that waits for it.
_AFTER = """
    print(json.dumps(said), flush=True)
    dist.barrier()
    os._exit(0)
"""

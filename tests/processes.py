"""Run code in a process that has seen nothing of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def in_a_new_process(code: str, *args: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=check, env=environment, cwd=ROOT, timeout=_LONGEST
    )


def in_two_processes(code: str, folder: Path) -> list[dict[str, Any]]:
    """Run code in two processes of one group; it finds its ``rank`` and ``folder``, and fills ``said``.

    Returns
    -------
    list of dict
        What each process said.
    """
    whole = "\n".join(map(textwrap.dedent, (_BEFORE, code, _AFTER)))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(in_a_new_process, whole, rank, folder) for rank in range(2)]
        return [json.loads(run.result().stdout.splitlines()[-1]) for run in runs]


_LONGEST = 600  # seconds
_BEFORE = """
    import json, os, sys, warnings
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    rank, folder, said = int(sys.argv[1]), sys.argv[2], {}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
"""
# Gloo's last work may be given back by a thread of its own, which then waits for the one that waits for it.
_AFTER = """
    print(json.dumps(said), flush=True)
    dist.barrier()
    os._exit(0)
"""

"""Run code in a process that has seen nothing of this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
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

    The processes are forked from one that has imported the libraries and computed nothing.

    Returns
    -------
    list of dict
        What each process said, by rank. Where one fails, what it wrote is shown, and none is left behind.
    """
    (folder / "code.py").write_text("\n".join(map(textwrap.dedent, (_BEFORE, code, _AFTER))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FORKS, *map(str, (count, folder, *args))]
    with subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE) as run:
        try:
            ended = run.communicate(timeout=timeout)[0].decode().split()
        except subprocess.TimeoutExpired:
            ended = ["unfinished"] * count
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert len(ended) == count, f"the process that starts {count} others ended with {run.returncode}"
    texts = [[(folder / f"process-{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(count)]
    for rank, status in enumerate(ended):
        assert status == "0", f"process {rank} of {count} ended with {status}:\n{texts[rank][1][-6000:]}"
    return [json.loads(out.splitlines()[-1]) for out, _ in texts]


def in_two_processes(code: str, folder: Path) -> list[dict[str, Any]]:
    """Run code in two processes of one group, see `in_processes`."""
    return in_processes(code, folder)


_LONGEST = 600  # seconds
_FORKS = """
import os, sys, time, traceback
import torch
import streamline_hooks.distillation, streamline_hooks.pipeline, streamline_hooks.testing
from transformers.models.llama import modeling_llama

count, folder, *args = int(sys.argv[1]), *sys.argv[2:]
ranks = {}
for rank in range(count):
    if pid := os.fork():
        ranks[pid] = rank
        continue
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/process-{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    try:
        exec(compile(open(f"{folder}/code.py").read(), "<string>", "exec"), globals())
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(1)
statuses, ends = {}, float("inf")
while len(statuses) < count and time.monotonic() < ends:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if not pid:
        time.sleep(0.02)
        continue
    statuses[ranks[pid]] = os.waitstatus_to_exitcode(status)
    if status:  # the others notice soon, or never
        ends = min(ends, time.monotonic() + 10)
print(*(statuses.get(rank, "unfinished") for rank in range(count)))
"""
_BEFORE = """
    import datetime, json, os, sys, warnings
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    said = {}
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

"""A process that is killed ends the whole job, and the training goes on from where it was kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT

pytestmark = pytest.mark.slow

_SCRIPT = """
import datetime, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from tests.distillation.trained_together import SETTINGS, student, train, BATCHES, VALIDATION
from tests.training_callbacks import BeforeSteps
file, out, dies, resume = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"
torch.set_num_threads(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends the others, mostly before they can speak
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
def kill(progress):
    if progress.step == dies and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
made = student(0.2)
trained = train(made, BATCHES, VALIDATION, replace(SETTINGS, checkpoint_minutes=0.0), checkpoint_file=file, callbacks=[BeforeSteps(kill)], resume=resume)
torch.save([*made.parameters().values(), torch.tensor([row["distance"] for row in trained.history])], f"{out}-{dist.get_rank()}.pt")
dist.barrier()
os._exit(0)
"""  # noqa: E501


def launch(folder: Path, name: str, dies: int, resume: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(_SCRIPT)
    given = [folder / "script.py", folder / f"{name}.training", folder / name, dies, resume]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, given)],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=200,
    )  # fmt: skip


@pytest.mark.long
def test_a_killed_process_ends_the_job_and_it_goes_on(tmp_path: Path) -> None:
    assert launch(tmp_path, "whole", dies=99).returncode == 0
    killed = launch(tmp_path, "killed", dies=2)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in killed.stderr and "rank      : 1 (local_rank: 1)" in killed.stderr
    assert "Process 0 of 2 has lost the others in train" in killed.stderr
    assert "restart all of them" in killed.stderr
    assert not list(tmp_path.glob("killed-*.pt"))
    gone_on = launch(tmp_path, "killed", dies=99, resume="resume")
    assert gone_on.returncode == 0, gone_on.stderr
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "killed"))
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))

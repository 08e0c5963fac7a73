"""Under DDP and FSDP2: two processes measure together what one measures alone, and surgery on shards is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_refuse_surgery(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.two_processes", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    one, ddp, fsdp = ([json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("one", "ddp", "fsdp"))
    assert [line["step"] for line in one] == [1, 3]
    for found in (ddp, fsdp):
        assert [line["tokens"] for line in found] == [30, 30]
        for mine, theirs in zip(found, one, strict=True):
            for name in ("cosine", "change", "norm", "median_norm", "largest_norm", "gradient_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    for rank in range(2):
        told = (tmp_path / f"refused-{rank}.txt").read_text()
        assert "fully_shard already. Expected a plain model" in told
        told = (tmp_path / f"parallel-{rank}.txt").read_text()
        assert "divided among processes" in told and "Pass the group" in told

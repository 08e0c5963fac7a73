"""A process that is killed while it records continues to the files of a run that was not interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

# Imports take seconds, so the processes that are killed are forks of one that has imported everything. Each records
# until SIGKILL ends it after a random time, or until it is done.
_SCRIPT = """
import os, random, shutil, signal, sys, time
import torch
from pathlib import Path
from streamline_hooks.recording import ActivationStore
from tests.recording.test_activation_store_killed import recording
torch.set_num_threads(1)
folder, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
kills = 0
for attempt in range(400):
    child = os.fork()
    if not child:
        recording(folder)
        os._exit(0)
    time.sleep(random.uniform(0.2, 1.0) * seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and kills >= 2:
        break
    if os.WIFEXITED(status):  # too fast to be killed: start again
        shutil.rmtree(folder)
        kills, seconds = 0, seconds / 2
        continue
    kills += 1
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    print("killed", names and sorted(names)[-1], any(".writing" in n for n in names))
    seconds *= 1.2
print("exit", os.waitstatus_to_exitcode(status), "after", kills)
"""


def recording(folder: Path) -> None:
    """Record 24 batches with left padding into 12 shards."""
    import torch

    from streamline_hooks.recording import ActivationStore
    from tests.tiny_models import left_padded, tiny_model

    batches = [left_padded(3, 9, seed=k) for k in range(24)]
    store = ActivationStore(folder, shard_bytes=5000)
    store.record(tiny_model("llama"), batches, blocks=[1, -1], dtype=torch.bfloat16)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.long
def test_after_any_kill_the_run_continues_to_the_same_files(tmp_path: Path) -> None:
    started = time.monotonic()
    recording(tmp_path / "whole")
    seconds = time.monotonic() - started
    (tmp_path / "script.py").write_text(_SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "script.py", tmp_path / "parts", 0.5 * seconds, 0]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=500,
    )  # fmt: skip
    assert "exit 0 after" in result.stdout, (result.stdout, result.stderr)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) > 10

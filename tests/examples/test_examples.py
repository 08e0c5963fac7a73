"""The examples run as they are written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(command: list[str] | str, folder: Path, **environment: str) -> str:
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, shell=isinstance(command, str), capture_output=True, text=True, timeout=400,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_training_script(tmp_path: Path) -> None:
    script = str(EXAMPLES / "train_with_monitor.py")
    options = ["--steps", "9", "--every", "2", "--remove-at", "4", "--output", str(tmp_path / "out")]
    told = run([sys.executable, script, *options], tmp_path, TQDM_DISABLE="1")
    assert "removing block" in told and "saved a model of 7 blocks in" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / "states.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["influence"])) for line in lines] == [(1, 8), (3, 8), (5, 7), (7, 7), (9, 7)]
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["num_hidden_layers"] == 7


def steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load((EXAMPLES / "ci" / "github-actions.yml").read_text())
    return workflow["jobs"]["blocks"]["steps"]


@pytest.mark.long
@pytest.mark.slow
def test_the_ci_file(tmp_path: Path) -> None:
    """Every command of it, in order, but the installation, which has been made."""
    for name in ("my_block.py", "test_my_block.py"):
        shutil.copy(EXAMPLES / "ci" / name, tmp_path)
    commands = [step["run"] for step in steps() if "run" in step]
    assert commands[0].startswith("pip install streamline_hooks")
    told = [run(command, tmp_path) for command in commands[1:]]
    assert "6 passed" in told[0]
    assert "FAILED" not in told[2] and told[2].count("ok ") >= 9

"""The command compress, started by torchrun or accelerate in two processes: one model, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamline_hooks import StreamlineError, load
from streamline_hooks.core import process_group
from tests.processes import ROOT

_OPTIONS = ["--remove", "1", "--shortlist", "2", "--sequence-length", "64", "--loss", "kl", "--learning-rate", "1e-3"]
_OPTIONS += ["--calibration-tokens", "1600", "--validation-tokens", "320", "--test-tokens", "320"]


def run(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, "-m", "streamline_hooks", "compress", *map(str, arguments), *_OPTIONS]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=200)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_write_what_one_writes(stories_folder: Path, story_texts: list[str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in story_texts))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # Without --multi_gpu accelerate starts two processes on CPUs by MPI only; with it, as on several GPUs.
    launched = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launched += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    reports, spoken = [], []
    for name, launcher in (("one", []), ("two", two), ("launched", launched)):
        done = run(launcher, stories_folder, "--output", tmp_path / name, "--calibration", texts)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        spoken.append([line.split()[0] for line in done.stdout.splitlines() if line.strip()])
    one, *others = reports
    for both in others:
        assert [row["windows"] for row in one["candidates"]] == [row["windows"] for row in both["candidates"]]
        kls = [row["distance"] for row in one["candidates"]]
        assert [row["distance"] for row in both["candidates"]] == pytest.approx(kls, rel=1e-6)
        assert both["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
        assert both["training"]["distance"] == pytest.approx(one["training"]["distance"], rel=1e-6)
    assert spoken[0] == spoken[1] == spoken[2] and "trained" in spoken[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launched", "one", "texts.jsonl", "two"]
    refused = run(two, stories_folder, "--output", tmp_path / "one", "--calibration", texts)
    assert refused.returncode != 0 and "not empty. Choose" in refused.stderr


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_compress_block_by_block_as_one(
    stories_folder: Path, story_texts: list[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in story_texts))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    given = ["compress", stories_folder, "--calibration", texts, "--repair", "folded", "--dtype", "bfloat16"]
    given += ["--memory", "8GB", *_OPTIONS[:6], *_OPTIONS[10:]]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    spoken = []
    for name, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, "-m", "tests.cli.blockwise_command", *given, "--output", tmp_path / name]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=500
        )
        assert done.returncode == 0, done.stderr
        spoken.append(done.stdout)
    assert "8.00 GB of memory are allowed: the model is compressed block by block" in spoken[0]
    assert spoken[1].count("4.00 GB of memory are allowed for each of 2 processes: the model is compressed") == 1
    one, both = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert [row["windows"] for row in one["candidates"]] == [row["windows"] for row in both["candidates"]]
    assert both["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    mine, theirs = (load(tmp_path / name, dtype="auto").state_dict() for name in ("one", "two"))
    for name, weight in mine.items():
        assert weight.dtype == theirs[name].dtype == torch.bfloat16
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "texts.jsonl", "two"]


@pytest.mark.long
@pytest.mark.slow
def test_a_dry_run_that_fails_ends_in_both(stories_folder: Path, tmp_path: Path) -> None:
    """The first alone says what it costs; the other would wait for it for an hour."""
    texts = tmp_path / "few.jsonl"
    texts.write_text(json.dumps({"text": "A short text, and no more than that. " * 3}) + "\n")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(two, stories_folder, "--output", tmp_path / "out", "--calibration", texts, "--dry-run")
    assert done.returncode != 0 and "usable tokens" in done.stderr and "Process 0 of 2: " in done.stderr


def test_one_process_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as speaks:
        assert speaks and not dist.is_initialized()


def test_several_that_cannot_find_one_another_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    text = r"several processes.*RANK and MASTER_ADDR and MASTER_PORT"
    with pytest.raises(StreamlineError, match=text), process_group():
        pass


def test_a_group_that_is_there_is_used_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it is somebody else's"))
    with process_group() as speaks:
        assert not speaks

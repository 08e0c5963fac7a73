"""Two processes compress a checkpoint block by block as one does, each on its share of the text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.checkpoint.block_by_block import compressible
from tests.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("together")
    compressible(folder)
    command = [sys.executable, "-m", "tests.pipeline.checkpoint_together", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("one", "0", "1")}
    return {**loaded, "folder": folder}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_processes_find_what_one_does(found: dict[str, Any], rank: str) -> None:
    two, one = found[rank], found["one"]
    assert two["removed"] == one["removed"] and two["windows"] == one["windows"]
    assert two["distances"] == pytest.approx(one["distances"], rel=1e-6)
    assert two["perplexities"] == pytest.approx(one["perplexities"], rel=1e-6)
    assert int(two["sums"]["similarity"][0].numel()) and two["sums"].keys() == one["sums"].keys()
    for name, value in two["sums"].items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(one["sums"][name]), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(two["maps"], one["maps"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_both_hold_the_same_bits(found: dict[str, Any]) -> None:
    first, second = found["0"], found["1"]
    assert first["distances"] == second["distances"] and first["perplexities"] == second["perplexities"]
    for mine, theirs in zip(first["maps"], second["maps"], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_interrupted_run_continues_in_both(found: dict[str, Any]) -> None:
    """Also if one of them does not have the result of a step that the other has written."""
    for rank in ("0", "1"):
        assert "Interrupted" in found[rank]["said"]
        assert found[rank]["kept"] == ["rank_0/profile.safetensors", "rank_1/profile.safetensors"]
    assert not (found["folder"] / "work").exists()

"""The command compress with a model that does not fit into the memory that is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import load
from streamline_hooks.cli.parsing import parse_bytes
from streamline_hooks.core import StreamlineError
from streamline_hooks.pipeline import checkpoint_bytes, fits_in_memory, state_memory_left
from streamline_hooks.testing import tiny_model
from tests.commands import run, without_repeated

Command = Callable[..., tuple[int, str, str]]
SMALL = [
    "--remove", "1", "--calibration-tokens", "1024", "--validation-tokens", "256", "--test-tokens", "256",
    "--sequence-length", "64", "--shortlist", "2", "--memory", "4GB",
]  # fmt: skip


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits, as far as its size goes."""
    monkeypatch.setattr("streamline_hooks.pipeline.cost.fits_in_memory", lambda folder, memory: False)


@pytest.fixture
def command(
    stories: Any, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run the command on stories260k: its exit code, what it wrote, and what it complained of, on one line."""

    def call(*options: Any, model: Any = stories_folder) -> tuple[int, str, str]:
        code, out, err = run(["compress", model, *map(str, options)], monkeypatch, capsys)
        return code, out, " ".join(err.split())

    return call


def table_in(out: str) -> dict[str, dict[str, str]]:
    """What is read, written and kept in each stage."""
    rows = {line.split()[0]: re.findall(r"[\d.]+ [GM]B", line) for line in out.splitlines() if line.strip()}
    return {
        name: dict(zip(("reads", "writes", "states"), row, strict=True)) for name, row in rows.items() if len(row) == 3
    }


def test_a_dry_run_says_what_it_takes_and_writes_nothing(command: Command, too_large: None, tmp_path: Path) -> None:
    code, out, err = command("-o", tmp_path / "out", *SMALL, "--dry-run")
    assert code == 0, err
    assert "4.00 GB of memory are allowed: the model is compressed block by block" in out
    assert not list(tmp_path.iterdir())
    whole = table_in(out)
    assert all(not whole[stage]["writes"].startswith("0.0 ") for stage in ("rank", "verify", "measure"))  # all in files


def test_an_estimate_is_printed_as_json(
    too_large: None, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sizes = SMALL[:-2]
    for given in (["plan", stories_folder, *sizes], ["compress", stories_folder, "-o", "out", *sizes, "--dry-run"]):
        code, out, err = run([*given, "--json"], monkeypatch, capsys)
        assert code == 0 and "block by block" in err, err
        found = json.loads(out)
        assert {"rank", "verify", "measure"} <= {stage["name"] for stage in found["stages"]}
        assert found["weights"] == checkpoint_bytes(stories_folder) and found["memory"] > 0
        assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert not list(tmp_path.iterdir())


def test_it_writes_what_the_model_in_memory_would_be(
    command: Command, too_large: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    code, out, err = command("-o", one, *SMALL)
    assert code == 0, err
    assert "block by block" in out and "\ncollapse   was not looked for, since that takes both models in memory" in out
    monkeypatch.undo()
    code, out, err = command("-o", other, *SMALL)
    assert code == 0, err
    assert "block by block" not in out and "not looked for" not in out
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    assert reports[0]["candidates"][0]["distance"] == pytest.approx(reports[1]["candidates"][0]["distance"], rel=1e-4)
    found, expected = (load(folder).state_dict() for folder in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    assert (one / "report.html").is_file()
    assert not list(tmp_path.glob(".one*"))


@pytest.mark.long
@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--search", "attention"]])
def test_options_are_those_in_memory(
    command: Command, too_large: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    code, out, err = command("-o", one, *SMALL, *options)
    assert code == 0 and "block by block" in out, err
    monkeypatch.undo()
    code, out, err = command("-o", other, *SMALL, *options)
    assert code == 0 and "block by block" not in out, err
    found, expected = (load(folder, dtype="auto").state_dict() for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype == (torch.bfloat16 if "--dtype" in options else torch.float32)
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.long
def test_it_takes_a_mixture_of_what_is_there(
    command: Command, too_large: None, tmp_path: Path, story_texts: list[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n\n".join(story_texts))
    code, out, err = command("-o", tmp_path / "out", *SMALL, "-c", f"{texts}:0.5,pydoc:0.5")
    assert code == 0, err
    assert "block by block" in out and f"calibration is {texts} 512, pydoc 512 tokens (50.0 %, 50.0 %)" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--loss", "kl"], "distillation"),
        (["-c", "chat:0.5,pydoc:0.5"], "generated text"),
        (["-c", "self"], "generated text"),
        (["--criterion", "kl"], "the criterion kl"),
        (["--remove", "latency:0.9"], "the target latency:0.9"),
        (["--trust-remote-code"], "running the code of a checkpoint"),
    ],
)
def test_what_is_not_done_block_by_block_is_refused_by_its_name(
    command: Command, too_large: None, tmp_path: Path, options: list[str], named: str
) -> None:
    code, _, err = command("-o", tmp_path / "out", *without_repeated(SMALL, options))
    assert code == 2
    assert f"these settings need the whole model in memory: {named}" in err


def test_what_is_free_may_do_where_nothing_was_allowed(command: Command, too_large: None, tmp_path: Path) -> None:
    code, out, err = command("-o", tmp_path / "out", *SMALL[:-2], "--loss", "kl", "--dry-run")
    assert code == 0, err
    assert "but is loaded, because these settings need the whole model in memory: distillation" in out


def test_memory_is_for_a_folder(command: Command, tmp_path: Path) -> None:
    code, _, err = command("-o", tmp_path / "out", "--memory", "1GB", model="smollm2")
    assert code == 2
    assert "--memory was given, but" in err and "safetensors" in err


def test_sizes_are_read_and_nonsense_is_refused() -> None:
    assert [parse_bytes(t) for t in ("1", "2k", "2 KiB", "0.5GB")] == [1, 2000, 2048, 500_000_000]
    for text in ("", "GB", "0", "-1GB", "2GB please"):
        with pytest.raises(StreamlineError, match=r"Expected.*2GB"):
            parse_bytes(text)


def test_a_model_fits_by_the_size_of_its_files(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    size = checkpoint_bytes(tmp_path)
    assert size > 0
    assert fits_in_memory(tmp_path, 2 * size)
    assert not fits_in_memory(tmp_path, size)


def test_memory_that_does_not_hold_one_block_is_refused_with_what_would() -> None:
    with pytest.raises(StreamlineError, match=r"--memory 0.00GB.*Expected at least \d+\.\d\dGB"):
        state_memory_left(0, 1000)
    assert state_memory_left(0, 2**40) - state_memory_left(2**30, 2**39) == pytest.approx(2**39 + 2**30, rel=1e-3)

"""Commands that fail: one line and exit code 2, never a traceback; 130 for what Ctrl-C ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import run

DEEP = "[" * 200_000


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def changed(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def with_index(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def void(value: object) -> None:
    """Drop a value."""


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights-truncated": truncated("model.safetensors"),
    "weights-empty": written("model.safetensors", b""),
    "weights-missing": lambda folder: (folder / "model.safetensors").unlink(),
    "config-truncated": truncated("config.json"),
    "config-deep": written("config.json", DEEP.encode()),
    "config-list": written("config.json", b"[{}]"),
    "config-not-utf8": written("config.json", b"\xff\xfe{}"),
    "config-wrong-type": changed(hidden_size="wide"),
    "config-other-size": changed(hidden_size=16),
    "config-nonsense-type": changed(model_type=3),
    "tokenizer-truncated": truncated("tokenizer.json"),
    "tokenizer-deep": written("tokenizer.json", DEEP.encode()),
    "index-truncated": with_index('{"weight_map": {'),
    "index-deep": with_index(DEEP),
    "index-list": with_index("[{}]"),
}
COMMANDS: dict[str, list[str]] = {
    "compress": ["DIR", "-o", "OUT", "--calibration", "TEXT", "--remove", "1"],
    "generate": ["DIR", "Once"],
    "evaluate": ["DIR", "--text", "TEXT"],
    "rank": ["DIR", "--calibration", "TEXT"],
    "sweep": ["DIR", "-o", "OUT", "--calibration", "TEXT", "--remove", "1", "--repair", "none"],
    "inspect": ["DIR"],
    "check": ["DIR"],
    "diff": ["DIR", "DIR"],
    "export": ["DIR", "--to", "plain", "-o", "OUT"],
}
NO_TOKENIZER = ("check", "diff", "inspect")  # commands that need none


@pytest.fixture()
def copied(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "model", copy_function=shutil.copyfile))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_model_is_refused_in_one_line(
    command: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 50)
    whole = tmp_path / "whole"
    copied.rename(whole)
    wrong = []
    for name, damage in DAMAGE.items():
        if name.startswith("tokenizer") and command in NO_TOKENIZER:
            continue
        folder, output = tmp_path / name, tmp_path / f"out-{name}"
        shutil.copytree(whole, folder)
        damage(folder)
        before = {path.name: path.stat().st_size for path in folder.iterdir()}
        places = {"DIR": folder, "OUT": output, "TEXT": text}
        try:
            code, _, printed = run([command, *(places.get(a, a) for a in COMMANDS[command])], monkeypatch, capsys)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error!s:.200}")
            continue
        if code != 2 or "Traceback" in printed or "streamline-hooks: " not in printed:
            wrong.append(f"{name}: exit code {code}, {printed[-300:]!r}")
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == before
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", None], ids=["not-utf8", "empty", "missing"])
@pytest.mark.parametrize("command", ["compress", "evaluate", "rank"])
def test_text_that_cannot_be_read(
    command: str,
    content: bytes | None,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    places = {"DIR": stories_folder, "OUT": tmp_path / "out", "TEXT": text}
    code, _, printed = run([command, *(places.get(a, a) for a in COMMANDS[command])], monkeypatch, capsys)
    assert code == 2
    assert "text.txt" in printed


def test_all_of_what_transformers_says_is_shown(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in copied.glob("*token*"):
        file.unlink()
    code, _, printed = run(["generate", copied, "Once"], monkeypatch, capsys)
    assert code == 2
    assert "from one of:." not in printed
    assert len(printed.strip().splitlines()) == 1
    assert "sentencepiece" in printed or "tokenizer" in printed.split("Expected")[0]


def test_gguf_without_its_package_names_the_extra(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, printed = run(["export", stories_folder, "--to", "gguf", "-o", tmp_path / "m.gguf"], monkeypatch, capsys)
    assert code == 2
    assert "streamline_hooks[gguf]" in printed


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_ctrl_c_is_exit_code_130(
    command: str, stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamline_hooks.cli.inspect.load_without_tokenizer", interrupted)
    code, _, printed = run([command, stories_folder, *COMMANDS[command][1:]], monkeypatch, capsys)
    assert code == 130
    assert "interrupted" in printed


@pytest.mark.parametrize("rounds", [1, 2])
def test_ctrl_c_in_a_training_run_is_exit_code_130_and_names_what_is_kept(
    rounds: int,
    stories_folder: Path,
    story_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, out, steps = tmp_path / "text.txt", tmp_path / "out", []
    text.write_text("\n\n".join(story_texts))
    backward = torch.Tensor.backward

    def interrupted(self: Any, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return backward(self, *given)

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    command = [
        "compress", stories_folder, "-o", out, "--remove", rounds, "--loss", "kl", "--rounds", rounds,
        "--calibration", text, "--calibration-tokens", 4_000, "--validation-tokens", 600, "--test-tokens", 600,
        "--sequence-length", 64, "--shortlist", 1,
    ]  # fmt: skip
    code, shown, printed = run(command, monkeypatch, capsys)
    assert code == 130, printed
    assert "nterrupted" in shown + printed
    assert "--resume" in shown if rounds == 1 else "resume" in printed
    assert str(out) in shown + printed
    assert (out / "config.json").is_file() == (rounds == 1)
    assert list(tmp_path.glob("out*.training*"))


def run_with_closed_pipe(*arguments: Any) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is a pipe that nobody reads."""
    command = [sys.executable, "-m", "streamline_hooks", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        return process.wait(timeout=300), process.stderr.read()


@pytest.mark.long
def test_a_compression_is_finished_although_nobody_reads_its_output(stories_folder: Path, tmp_path: Path) -> None:
    sizes = ["--calibration-tokens", 1280, "--validation-tokens", 128, "--test-tokens", 128, "--sequence-length", 64]
    given = ["compress", stories_folder, "-o", tmp_path / "out", "--remove", 1, "--no-speed", "--no-generation", *sizes]
    code, err = run_with_closed_pipe(*given)
    assert code == 0 and "BrokenPipe" not in err, err
    assert (tmp_path / "out" / "report.json").is_file() and (tmp_path / "out" / "report.html").is_file()


def test_a_command_that_only_prints_ends_if_nobody_reads_its_output(stories_folder: Path) -> None:
    code, err = run_with_closed_pipe("inspect", stories_folder)
    assert code == 141 and "BrokenPipe" not in err, err

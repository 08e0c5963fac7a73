"""``--calibration`` of the commands: mixtures, text that the model writes, and what is refused by its name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run

Command = Callable[..., tuple[int, str, str]]
SIZES = ["--sequence-length", "64", "--calibration-tokens", "640"]
ALL_SIZES = [*SIZES, "--validation-tokens", "256", "--test-tokens", "256"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command: its exit code, what it printed, and what it complained of, on one line."""

    def call(*options: Any) -> tuple[int, str, str]:
        code, out, err = run(list(options), monkeypatch, capsys)
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def instruct(stories_folder: Path, tmp_path: Path) -> Path:
    """A model that answers any question with a story."""
    folder = tmp_path / "models" / "instruct"
    shutil.copytree(stories_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }} Once upon a time")
    return folder


@pytest.fixture
def texts(story_texts: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in story_texts))
    return file


@pytest.mark.long
def test_a_mixture_of_what_is_there_and_what_the_model_writes(
    command: Command, instruct: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made" / "out"
    output.parent.mkdir()
    asked = ["-c", f"self:0.25,chat:0.25,{texts}:0.5", "--temperature", "0.9"]
    options = ["--remove", "1", "--shortlist", "1", "-o", output, *ALL_SIZES]
    code, out, err = command("compress", instruct, *options, *asked)
    assert code == 0, err
    # A quarter of 10 sequences is 2.5: one of the two sources has the odd one.
    assert f"calibration is self 192, chat 128, {texts} 320 tokens (30.0 %, 20.0 %, 50.0 %)" in out
    assert "calibration 640, validation 256, test 256 tokens in sequences of 64" in out
    cached = sorted(output.parent.glob("self-generated-*.jsonl"))
    assert len(cached) == 2
    rows = [json.loads(line) for file in cached for line in file.read_text().splitlines()]
    whole = [row["text"] for row in rows if row["text"].startswith("<s>")]
    assert len(whole) > len(rows) / 4 and all("Once upon a time" in text for text in whole)
    report = json.loads((output / "report.json").read_text())
    assert any("calibration is self 192" in note for note in report["data"]["notes"])


def test_rank_keeps_what_the_model_writes_beside_its_profile(command: Command, instruct: Path, tmp_path: Path) -> None:
    save = tmp_path / "kept" / "profile"
    save.parent.mkdir()
    asked = ["rank", instruct, "-c", "self:0.5,pydoc:0.5", "--json", *SIZES]
    code, first, err = command(*asked, "--save", save)
    assert code == 0, err
    assert "calibration is self 320, pydoc 320 tokens (50.0 %, 50.0 %)" in err
    (cached,) = save.parent.glob("self-generated-*.jsonl")
    written = cached.stat().st_mtime_ns
    assert command(*asked, "--save", save)[1] == first and cached.stat().st_mtime_ns == written
    assert command(*asked)[1] == first  # without a file it is written again, and the same
    code, other, _ = command(*asked, "--save", save, "--temperature", "1.2")
    assert code == 0 and other != first and len(list(save.parent.glob("self-generated-*.jsonl"))) == 2


def test_a_sweep_and_a_dry_run_take_a_mixture_of_what_is_there(
    command: Command, stories_folder: Path, texts: Path, tmp_path: Path
) -> None:
    mixture = ["-c", f"{texts}:0.75,pydoc:0.25"]
    code, out, err = command("compress", stories_folder, "-o", tmp_path / "out", "--dry-run", *ALL_SIZES, *mixture)
    assert code == 0, err
    assert f"calibration is {texts} 512, pydoc 128 tokens" in out
    options = ["--remove", "1", "--repair", "none", "--no-speed", "--shortlist", "1", *ALL_SIZES]
    sweep = ["sweep", stories_folder, "-o", tmp_path / "swept", *options]
    code, out, err = command(*sweep, *mixture)
    assert code == 0, err
    assert f"calibration is {texts} 512, pydoc 128 tokens" in out
    assert "fingerprint" not in command(*sweep, *mixture)[1]  # it was measured already
    assert "fingerprint" in command(*sweep, "-c", f"{texts}:0.5,pydoc:0.5")[1]  # this was not


REFUSED = [
    (["compress", "M", "-c", "self:0.5,pydoc:0.4"], r"'self:0.5,pydoc:0.4'.*0.9.*sum of 1"),
    (["compress", "M", "-c", "self:0.5,pydoc"], "none for 'pydoc'"),
    (["compress", "M", "-c", "self:0.5,pydoc:0.5", "-c", "x"], "Write one mixture"),
    (
        ["compress", "M", "-c", "chat", "-c", "pydoc"],
        r"'chat'.*only source.*give --calibration chat:0.5,pydoc:0.5",
    ),
    (["compress", "M", "-c", "chat", "--dry-run"], r"--calibration chat.*an estimate, which generates no text"),
    (["compress", "M", "-c", "self:0.5,pydoc:0.5", "--dry-run"], "an estimate, which generates no text"),
    (["plan", "M", "-c", "chat"], r"an estimate, which generates no text.*Leave it out; compress"),
    (["compress", "M", "-c", "chat", "--pack"], "does not go with --calibration chat"),
    (["compress", "M", "--temperature", "0.5"], r"--temperature 0.5 has no effect"),
    (["compress", "M", "-c", "self:0.98,pydoc:0.02"], "Request validation_tokens=25600"),
    (["compress", "M", "-c", "chat"], "has no chat template"),
    (["rank", "M", "--temperature", "0.5"], "--temperature 0.5 has no effect"),
    (["rank", "M", "-c", "self", "--dry-run"], "--dry-run, which generates no text"),
    (["rank", "M", "-c", "chat"], "has no chat template"),
    (["sweep", "M", "-c", "self:0.5,pydoc:0.5"], "sweep, which generates no text"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED, ids=lambda o: " ".join(o) if isinstance(o, list) else "")
def test_what_is_refused(command: Command, stories_folder: Path, tmp_path: Path, options: list[str], text: str) -> None:
    given = [str(stories_folder) if option == "M" else option for option in options]
    given += [] if options[0] in ("rank", "plan") else ["-o", str(tmp_path / "out")]
    code, _, err = command(*given)
    assert code == 2 and re.search(text, err), err
    assert not list(tmp_path.iterdir())


def test_a_folder_called_chat_is_no_conversation(
    command: Command, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat").mkdir()
    code, _, err = command("rank", stories_folder, "-c", "chat")
    assert code == 2 and re.search(r"'chat'.*Write \./chat", err)
    code, _, err = command("rank", stories_folder, "-c", "./chat")
    assert code == 2 and re.search(r"No text.*'\./chat'", err)

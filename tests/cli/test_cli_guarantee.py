"""``--at-most`` of the command line: the documents of the statement, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import run

SIZES = ["--sequence-length", "64", "--calibration-tokens", "640", "--validation-tokens", "256", "--test-tokens", "256"]


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_the_card_states_what_held_on_other_documents(
    stories_folder: Path,
    story_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts, unseen = (write(tmp_path / f"{name}.jsonl", story_texts[half::2]) for half, name in enumerate(("a", "b")))
    command = ["compress", stories_folder, "-c", texts, "--remove", "1", "-o", tmp_path / "out", *SIZES]
    code, out, err = run([*command, "--at-most", "kl:0.999", "--guarantee-text", unseen], monkeypatch, capsys)
    assert code == 0, err
    count = len(set(story_texts[1::2]))
    assert f"({count} documents" in (tmp_path / "out" / "README.md").read_text() and f"({count} documents" in out
    code, _, err = run(
        [*command, "--overwrite", "--at-most", "kl:0.999", "--guarantee-text", texts], monkeypatch, capsys
    )
    assert code == 2 and "also among" in err
    code, _, err = run(
        [*command, "--overwrite", "--at-most", "kl:0.0001", "--guarantee-text", unseen], monkeypatch, capsys
    )
    assert code == 2 and "For kl, more than a million units would be needed" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at-most", "kl:0.2"], "--at-most was given for kl without --guarantee-text"),
        (["--at-most", "kl:0.2,accuracy_drop:0.1", "--guarantee-text", "x"], "--guarantee-tasks"),
        (["--guarantee-text", "x"], "--guarantee-text was given without a limit that it is for"),
        (
            ["--at-most", "kl:0.2", "--guarantee-text", "x", "--guarantee-tasks", "y"],
            "--guarantee-tasks was given without",
        ),
        (["--at-most", "kl:0.2,kl:0.3", "--guarantee-text", "x"], "each name once"),
        (["--at-most", "kl"], "'kl' is invalid"),
        (["--at-most", "ppl:0.2", "--guarantee-text", "x"], "accuracy_drop, disagreement, kl"),
    ],
)
def test_limits_and_documents_belong_together(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(["compress", "model", "-o", tmp_path / "out", *options], monkeypatch, capsys)
    assert code == 2 and message in " ".join(err.split()), err

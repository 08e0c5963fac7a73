"""The command compress with a budget of time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import RunOptions, StreamlineError, compress, profile
from streamline_hooks.cli.parsing import parse_duration
from streamline_hooks.pipeline import plan_training
from tests.commands import run, without_repeated
from tests.tiny_models import tiny_model
from tests.training_callbacks import RaiseAt

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    stories_folder: Path,
    story_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Run the command on stories260k and a little text: its exit code, what it wrote, and what it complained of."""
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in story_texts[:20]))
    fixed = ["-o", tmp_path / "out", "--remove", 1, "--sequence-length", 64, "-c", file]

    def call(*options: Any) -> tuple[int, str, str]:
        code, out, err = run(["compress", stories_folder, *without_repeated(fixed, options)], monkeypatch, capsys)
        return code, out, " ".join(err.split())

    return call


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("1h", 3600), ("90s", 90), ("1h30m", 5400), (" 1.5H ", 5400), ("1h 2m 3s", 3723), ("0h5m", 300)],
)
def test_a_span_of_time_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-5m", "1d", "10m1h", "", "0m", "1:30", "ten minutes", "1e3s", "5mm"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"Expected.*10m.*1h"):
        parse_duration(text)


def test_a_dry_run_says_the_plan_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--budget", "1h", "--dry-run")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("budget     60.0 min: swiglu, trained on ")
    assert lines[1].startswith("text       takes only")
    stages = ["plan", "prepare", "rank", "fit", "verify", "train", "evaluate", "generate", "save", "total"]
    assert [line.split()[0] for line in lines[2:]] == ["stage", *stages, "resume"]
    assert not (tmp_path / "out").exists() and "train on" not in err


def test_what_is_planned_is_done(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--budget", "1h", "--batch-size", 4, "--test-tokens", 320)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    data, trained = report["data"], report["training"]
    assert f"trained on {data['calibration_tokens']:,} tokens, 4 epochs" in out.splitlines()[0]
    assert f"fitted on {data['fitting_tokens']:,}, verified on {data['validation_tokens']:,}, tested on 320\n" in out
    assert data["test_tokens"] == 320
    assert re.search(r"\ntaken      \d+\.\d min, \d+% of the budget", out)
    assert trained["tokens"] == 4 * data["calibration_tokens"] and trained["stopped"] == ""
    assert report["kind"] == "swiglu" and report["plan"]["removed"] != [4], "nothing behind it could be healed"
    assert not (tmp_path / "out.training").exists()


@pytest.mark.long
def test_an_interrupted_training_is_resumed_with_the_options_of_the_plan(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if a plan made now would be another one: all that the plan decided is in the line."""

    class Killed(BaseException):
        pass

    def planned(*given: Any, **options: Any) -> Any:
        found = plan_training(*given, **options)
        training = replace(found.config.distillation, checkpoint_minutes=0.0, epochs=1, validations=3)
        return replace(found, config=replace(found.config, distillation=training))

    monkeypatch.setattr("streamline_hooks.pipeline.job.plan_training", planned)
    few = ("--shortlist", 2, "--protect", 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(*given: Any, options: RunOptions, **more: Any) -> Any:
            return compress(*given, options=replace(options, callbacks=[RaiseAt(5, Killed)]), **more)

        patch.setattr("streamline_hooks.pipeline.job.compress", killed)
        command("--budget", "1h", *few)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resume "))
    options = line.partition("--budget and --protect by: ")[2].split()
    assert "--protect=0,-1" in options
    code, _, err = command(*few[:2], *options)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["tokens"] == report["data"]["calibration_tokens"]
    assert len(report["training"]["history"]) == 4


def test_sizes_that_a_file_states_are_kept(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they are the default values."""
    calls: list[tuple[int, dict[str, int]]] = []

    def stop(*given: Any, sizes: dict[str, int], **options: Any) -> Any:
        calls.append((given[3].hardware.batch_size, sizes))
        raise StreamlineError("planned")

    monkeypatch.setattr("streamline_hooks.pipeline.job.plan_training", stop)
    (file := tmp_path / "config.yaml").write_text(
        "hardware: {batch_size: 4}\ndata: {test_tokens: 12288}\ndistillation: {loss: {kl: 1.0}}\nrepair: {kind: swiglu}"
    )
    for options in ([], ["--config", file], ["--config", file, "--test-tokens", 640]):
        code, _, err = command("--budget", "1h", *options)
        assert code == 2 and "planned" in err
    assert calls == [(1, {}), (4, {"test": 12288}), (4, {"test": 640})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "10"], r"'10'.*Expected.*units.*10m, 1h, 90s or 1h30m"),
        (["--budget", "1s"], r"1\.0 s is too small.*training tokens"),
        (["--repair", "linear"], "--budget does not go with --repair:"),
        (["--loss", "kl", "--healing", "lora"], "--loss and --healing: .*Leave it out"),
        (["--preset", "iterative"], "has 2 rounds"),
        (["--preset", "none"], "trains nothing"),
        (["--preset", "llm-streamline-ffn", "--healing", "lora"], "go with --healing:"),
        (
            ["--preset", "two-windows", "--remove", "parameters:0.2"],
            r"parameters:0.2.*single windows.*preset best",
        ),
        (["--epochs", "1"], "go with --epochs:"),
        (["--calibration-tokens", "41000"], "go with --calibration-tokens:"),
        (["--fitting-tokens", "640", "--autocast", "bfloat16"], "--fitting-tokens and --autocast:"),
        (["--learning-rate", "0.1"], "go with --learning-rate:"),
        (["--memory", "4GB"], r"--memory.*Leave it out.*--calibration-tokens"),
        (["--resume"], "go with --resume.*from the beginning"),
        (["--search", "mixed"], "go with --search:"),
        (["--repeated-context", "0.5"], "go with --repeated-context:"),
        (["--pack"], "go with --pack:"),
        (["--profile", "p"], "go with --profile:"),
        (["-c", "self"], "does not go with --calibration self"),
        (["-c", "pydoc:0.5,chat:0.5"], "does not go with --calibration chat"),
        (["--criterion", "kl"], "go with --criterion:"),
        (["--task", "image-classification"], r"--budget.*models that generate"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(
    options: list[str], message: str, command: Command, tmp_path: Path
) -> None:
    """Also where it is what would be the case without it: nothing that was said does nothing."""
    if "--profile" in options:
        model = tiny_model("llama")
        options = ["--profile", str(profile(model, [torch.arange(3, 13)[None]]).save(tmp_path / "p"))]
    code, _, err = command(*([] if "--budget" in options else ["--budget", "1h"]), *options)
    assert code == 2 and re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["best", "two-windows"])
def test_the_recipe_may_be_named(name: str, command: Command) -> None:
    code, out, err = command("--budget", "1h", "--preset", name, "--dry-run", "--remove", 2)
    assert code == 0 and "trained on " in out and f"--preset {name} " in out, err


def test_a_part_to_fit_on_is_for_a_training(command: Command, tmp_path: Path) -> None:
    few = ["--calibration-tokens", 1280, "--validation-tokens", 128, "--test-tokens", 128, "--shortlist", 2]
    code, _, err = command(*few, "--fitting-tokens", 640)
    assert code == 2 and re.search(r"--fitting-tokens.*--loss", err)
    code, _, err = command(*few, "--fitting-tokens", 1344, "--loss", "kl")
    assert code == 2 and re.search(r"fitting_tokens=1344.*1,280 calibration tokens.*of 64", err)
    code, _, err = command(*few, "--fitting-tokens", 640, "--loss", "kl", "--repair", "linear")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["tokens"] == 1280 and report["data"]["fitting_tokens"] == 640
    assert "profile: " in err and "640/640" in err, "the window was not chosen on this part alone"

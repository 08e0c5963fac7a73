"""The command compress with a budget of time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import compress
from streamline_hooks.cli.budget import said_again
from streamline_hooks.planning import training_plan_here
from tests.commands import run
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
    fixed = ["-o", tmp_path / "out", "--remove", 1, "--sequence-length", 64]

    def call(*options: Any) -> tuple[int, str, str]:
        text = [] if "-c" in options else ["-c", file]
        code, out, err = run(["compress", stories_folder, *fixed, *text, *options], monkeypatch, capsys)
        return code, out, " ".join(err.split())

    return call


def test_a_dry_run_says_the_plan_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--budget", "1h", "--dry-run")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("budget     60.0 min: swiglu, trained on ")
    assert lines[1].startswith("products   of the training in ")
    for stage in ("plan", "prepare", "rank", "verify", "measure", "train", "compare", "save"):
        assert f"{stage} " in lines[2], stage
    assert "suffices for " in lines[3] and "seen 4 times, so that it will end earlier" in lines[3]
    assert lines[4].startswith("resume     after an interruption, in the place of --budget and --keep: --preset best ")
    assert not (tmp_path / "out").exists() and "train on" not in err


def test_what_is_planned_is_done(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--budget", "1h", "--batch-size", 4, "--test-tokens", 320)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("budget") and "scored on 320" in lines[0], "a plan comes before all else"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    data, trained = report["data"], report["training"]
    assert f"trained on {data['calibration_tokens']:,} tokens 4 times" in lines[0]
    assert (
        f"chosen and fitted on {data['fitting_tokens']:,} of them, judged on {data['validation_tokens']:,}" in lines[0]
    )
    assert data["test_tokens"] == 320
    taken = next(line for line in lines if line.startswith("taken "))
    assert taken.index("% of the budget") < taken.index("plan ") < taken.index("train ") < taken.index("save ")
    assert trained["tokens"] == 4 * data["calibration_tokens"] and trained["stopped"] == ""
    assert report["kind"] == "swiglu" and report["plan"]["removed"] != [4], "nothing behind it could be healed"
    assert not (tmp_path / "out.training").exists()


def test_what_was_planned_is_gone_on_with_as_it_was_said(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a plan made now would be another one: all that the plan decided is in the line."""

    class Killed(BaseException):
        pass

    made: list[Any] = []
    make = training_plan_here.plan_training

    def planned(*given: Any, **options: Any) -> Any:
        plan = make(*given, **options)
        killed = replace(plan.asked.distillation, checkpoint_minutes=0.0)
        made.append(
            replace(
                plan, budget=600.0, asked=replace(plan.asked, distillation=killed),
                sizes=replace(plan.sizes, epochs=1, validations=3),
            )
        )  # fmt: skip
        return made[-1]

    monkeypatch.setattr("streamline_hooks.planning.plan_training", planned)
    few = ("--shortlist", 2, "--keep", 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed = partial(compress, callbacks=[RaiseAt(5, Killed)])
        patch.setattr(import_module("streamline_hooks.pipeline.compress"), "compress", killed)
        command("--budget", "1h", *few)
    options = said_again(made[0], "best").partition("--budget and --keep: ")[2].split()
    assert "--keep=0,-1" in options
    code, _, err = command(*few[:2], *options)
    assert code == 0, err
    trained = json.loads((tmp_path / "out" / "report.json").read_text())["training"]
    assert trained["tokens"] == made[0].sizes.calibration and len(trained["history"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "10"], r"'10'.*Expected.*units.*10m, 1h, 90s or 1h30m"),
        (["--budget", "1s"], r"1 s does not suffice.*training on"),
        (["--kind", "linear"], r"'best'.*--kind would say"),
        (["--train", "kl", "--heal", "lora"], r"--train and --heal would say; leave one"),
        (["--preset", "iterative"], r"--preset iterative.*2 rounds"),
        (["--preset", "none"], r"the config trains nothing"),
        (["--preset", "llm-streamline-ffn", "--heal", "lora"], r"'llm-streamline-ffn'.*--heal would say"),
        (
            ["--preset", "two-windows", "--remove", "parameters:0.2"],
            r"Search for a window.*preset best",
        ),
        (["--epochs", "1"], "--epochs would say"),
        (["--calibration-tokens", "41000"], "--calibration-tokens would say"),
        (["--fitting-tokens", "640", "--autocast"], "--autocast and --fitting-tokens would say"),
        (["--learning-rate", "0.1"], "--learning-rate would say"),
        (["--memory", "4GB"], r"--memory.*Leave it out.*--calibration-tokens"),
        (["--resume"], r"one training, from its beginning"),
        (["--search", "mixed"], "--search would say"),
        (["--repeated", "0.5"], "--repeated would say"),
        (["--pack"], "does not go with --pack"),
        (["--profile", "p"], "does not go with --profile"),
        (["-c", "self"], "does not go with --calibration self"),
        (["-c", "pydoc:0.5,chat:0.5"], "does not go with --calibration chat"),
        (["--criterion", "kl"], "--criterion would say"),
        (["--task", "image-classification"], r"--budget.*models that write"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(
    options: list[str], message: str, command: Command, tmp_path: Path
) -> None:
    """Also where it is what would be the case without it: nothing that was said does nothing."""
    code, _, err = command(*([] if "--budget" in options else ["--budget", "1h"]), *options)
    assert code == 2 and re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["best", "two-windows"])
def test_the_recipe_may_be_named(name: str, command: Command) -> None:
    code, out, err = command("--budget", "1h", "--preset", name, "--dry-run", "--remove", 2)
    assert code == 0 and "trained on " in out and f"--preset {name} " in out, err


def test_a_part_to_fit_on_is_for_a_training(command: Command, tmp_path: Path) -> None:
    few = ["--calibration-tokens", 1280, "--validation-tokens", 128, "--test-tokens", 128, "--shortlist", 2]
    code, _, err = command(*few, "--fitting-tokens", 640)
    assert code == 2 and re.search(r"--fitting-tokens.*--train", err)
    code, _, err = command(*few, "--fitting-tokens", 1344, "--train", "kl")
    assert code == 2 and re.search(r"fitting_tokens=1344.*1,280 tokens.*of 64", err)
    code, _, err = command(*few, "--fitting-tokens", 640, "--train", "kl", "--kind", "linear")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["tokens"] == 1280 and report["data"]["fitting_tokens"] == 640
    assert "profile: " in err and "640/640" in err, "the window was not chosen on this part alone"

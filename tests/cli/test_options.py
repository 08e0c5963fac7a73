"""The options that are generated from the configs: their fields, the help, config files, and how a model is loaded."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, DistillationConfig, LinearConfig, StreamlineError, Target, load
from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli import completion, make_app
from streamline_hooks.cli.config_options import (
    SHORT_FORMS,
    config_options,
    field_texts,
    flag_of,
    read_config,
    written_options,
)
from streamline_hooks.cli.main import COMMANDS
from streamline_hooks.core import Config
from tests.commands import run

NO_CONFIG_FIELD = {
    "--output": "where a result is written",
    "--preset": "a config by name",
    "--config": "a config in a file",
    "--print-config": "prints the config",
    "--calibration": "what text is read",
    "--temperature": "how text is generated for --calibration self",
    "--test": "what text is read",
    "--pack": "how text is read",
    "--calibration-examples": "how many images are read",
    "--validation-examples": "how many images are read",
    "--test-examples": "how many images are read",
    "--profile": "a file that is read",
    "--guarantee-text": "RunOptions.guarantee_data",
    "--guarantee-tasks": "RunOptions.guarantee_data",
    "--budget": "becomes a config by planning",
    "--memory": "whether the model is loaded whole",
    "--resume": "RunOptions.resume",
    "--overwrite": "RunOptions.overwrite",
    "--dry-run": "prints the plan",
    "--json": "how the result is printed",
}
"""The options of compress that are no field of a config, each with the reason."""
SIZES = ["--sequence-length", 64, "--calibration-tokens", 640, "--validation-tokens", 128, "--test-tokens", 128]
LOADS = {
    "compress": ["MODEL", "-o", "OUT", "--remove", 1, "--no-speed", "--no-generation", *SIZES],
    "plan": ["MODEL", "--remove", 1, *SIZES],
    "rank": ["MODEL", *SIZES[:4]],
    "sweep": ["MODEL", "-o", "OUT", "--remove", 1, "--repair", "none", "--no-speed", *SIZES],
    "evaluate": ["MODEL", "--text-tokens", 200, "--prompts", 1, "--no-speed", "--against", "COPY"],
    "generate": ["MODEL", "Once", "--max-new-tokens", 2],
    "inspect": ["MODEL"],
    "check": ["MODEL", "--window", "1:2"],
    "diff": ["MODEL", "MODEL"],
    "export": ["MODEL", "-o", "OUT"],
}
"""The arguments of every command that loads a model."""


def function_of(command: str) -> Any:
    return make_app()[command].default_command


def options_of(command: str) -> dict[str, str]:
    """The path of the config's field of each option of a command, or an empty string."""
    function = function_of(command)
    paths = {option.flag: option.path for option in function.options}
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    flags = [flag_of(p.name, p.annotation) for p in own]
    return {flag: paths.get(flag, "") for flag in flags}


def test_every_option_is_a_field_of_a_config_or_listed_with_the_reason() -> None:
    options = options_of("compress")
    known = {option.path for config in (CompressionConfig, LoadingConfig) for option in config_options(config)}
    assert {flag for flag, path in options.items() if not path} == NO_CONFIG_FIELD.keys()
    assert {path for path in options.values() if path} == known
    assert len(set(options)) == len(options)


def test_every_field_has_an_option_with_its_description() -> None:
    """A field whose docstring was forgotten would have an option without help."""

    def missing(config: type[Config], section: str = "") -> list[str]:
        found = []
        for field in fields(config):
            path = f"{section}{field.name}"
            nested = [option for option in options if option.path.startswith(f"{path}.")]
            here = [option for option in options if option.path == path]
            if not (here or nested) or any(len(option.help) < 10 for option in here):
                found.append(path)
        return found

    options = config_options()
    for config in (CompressionConfig, *(c for c in SHORT_FORMS if c is CompressionConfig)):
        assert not missing(config)
    assert all(field_texts(LoadingConfig).values())
    assert all(option.help for option in config_options(LoadingConfig))
    by_flag = {option.flag: option for option in options}
    assert by_flag["--repeated-context"].path == "data.repeated_context"
    assert by_flag["--seed"].path == "seed" and by_flag["--distillation-seed"].path == "distillation.seed"
    assert by_flag["--learning-rate"].help.startswith("Peak learning rate")


def test_the_help_of_compress_fits_one_screen_and_has_the_ten_most_used_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(["compress", "--help"], monkeypatch, capsys)
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100
    listed = re.findall(r"^│ \*? *(--[a-z-]+)", out, re.MULTILINE)
    assert len(listed) == 10 and {"--output", "--remove", "--repair", "--loss", "--device", "--config"} <= set(listed)
    assert "--help-all" in out


def test_help_all_lists_every_option_in_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for command in COMMANDS:
        code, out, _ = run([command, "--help-all"], monkeypatch, capsys)
        assert code == 0
        assert not [flag for flag in options_of(command) if not re.search(rf"{flag}\b", out)], command
    code, out, _ = run(["compress", "--help-all"], monkeypatch, capsys)
    assert re.findall(r"^╭─ (\w+)", out, re.MULTILINE) == [
        "Arguments", "Config", "Data", "Distillation", "Evaluation", "Hardware", "Loading", "Options", "Repair",
        "Search",
    ]  # fmt: skip
    code, out, _ = run(["compress", "--help"], monkeypatch, capsys)
    assert "--weight-decay" not in out, "the long help stays"


def test_the_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['streamline-hooks', '--help']; from streamline_hooks.cli import main; main()"
    check = "; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "compress" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    from streamline_hooks import __version__

    command = [sys.executable, "-m", "streamline_hooks", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_unknown_commands_and_options_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["comprss", "smollm2"], monkeypatch, capsys)
    assert code == 2 and "'comprss' is unknown" in err and "Did you mean 'compress'?" in err
    code, _, err = run(["compress", "smollm2", "--kind", "linear"], monkeypatch, capsys)
    assert code == 2 and "--kind" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_option_and_starts_no_python(shell: Any) -> None:
    script = completion(shell)
    assert all(option.flag.removeprefix("--") in script for option in config_options())
    assert all(command in script for command in COMMANDS) and "python" not in script.lower()


def test_a_config_file_is_overridden_by_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CompressionConfig(
        remove=3, repair=LinearConfig(rank=4), distillation=DistillationConfig({"kl": 1.0, "lm": 0.5}, epochs=2)
    ).updated({"search.protect": (0, -1), "search.criterion": "cosine", "data.sequence_length": 96})
    for name in ("config.yaml", "config.json"):
        config.save(tmp_path / name)
        given = ["compress", "MODEL", "--config", tmp_path / name, "--print-config"]
        code, out, err = run(given, monkeypatch, capsys)
        assert code == 0, err
        assert CompressionConfig.from_yaml(out) == config
        changed = ["--remove", 2, "--epochs", 3, "--loss", "kl", "--no-speed", "--protect", "0"]
        code, out, err = run([*given, *changed], monkeypatch, capsys)
        assert code == 0, err
        assert CompressionConfig.from_yaml(out) == config.updated(
            {
                "remove": Target(blocks=2),
                "distillation.epochs": 3.0,
                "distillation.loss": {"kl": 1.0},
                "evaluation.speed": False,
                "search.protect": (0,),
            }
        )


def test_options_override_a_config_field_by_field() -> None:
    config = CompressionConfig.preset("best")
    found = read_config({"distillation.epochs": 3, "repair": LinearConfig(rank=8)}, preset="best")
    assert found.repair == LinearConfig(rank=8) and found.distillation is not None
    assert found.distillation.epochs == 3 and found.distillation.loss == config.distillation.loss  # type: ignore[union-attr]
    assert found.healing == config.healing and found.data == config.data
    searched = read_config({"search": ("disjoint", {"windows": 3}), "search.protect": (0,)}, preset="two-windows")
    assert searched.search.windows == 3 and searched.search.protect == (0,)  # type: ignore[attr-defined]
    with pytest.raises(StreamlineError, match="'epoch' is unknown.*Did you mean 'epochs'"):
        config.updated({"distillation.epoch": 3})


def test_the_written_options_make_the_config_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CompressionConfig(
        remove=3, repair=LinearConfig(rank=4), distillation=DistillationConfig({"kl": 1.0, "lm": 0.5}, betas=(0.8, 0.9))
    ).updated({"search.protect": (-1, 0), "evaluation.speed": False, "hardware.autocast": "bfloat16", "seed": 3})
    words = [word for option in written_options(config, CompressionConfig()) for word in shlex.split(option)]
    code, out, err = run(["compress", "MODEL", "--print-config", *words], monkeypatch, capsys)
    assert code == 0, err
    assert CompressionConfig.from_yaml(out) == config


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The data type of each model that a command has loaded."""
    found: list[torch.dtype] = []

    def to_device(self: LoadingConfig, model: Any) -> Any:
        found.append(next(model.parameters()).dtype)
        return model

    monkeypatch.setattr(LoadingConfig, "to_device", to_device)
    return found


def arguments_of(command: str, model: Path, out: Path) -> list[Any]:
    words = {"MODEL": model, "OUT": out, "COPY": out.with_name("copy")}
    if "COPY" in LOADS[command]:
        shutil.copytree(model, words["COPY"], copy_function=shutil.copyfile)
    return [command, *(words.get(word, word) for word in LOADS[command])]


@pytest.mark.sample(3)
@pytest.mark.parametrize("command", LOADS)
def test_the_dtype_reaches_the_model_and_json_is_printed(
    command: str,
    placed: list[torch.dtype],
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*arguments_of(command, stories_folder, tmp_path / "out"), "--dtype", "bfloat16", "--json"]
    code, out, err = run(given, monkeypatch, capsys)
    assert code in ((0, 1) if command == "check" else (0,)), err  # bfloat16 rounds more than some checks allow
    assert placed and set(placed) == {torch.bfloat16}
    assert json.loads(out) is not None
    if command == "compress":
        assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("command", LOADS)
def test_a_device_that_is_not_there_is_refused(
    command: str,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    given = [*arguments_of(command, stories_folder, tmp_path / "out"), "--device", "mps"]
    code, _, err = run(given, monkeypatch, capsys)
    assert code == 2 and re.search("device='mps' is not available.*Expected one of auto, cpu.*--device", err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", LOADS)
def test_every_command_that_loads_a_model_has_the_options_of_loading(command: str) -> None:
    assert {option.flag for option in config_options(LoadingConfig)} <= options_of(command).keys()
    assert "--json" in options_of(command)


def test_a_plan_for_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*options: Any) -> dict[str, Any]:
        given = ["plan", "--hidden-size", 256, "--layers", 8, "--vocab-size", 1000, "--json", *options]
        code, out, err = run(given, monkeypatch, capsys)
        assert code == 0, err
        return dict(json.loads(out))

    one = planned("--flops", 1e12, "--bandwidth", 1e10)
    assert planned("--flops", 1e12, "--bandwidth", 5e9)["seconds"] > one["seconds"]
    assert planned("--flops", 2e12, "--bandwidth", 2e10)["seconds"] == pytest.approx(one["seconds"] / 2)
    trained = planned("--flops", 1e12, "--bandwidth", 1e10, "--loss", "kl")
    assert "train" in [stage["name"] for stage in trained["stages"]] and trained["seconds"] > one["seconds"]
    assert planned("--weight-dtype", "float32")["weights"] == 2 * one["weights"]
    code, out, _ = run(["plan", "--layers", 4, "--hidden-size", 256], monkeypatch, capsys)
    assert code == 0 and "total" in out and "for the weights" in out
    for options, message in (
        (["smollm2", "--layers", 4], "--layers has no effect with a model"),
        (["--budget", "1h"], "--budget was given without a model"),
        (["--test-examples", 9], "--test-examples was given without a model"),
        (["--device", "cpu", "--dtype", "bfloat16"], "--device and --dtype has no effect without a model"),
        (["--layers", 4, "--hidden-size", 256, "--remove", "latency:0.8"], "must be measured on a model"),
        (["--layers", 4, "--hidden-size", 100, "--heads", 3], "heads to divide hidden_size"),
    ):
        code, _, err = run(["plan", *options], monkeypatch, capsys)
        assert code == 2 and message in err, err


def test_a_checkpoint_repeats_its_compression(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["compress", stories_folder, "-o", tmp_path / "a", "--remove", 1, "--repair", "linear:rank=4", *SIZES]
    assert run([*first, "--no-speed", "--no-generation"], monkeypatch, capsys)[0] == 0
    again = ["compress", stories_folder, "-o", tmp_path / "b", "--config", tmp_path / "a", "--json"]
    code, out, err = run(again, monkeypatch, capsys)
    assert code == 0, err
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    assert reports[0]["perplexity"] == reports[1]["perplexity"] and reports[0]["plan"] == reports[1]["plan"]
    assert json.loads(out)["perplexity"] == reports[1]["perplexity"]


def test_an_environment_of_one_rank_chooses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert LoadingConfig().torch_device() == torch.device("cuda")
    assert LoadingConfig(device="cpu").torch_device() == torch.device("cpu")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "3")
    assert LoadingConfig().torch_device() == torch.device("cuda", 1)

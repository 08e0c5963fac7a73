"""Every field of a config file reaches the command, or the command names it: no field is ignored silently."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from streamline_hooks import (
    CompressionConfig,
    DataConfig,
    DistillationConfig,
    HealingConfig,
    LinearConfig,
    StreamlineError,
    Target,
)
from streamline_hooks.cli.config_options import config_options, stated_fields
from streamline_hooks.cli.main import COMMANDS
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import CompressionJob, JobData, ModelShape, RankingJob, estimate_from_shape
from streamline_hooks.repair import BlockConfig, MergedConfig
from streamline_hooks.selection import DisjointSearch
from streamline_hooks.statistics import Profile
from streamline_hooks.testing import tiny_model
from tests.commands import run
from tests.configured import configured

BASE = configured(remove=2, sequence_length=32, calibration_tokens=640, validation_tokens=128, test_tokens=256).updated(
    {"hardware.batch_size": 4, "search.shortlist": 3}
)
CHANGES: dict[str, Any] = {
    "remove": Target(blocks=3),
    "repair": BlockConfig(),
    "repair.seed": 5,
    "search": DisjointSearch(),
    "search.criterion": "relative_magnitude",
    "search.protect": (0,),
    "search.shortlist": 2,
    "data.sequence_length": 64,
    "data.calibration_tokens": 320,
    "data.fitting_tokens": 320,
    "data.validation_tokens": 1024,
    "data.test_tokens": 1024,
    "data.repeated_context": 0.5,
    "distillation.loss": {"lm": 1.0},
    "distillation.learning_rate": 1e-4,
    "distillation.scale_parameter": False,
    "distillation.weight_decay": 0.1,
    "distillation.betas": (0.8, 0.9),
    "distillation.warmup_ratio": 0.5,
    "distillation.min_lr_ratio": 0.5,
    "distillation.max_grad_norm": 2.0,
    "distillation.epochs": 2.0,
    "distillation.gradient_accumulation_steps": 2,
    "distillation.validations": 3,
    "distillation.patience": 1,
    "distillation.max_minutes": 9.0,
    "distillation.checkpoint_minutes": 1.0,
    "distillation.seed": 5,
    "healing": HealingConfig("partial", where="last", count=1),
    "evaluation.speed": False,
    "evaluation.generation": False,
    "hardware.batch_size": 2,
    "hardware.autocast": "bfloat16",
    "hardware.state_memory": 1000,
    "hardware.state_dtype": "bfloat16",
    "rounds": 2,
    "train_until": 600.0,
    "at_most": {"kl": 0.5},
    "delta": 0.1,
    "seed": 7,
    "task": Task("embedding"),
    "stack": "model.other",
}
"""A changed value of each field."""
TRAINS = (
    "distillation.",
    "healing",
    "rounds",
    "train_until",
    "data.fitting_tokens",
    "hardware.autocast",
    "hardware.state_",
)
AFTER_RANKING = {
    path: "a step after the ranking"
    for path in CHANGES
    if path.startswith(
        ("distillation", "evaluation", "hardware.state", "hardware.autocast", "train_until", "at_most", "delta")
    )
}
NO_RANKING = {"repair.seed": "the weights of replacements are made after the ranking"}
NO_COST = {
    "distillation.loss": "each loss takes one pass of teacher and student",
    "search.criterion": "criteria of a profile are free",
    "search.protect": "a window of the same length",
    "data.repeated_context": "as many tokens",
    **dict.fromkeys(("seed", "repair.seed", "distillation.seed"), "seeds are free"),
    **dict.fromkeys(
        ("evaluation.speed", "evaluation.generation", "at_most", "delta"), "not part of the estimate, as documented"
    ),
    **{
        path: "sets a number of the optimiser, or when a training run stops early or is saved"
        for path in CHANGES
        if path.startswith("distillation.")
        and path.rpartition(".")[2] not in ("epochs", "validations", "max_minutes", "loss", "seed")
    },
}


def test_the_table_has_every_field() -> None:
    assert CHANGES.keys() == {option.path for option in config_options()}


def changed(path: str) -> tuple[CompressionConfig, CompressionConfig]:
    """Return a config, and the same config with another value of a field."""
    base = BASE
    if path.startswith(TRAINS):
        base = base.updated({"distillation": DistillationConfig({"kl": 1.0})})
    if path == "delta":
        base = base.updated({"at_most": CHANGES["at_most"]})
    return base, base.updated({path: CHANGES[path]})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with documents of random words."""
    random, file = Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    words = ["the", "cat", "saw", "a", "big", "dog", "and", "ran", "to", "Tom", "home", "happy"]
    documents = [" ".join(random.choices(words, k=60)) for _ in range(60)]
    file.write_text("\n\n\n".join(documents))
    return file


class Reached(Exception):
    """Raised instead of an expensive step."""


def rows_of(report: Mapping[str, Any]) -> list[list[list[int]]]:
    return [row["windows"] for row in report["windows"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"data.fitting_tokens": 320, "data.repeated_context": 0.5, "search.shortlist": 4, "repair": BlockConfig()},
        {"repair": MergedConfig(), "healing": HealingConfig("partial", where="last", count=2), "seed": 3},
        {"search": DisjointSearch(), "data.validation_tokens": 512, "data.test_tokens": 1024, "seed": 3},
    ],
)
def test_rank_ranks_what_compress_ranks(
    changes: dict[str, Any],
    text: Path,
    stories_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = DistillationConfig({"kl": 1.0})
    BASE.updated({"distillation": training, "search.protect": (0,), **changes}).save(tmp_path / "config.yaml")
    given = [stories_folder, "--config", tmp_path / "config.yaml", "-c", text]
    code, out, err = run(["rank", *given, "--save", tmp_path / "ranked", "--json"], monkeypatch, capsys)
    assert code == 0, err
    searched: list[Any] = []

    def stop(self: Any, selections: Sequence[Any]) -> Any:
        searched.extend([self.profile(), selections])
        raise Reached

    monkeypatch.setattr("streamline_hooks.pipeline.one_round.CompressionRun.fit_and_verify", stop)
    with pytest.raises(Reached):
        run(["compress", *given, "-o", tmp_path / "out"], monkeypatch, capsys)
    profile, selections = searched
    ranked = Profile.load(tmp_path / "ranked")
    assert (ranked.tokens, ranked.sequences) == (profile.tokens, profile.sequences)
    assert ranked.value("cosine", range(1, 3)) == profile.value("cosine", range(1, 3))
    assert rows_of(json.loads(out)) == [[[w.start, w.stop] for w in item.windows] for item in selections]


@pytest.fixture
def ranked(
    text: Path, stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:  # fmt: skip
    """A function that ranks by a config, and returns the exit code, all that the ranking is made of, and messages."""
    from streamline_hooks.statistics import profile

    def outcome(config: CompressionConfig) -> tuple[int, Any, str]:
        batches: list[list[int]] = []

        def watched(model: Any, given: Any, **options: Any) -> Any:
            batches.extend(batch["input_ids"].tolist() for batch in given)
            return profile(model, given, **options)

        monkeypatch.setattr(sys.modules[RankingJob.__module__], "profile", watched)
        config.save(tmp_path / "config.yaml")
        given = ["rank", stories_folder, "--config", tmp_path / "config.yaml", "-c", text, "--json"]
        code, out, err = run(given, monkeypatch, capsys)
        return code, (batches, out), err

    return outcome


@pytest.mark.long
def test_every_field_changes_the_ranking_or_is_named(ranked: Any) -> None:
    before: dict[CompressionConfig, Any] = {}
    for path in CHANGES:
        base, config = changed(path)
        if base not in before:
            before[base] = ranked(base)
        code, outcome, err = ranked(config)
        if path in AFTER_RANKING:
            assert code == 0 and outcome == before[base][1], path
            assert path in next(line for line in err.splitlines() if "the ranking: " in line), err
        elif path in NO_RANKING:
            assert code == 0 and outcome == before[base][1], path
        else:
            name = path.rpartition(".")[2]
            assert (code == 0 and outcome != before[base][1]) or (code == 2 and name in err), (path, err)


@pytest.mark.parametrize("command", ["compress", "plan", "sweep"])
def test_every_field_reaches_the_job(
    command: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[CompressionConfig] = []

    def stop(self: CompressionJob, *given: Any) -> Any:
        reached.append(self.config)
        raise Reached

    monkeypatch.setattr(CompressionJob, "load" if command == "sweep" else "prepare", stop)
    monkeypatch.setattr(sys.modules[CompressionJob.__module__], "task_of_pretrained", lambda *given: Task("causal-lm"))
    for path in CHANGES:
        _, config = changed(path)
        config.save(tmp_path / "config.yaml")
        given = [command, "model", "--config", tmp_path / "config.yaml"]
        if command != "plan":
            given += ["-o", tmp_path / "out"]
        if command == "compress" and path in ("at_most", "delta"):
            given += ["--guarantee-text", text]
        with pytest.raises(Reached):
            run(given, monkeypatch, capsys)
        assert reached[-1] == config.updated({"task": config.task or Task("causal-lm")}), path


def test_a_sweep_takes_its_points_and_the_measurement_of_speed_from_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def stop(*given: Any, **options: Any) -> Any:
        calls.append(options)
        raise Reached

    monkeypatch.setattr("streamline_hooks.cli.sweep.run", stop)
    monkeypatch.setattr(CompressionJob, "load", lambda self: (None, None, None))
    monkeypatch.setattr(sys.modules[CompressionJob.__module__], "task_of_pretrained", lambda *given: Task("causal-lm"))
    for speed, option in ((True, []), (False, []), (True, ["--no-speed"]), (False, ["--speed"])):
        BASE.updated({"evaluation.speed": speed, "repair": LinearConfig(rank=2)}).save(tmp_path / "config.yaml")
        with pytest.raises(Reached):
            run(["sweep", "model", "-o", tmp_path, "--config", tmp_path / "config.yaml", *option], monkeypatch, capsys)
        assert calls[-1]["remove"] == [Target(blocks=2)] and calls[-1]["repair"] == [LinearConfig(rank=2)]
        assert (calls[-1]["speed"] is not None) == (speed != bool(option))


def test_every_field_changes_the_estimate_of_a_shape_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(config: CompressionConfig) -> tuple[int, str, str]:
        config.save(tmp_path / "config.yaml")
        shape = ["--hidden-size", 64, "--layers", 6, "--vocab-size", 100, "--weight-dtype", "float32"]
        return run(["plan", *shape, "--config", tmp_path / "config.yaml", "--json"], monkeypatch, capsys)

    before: dict[CompressionConfig, Any] = {}
    for path in CHANGES:
        base, config = changed(path)
        if base not in before:
            before[base] = planned(base)
        code, out, err = planned(config)
        if path in NO_COST:
            assert code == 0 and out == before[base][1], path
        else:
            name = path.rpartition(".")[2]
            assert (code == 0 and out != before[base][1]) or (code == 2 and name in err), (path, out, err)


def test_a_plan_needs_a_model_or_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([], ["--layers", 8], ["--flops", 1e14]):
        code, _, err = run(["plan", "--remove", 2, *given], monkeypatch, capsys)
        assert code == 2 and "--architecture" in err and "--hidden-size" in err
    tiny_model("llama").config.save_pretrained(tmp_path)
    code, out, err = run(["plan", "--remove", 2, "--architecture", tmp_path], monkeypatch, capsys)
    assert code == 0 and "LlamaForCausalLM with 8 blocks" in out, err


def test_a_budget_names_the_fields_that_it_would_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[CompressionJob.__module__], "task_of_pretrained", lambda *given: Task("causal-lm"))
    recipe = CompressionConfig(distillation=DistillationConfig({"kl": 1.0}))
    for path in ("data.calibration_tokens", "distillation.epochs", "hardware.autocast"):
        recipe.updated({path: CHANGES[path]}).save(tmp_path / "config.yaml")
        given = ["compress", "model", "-o", tmp_path / "out", "--budget", "1h", "--config", tmp_path / "config.yaml"]
        code, _, err = run(given, monkeypatch, capsys)
        assert code == 2 and f"--budget does not go with {path} in " in err, err


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("hardware: {batch_size: 4}", {"hardware.batch_size"}),  # the default
        ("data:\n  test_tokens: 12288\nseed: 0", {"data.test_tokens", "seed"}),
        ("repair: {kind: linear}", {"repair"}),
        ("", set()),
    ],
)
def test_a_file_states_fields_with_default_values(text: str, stated: set[str], tmp_path: Path) -> None:
    (file := tmp_path / "config.yaml").write_text(text)
    assert stated_fields(file) == stated
    CompressionConfig().save(file)
    assert {"hardware.batch_size", "data.test_tokens", "seed", "remove"} <= stated_fields(file)


def test_sizes_of_text_in_a_config_are_refused_for_images() -> None:
    job = CompressionJob(
        "model",
        CompressionConfig(task=Task("image-classification"), data=DataConfig(calibration_tokens=320)),
        Path("out"),
        JobData(),
        flags={"data.calibration_tokens": "data.calibration_tokens in FILE"},
    )
    with pytest.raises(StreamlineError, match="data.calibration_tokens in FILE has no effect.*--calibration-examples"):
        job.check()


def test_all_commands_with_a_config_file_are_tested() -> None:
    from streamline_hooks.cli import make_app

    with_config = {name for name in COMMANDS if "config" in make_app()[name].default_command.__signature__.parameters}
    assert with_config == {"compress", "plan", "rank", "sweep"}


def test_the_memory_of_healed_blocks_is_part_of_an_estimate() -> None:
    shape = ModelShape(64, 6, vocab_size=100)
    trained = CompressionConfig(remove=2, distillation=DistillationConfig({"kl": 1.0}))
    peaks = [
        estimate_from_shape(shape, None, trained.updated({"healing": healing})).peak
        for healing in (None, HealingConfig("lora", rank=4), HealingConfig("partial", where="all"))
    ]
    assert peaks[0] < peaks[1] < peaks[2]

"""The config of a compression: what it accepts, how it is written and read, and that each field has an effect."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from streamline_hooks import (
    CompressionConfig,
    CompressionResult,
    DataConfig,
    DistillationConfig,
    HealingConfig,
    LayerSurgeon,
    LinearConfig,
    StreamlineError,
    SwiGLUConfig,
    Target,
    compress,
    load,
    save,
)
from streamline_hooks.core import HardwareConfig
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import EvaluationConfig
from streamline_hooks.pipeline import config as config_module
from streamline_hooks.pipeline.presets import PRESETS
from streamline_hooks.repair import MLPConfig, NoneConfig, ReplacementConfig, register_replacement
from streamline_hooks.selection import DisjointSearch, MLPSearch, WindowSearch
from tests.golden import inputs
from tests.other_models import bert
from tests.processes import ROOT

SMALL = DataConfig(sequence_length=32, calibration_tokens=1_280, validation_tokens=256, test_tokens=256)
QUIET = EvaluationConfig(speed=False, generation=False)
TRAINED = DistillationConfig(epochs=1, validations=1, warmup_ratio=0.0)
BASE = CompressionConfig(remove=1, search=WindowSearch(shortlist=2), data=SMALL, evaluation=QUIET)
TRAINING = replace(BASE, repair=MLPConfig(width=8), distillation=TRAINED)
COMPARED = replace(BASE, evaluation=EvaluationConfig())  # by one without the other


# Writing and reading
# -------------------

EVERY_FIELD = CompressionConfig(
    remove=Target(parameters=0.2),
    repair=SwiGLUConfig(width=24, linear=False, seed=3),
    search=WindowSearch(criterion={"cosine": 1.0, "relative_magnitude": 0.5}, protect=(0, -1), shortlist=3),
    data=DataConfig(64, 6_400, 1_280, 640, 320, 0.5),
    distillation=DistillationConfig(loss={"kl": 1.0, "lm": 0.5}, learning_rate=2e-4, betas=(0.8, 0.9), seed=1),
    healing=HealingConfig(method="lora", where="last", count=2, targets=("q_proj", "v_proj")),
    evaluation=EvaluationConfig(speed=False),
    hardware=HardwareConfig(batch_size=2, autocast="bfloat16"),
    train_until=60.0,
    seed=5,
    task=Task("causal-lm"),
    stack="model.layers",
)
TARGETS = (Target(memory_bytes=90e6), Target(latency=0.8), Target(decode_latency=0.8), Target(seconds_per_token=0.02))
IN_ROUNDS = CompressionConfig(remove=8, distillation=DistillationConfig(), rounds=2, search=DisjointSearch(windows=3))


@pytest.mark.parametrize("config", [CompressionConfig(), EVERY_FIELD, IN_ROUNDS, BASE, TRAINING])
def test_a_config_is_read_as_it_was_written(config: CompressionConfig, tmp_path: Path) -> None:
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CompressionConfig.from_yaml(config.to_yaml()) == config
    for name in ("config.yaml", "config.json"):
        config.save(tmp_path / name)
        assert CompressionConfig.load(tmp_path / name) == config
    assert json.loads((tmp_path / "config.json").read_text())["schema"] == config_module.SCHEMA


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_are_read_as_they_were_written(target: Target, tmp_path: Path) -> None:
    config = CompressionConfig(remove=target)
    for name in ("config.yaml", "config.json"):
        config.save(tmp_path / name)
        assert CompressionConfig.load(tmp_path / name) == config
    assert CompressionConfig.from_yaml(f"remove: {{{target.unit}: {float(target.amount):.3e}}}") == config


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_read_as_it_was_written(name: str) -> None:
    config = CompressionConfig.preset(name)
    assert config == PRESETS[name].config == CompressionConfig.from_yaml(config.to_yaml())
    assert CompressionConfig.preset(name, remove=3) == replace(config, remove=3)


def test_a_short_file_has_the_defaults() -> None:
    text = "remove: 0.3\nrepair: {kind: mlp, width: 64}\nsearch: {kind: disjoint, windows: 3}\n"
    expected = CompressionConfig(remove=0.3, repair=MLPConfig(width=64), search=DisjointSearch(windows=3))
    assert CompressionConfig.from_yaml(text) == expected
    assert CompressionConfig.from_yaml("") == CompressionConfig()


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "1.0e-03"])
def test_numbers_are_read_as_python_reads_them(text: str) -> None:
    """YAML 1.1 takes some of them for text."""
    config = CompressionConfig.from_yaml(f"distillation: {{learning_rate: {text}}}")
    assert config.distillation == DistillationConfig(learning_rate=1e-3)
    assert CompressionConfig.from_yaml(config.to_yaml()) == config


def test_branches_may_be_removed_without_a_replacement() -> None:
    for seed in (None, 1):
        assert CompressionConfig(search=MLPSearch(), repair=NoneConfig(seed=seed)).repair.seed == seed


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("remvoe: 3", "CompressionConfig.*'remvoe'.*Did you mean 'remove'"),
        ("data: {calibration_token: 3}", "DataConfig.*'calibration_token'.*Did you mean 'calibration_tokens'"),
        ("repair: {kind: linaer}", "'linaer'.*Did you mean 'linear'"),
        ("repair: {kind: linear, rnak: 3}", "LinearConfig.*'rnak'.*Did you mean 'rank'"),
        ("search: {kind: windwo}", "'windwo'.*Did you mean 'window'"),
        ("distillation: {loss: {lk: 1.0}}", "'lk'.*Expected one of kl"),
        ("distillation: {learning_rates: 1.0}", "DistillationConfig.*'learning_rates'.*'learning_rate'"),
        ("healing: {methd: lora}", "HealingConfig.*'methd'.*Did you mean 'method'"),
        ("remove: {memory_bytes: 0.5}", "memory_bytes=0.5.*90e6"),
        ("remove: {memory_bytes: 90MB}", "memory_bytes='90MB'"),
        ("remove: {fractoin: 0.25}", "Target.*'fractoin'.*Did you mean 'fraction'"),
        ("hardware: {batchsize: 4}", "HardwareConfig.*'batchsize'.*Did you mean 'batch_size'"),
        ("evaluation: {sped: true}", "EvaluationConfig.*'sped'.*Did you mean 'speed'"),
        ("schema: 99", "schema=99 is unknown.*Expected one of 1"),
        ("schema: one", "schema='one' is unknown.*Expected one of 1"),
        ("schema: true", "schema=True is unknown.*Expected one of 1"),
        ("[1, 2]", r"\[1, 2\].*mapping"),
        ("a: b: c", "not valid YAML.*Correct"),
        ("schema: [1]", r"schema=\[1\] is unknown.*Expected one of 1"),
        ("schema: 1.0", "schema=1.0 is unknown.*Expected one of 1"),
        ("seed: 1\nseed: 2", "'seed' twice.*Delete"),
        ("repair: {rank: 3}", "ReplacementConfig: kind is missing.*Expected one of none, linear.*Add"),
        ("repair: {kind: swiglu}\nsearch: {kind: mlp}", "repair=swiglu has no effect.*Change repair"),
        ("repair: {kind: linear, rank: 3}\nsearch: {kind: attention}", "repair=linear:rank=3 has no effect"),
        ("repair: {kind: [linear]}", r"\['linear'\] is unknown.*Expected one of none, linear"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, named: str) -> None:
    with pytest.raises(StreamlineError, match=f"(?s){named}"):
        CompressionConfig.from_yaml(text)


def test_renamed_fields_of_schema_2_are_read() -> None:
    """Protected blocks that a config names must not be lost, nor its repeated context."""
    values = {"schema": 2, "search": {"kind": "window", "keep": [0, -1]}, "data": {"repeated": 0.5}}
    config = CompressionConfig.from_dict(values)
    assert (config.search.protect, config.data.repeated_context) == ((0, -1), 0.5)
    with pytest.raises(StreamlineError, match="keep"):
        CompressionConfig.from_dict({**values, "schema": 3})


def test_an_older_schema_is_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renamed fields, in two versions before this one."""
    now = config_module.SCHEMA
    upgrades: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
        now - 2: lambda old: {("blocks" if key == "drop" else key): value for key, value in old.items()},
        now - 1: lambda old: {("remove" if key == "blocks" else key): value for key, value in old.items()},
    }
    for version, upgrade in upgrades.items():
        monkeypatch.setitem(config_module.UPGRADES, version, upgrade)
    assert CompressionConfig.from_dict({"schema": now - 2, "drop": 3}) == CompressionConfig(remove=3)
    assert CompressionConfig.from_dict({"schema": now - 1, "blocks": 3}) == CompressionConfig(remove=3)
    with pytest.raises(StreamlineError, match=f"schema={now - 3} is unknown.*{now - 2}, {now - 1}, {now}"):
        CompressionConfig.from_dict({"schema": now - 3, "drop": 3})


def test_a_config_with_an_empty_on_policy_is_read_and_another_refused() -> None:
    values = {"schema": 1, "distillation": {"loss": {"kl": 1.0}, "on_policy": None}}
    assert CompressionConfig.from_dict(values) == CompressionConfig(distillation=DistillationConfig())
    values = {"schema": 1, "distillation": {"on_policy": {"share": 0.5}}}
    with pytest.raises(StreamlineError, match=r"on_policy=.*0.5.*Expected null.*examples/on_policy_distillation.py"):
        CompressionConfig.from_dict(values)


def test_an_unknown_field_of_a_preset_is_named() -> None:
    with pytest.raises(StreamlineError, match="'remvoe'.*Did you mean 'remove'"):
        CompressionConfig.preset("best", remvoe=3)
    with pytest.raises(
        StreamlineError, match=r"'bets'.*Expected one of best, best-plain, two-windows.*Did you mean 'best'"
    ):
        CompressionConfig.preset("bets")


def test_text_that_looks_like_a_number_stays_text() -> None:
    config = CompressionConfig(stack="1e3")
    assert CompressionConfig.from_yaml(config.to_yaml()) == config


def test_numbers_of_numpy_are_written_as_python_s_own() -> None:
    config = CompressionConfig(
        remove=np.int64(3),
        data=DataConfig(test_tokens=np.int64(500), repeated_context=np.float32(0.5)),
        evaluation=EvaluationConfig(speed=np.bool_(False)),
        distillation=DistillationConfig({"kl": np.float64(1.0)}, learning_rate=np.float32(0.5)),
    )
    assert CompressionConfig.from_yaml(config.to_yaml()) == config
    assert type(config.data.test_tokens) is int and config.target == Target(blocks=3)


def test_a_config_cannot_be_changed() -> None:
    """A preset is the same object for everyone, and what is recorded is what was trained for."""
    distillation = CompressionConfig.preset("best").distillation
    assert distillation is not None
    with pytest.raises(TypeError, match=r"immutable.*replace"):
        distillation.loss["mse"] = 1.0  # type: ignore[index]
    config = replace(EVERY_FIELD, seed=7)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and hash(other) == hash(config)


def test_what_could_not_be_read_again_is_refused_before_anything_is_run() -> None:
    @dataclass(frozen=True)
    class Mine(LinearConfig):
        pass

    with pytest.raises(StreamlineError, match="Mine is not registered under kind='linear'.*register_replacement"):
        CompressionConfig(repair=Mine())


@pytest.mark.parametrize(("name", "value"), [("device", torch.device("cpu")), ("bound", math.inf)])
def test_a_kind_whose_options_cannot_be_written_is_not_registered(name: str, value: Any) -> None:
    config = make_dataclass("Unwritable", [(name, "Any", value)], bases=(ReplacementConfig,), frozen=True)
    config.kind = "test-unwritable"  # type: ignore[attr-defined]
    with pytest.raises(StreamlineError, match=f"{name}=.*(cannot be written|not finite)"):
        register_replacement(config)


def test_a_checkpoint_that_was_changed_afterwards_has_no_config(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    """Neither of two compressions describes the result of both, nor does one what was removed by hand after it."""
    result = compress(story_model[0], story_texts, BASE, tokenizer=story_model[1])
    with LayerSurgeon(result.model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    save(result.model, tmp_path / "by hand")
    with pytest.raises(StreamlineError, match="2 surgeries, 1 with a config.*compress again"):
        CompressionConfig.load(tmp_path / "by hand")
    with pytest.raises(StreamlineError, match="no config of a compression.*Pass a config file"):
        CompressionConfig.load(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="no file.*none.yaml.*YAML or JSON"):
        CompressionConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"remove": 0}, "remove=0 .*remove=8"),
        ({"remove": 1.5}, "remove=1.5.*remove=8"),
        ({"remove": "8"}, "remove='8'.*Expected Target"),
        ({"repair": "linear"}, "repair='linear'.*Expected ReplacementConfig"),
        ({"rounds": 0}, "rounds=0.*at least 1"),
        ({"seed": 1.5}, "seed=1.5.*Expected int"),
        ({"healing": HealingConfig()}, "healing.*without training.*Add distillation"),
        ({"rounds": 2}, "rounds.*without training.*Add distillation"),
        ({"train_until": 5.0}, "train_until.*without training.*Add distillation"),
        ({"data": DataConfig(fitting_tokens=1_024)}, "fitting_tokens.*without training"),
        ({"hardware": HardwareConfig(autocast="bfloat16")}, "hardware.autocast.*without training"),
        ({"hardware": HardwareConfig(state_dtype="float16")}, "hardware.state_dtype.*without training"),
        ({"distillation": TRAINED, "train_until": 0.0}, "train_until=0.0.*seconds > 0"),
        ({"distillation": TRAINED, "train_until": float("nan")}, "train_until=nan.*Expected a finite number"),
        ({"distillation": TRAINED, "train_until": 5.0, "rounds": 2}, "train_until=5.0.*max_minutes"),
        ({"distillation": TRAINED, "rounds": 2, "remove": Target(parameters=0.2)}, "rounds=2.*number or a fraction"),
        ({"distillation": DistillationConfig({"mse": 1.0}), "rounds": 2}, "mse.*loss on logits"),
    ],
)
def test_values_that_contradict_each_other(values: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        CompressionConfig(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sequence_length": 1}, "sequence_length=1.*at least 2"),
        ({"calibration_tokens": 0}, "calibration_tokens=0.*at least 2"),
        ({"repeated_context": 1.5}, r"repeated_context=1.5.*in \[0, 1\]"),
        ({"repeated_context": -0.5}, r"repeated_context=-0.5.*in \[0, 1\]"),
        ({"fitting_tokens": True}, "fitting_tokens=True.*Expected int"),
    ],
)
def test_values_of_the_data_that_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        DataConfig(**values)


# Running again
# -------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(
            TRAINING,
            healing=HealingConfig(method="partial", where="after"),
            data=replace(SMALL, repeated_context=1.0, fitting_tokens=640),
            seed=3,
        ),
        replace(TRAINING, remove=2, rounds=2),
    ],
    ids=["closed form", "trained", "in rounds"],
)
def test_the_config_in_a_checkpoint_gives_the_same_model_again(
    config: CompressionConfig, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    original = copy.deepcopy(model)
    first = compress(model, story_texts, config, tokenizer=tokenizer, output=tmp_path / "out")
    read = CompressionConfig.load(tmp_path / "out")
    assert read == config == first.config
    assert json.loads((tmp_path / "out/report.json").read_text())["config"] == config.to_dict()
    again = compress(original, story_texts, read, tokenizer=tokenizer)
    assert again.plan == first.plan and again.perplexities == first.perplexities
    assert outcome(again) == outcome(first)
    states = [one.state_dict() for one in (again.model, first.model)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_save_pretrained_writes_has_the_config_too(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    result = compress(story_model[0], story_texts, BASE, tokenizer=story_model[1])
    result.model.save_pretrained(tmp_path / "plainly")
    assert CompressionConfig.load(tmp_path / "plainly") == BASE
    load(tmp_path / "plainly").save_pretrained(tmp_path / "again")
    assert CompressionConfig.load(tmp_path / "again") == BASE


# Each field has an effect
# ------------------------


def outcome(result: CompressionResult) -> dict[str, Any]:
    """Everything that was chosen and measured, without times and without the config itself."""
    report = result.report()
    for name in ("config", "seconds", "speed", "peak_memory_bytes", "versions"):
        report.pop(name)
    if report["training"]:
        report["training"].pop("seconds")
    for one in report["rounds"]:
        one["training"].pop("seconds")
    return yaml.safe_load(yaml.safe_dump(report))


@dataclass(frozen=True)
class Effect:
    """Another value of a field, and what is different with it.

    Attributes
    ----------
    value : Any
    observe : callable
        Takes the result of a compression.
    base : CompressionConfig
        What the field is changed in.
    """

    value: Any
    observe: Callable[[CompressionResult], Any]
    base: CompressionConfig = BASE


def perplexities(result: CompressionResult) -> dict[str, float]:
    return result.perplexities


def distances(result: CompressionResult) -> list[float]:
    return sorted(one.distance for one in result.candidates)


def scores(result: CompressionResult) -> list[float]:
    return sorted(one.score for one in result.candidates)


def repair_errors(result: CompressionResult) -> list[Any]:
    return [repair.removal_error for repair in result.candidates[0].repairs]


def steps(result: CompressionResult) -> Any:
    return result.training and (result.training.steps, result.training.tokens)


def weights(result: CompressionResult) -> list[float]:
    return [parameter.double().sum().item() for parameter in result.model.parameters()]


EFFECTS: dict[str, Effect] = {
    "remove": Effect(2, lambda result: len(result.plan.slots)),
    "repair": Effect(
        NoneConfig(), lambda result: [type(one.replacement_module) for one in result.candidates[0].repairs]
    ),
    "search": Effect(WindowSearch(shortlist=3), lambda result: len(result.candidates)),
    "data.sequence_length": Effect(16, distances),
    "data.calibration_tokens": Effect(2_560, scores),
    "data.fitting_tokens": Effect(640, repair_errors, TRAINING),
    "data.validation_tokens": Effect(512, distances),
    "data.test_tokens": Effect(512, perplexities),
    "data.repeated_context": Effect(1.0, distances),
    "distillation": Effect(TRAINED, lambda result: result.training is None, replace(BASE, repair=MLPConfig(width=8))),
    "healing": Effect(HealingConfig(method="partial", where="all"), weights, TRAINING),
    "evaluation.speed": Effect(False, lambda result: result.speed is None, COMPARED),
    "evaluation.generation": Effect(False, lambda result: len(result.samples), COMPARED),
    "hardware.batch_size": Effect(2, steps, TRAINING),
    "hardware.autocast": Effect("bfloat16", weights, TRAINING),
    "hardware.state_dtype": Effect("bfloat16", weights, TRAINING),
    "rounds": Effect(2, lambda result: len(result.rounds), replace(TRAINING, remove=2)),
    "train_until": Effect(1e-6, steps, TRAINING),
    "seed": Effect(1, distances),
}
ELSEWHERE = {
    "at_most": "tests/pipeline/test_compress_at_most.py",
    "delta": "tests/pipeline/test_compress_at_most.py",
    "hardware.state_memory": "tests/distillation/test_training_configs.py",
    "stack": "test_the_stack_is_the_one_that_is_named",
    "task": "test_the_task_decides_what_is_measured",
}


def paths(config: Any, prefix: str = "") -> Iterator[str]:
    """Return the paths of all fields; sections whose class is fixed are divided into their fields."""
    for field in fields(config):
        value = getattr(config, field.name)
        fixed = isinstance(value, (DataConfig, EvaluationConfig, HardwareConfig))
        yield from paths(value, f"{field.name}.") if fixed else [prefix + field.name]


def changed(config: Any, path: str, value: Any) -> Any:
    section, _, name = path.rpartition(".")
    if section:
        value = replace(getattr(config, section), **{name: value})
    return replace(config, **{section or name: value})


def test_the_table_names_every_field() -> None:
    assert {*EFFECTS, *ELSEWHERE} == set(paths(BASE))
    assert all((ROOT / where).is_file() if "/" in where else callable(globals()[where]) for where in ELSEWHERE.values())


@pytest.fixture(scope="module")
def run(stories: tuple[Any, Any], story_texts: list[str]) -> Callable[[CompressionConfig], CompressionResult]:
    done: list[tuple[CompressionConfig, CompressionResult]] = []

    def compressed(config: CompressionConfig) -> CompressionResult:
        for known, result in done:
            if known == config:
                return result
        result = compress(copy.deepcopy(stories[0]), story_texts, config, tokenizer=stories[1])
        done.append((config, result))
        return result

    return compressed


def has_effect(run: Callable[[CompressionConfig], CompressionResult], path: str, effect: Effect) -> bool:
    other = changed(effect.base, path, effect.value)
    assert other != effect.base
    return bool(effect.observe(run(effect.base)) != effect.observe(run(other)))


@pytest.mark.sample(6)
@pytest.mark.parametrize("path", EFFECTS)
def test_each_field_has_an_effect(run: Callable[[CompressionConfig], CompressionResult], path: str) -> None:
    assert has_effect(run, path, EFFECTS[path])


def test_a_field_without_effect_would_be_found(
    run: Callable[[CompressionConfig], CompressionResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missing in the table; with a row of its own it changes nothing."""

    @dataclass(frozen=True)
    class Planted(DataConfig):
        shuffled: bool = False

    planted = replace(BASE, data=Planted(**{f.name: getattr(SMALL, f.name) for f in fields(SMALL)}))
    assert set(paths(planted)) - {*EFFECTS, *ELSEWHERE} == {"data.shuffled"}
    for observe in (distances, scores, perplexities, weights, outcome):
        assert not has_effect(run, "data.shuffled", Effect(True, observe, planted))


def test_the_stack_is_the_one_that_is_named() -> None:
    config = CompressionConfig(remove=1, repair=NoneConfig(), evaluation=QUIET)
    for stack in ("model.encoder.layers", "model.decoder.layers"):
        model: Any = inputs.model_named("bart")
        assert compress(model, inputs.pair_batches(), replace(config, stack=stack)).plan.stack == stack


@pytest.mark.long
def test_the_task_decides_what_is_measured() -> None:
    batches = [torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(k)) for k in range(10)]
    parts = {"calibration": batches[:6], "validation": batches[6:8], "test": batches[8:]}
    config = CompressionConfig(remove=1, repair=NoneConfig(), evaluation=QUIET)

    def scores_as(task: Task | None) -> dict[str, dict[str, float]]:
        model: Any = bert()
        return compress(model, parts, replace(config, task=task)).scores

    assert scores_as(Task("embedding", "first")) != scores_as(Task("embedding", "mean"))


def test_fields_are_replaced_by_their_paths() -> None:
    config = CompressionConfig.preset("best")
    changed = config.updated({"remove": 3, "data.sequence_length": 64, "distillation.loss": {"kl": 2.0}})
    assert changed.target.blocks == 3 and changed.data == replace(config.data, sequence_length=64)
    assert changed.distillation == replace(config.distillation, loss={"kl": 2.0})  # type: ignore[type-var]
    assert CompressionConfig().updated({"distillation.epochs": 2}).distillation == DistillationConfig(epochs=2)
    for path in ("sed", "data.sed", "data"):
        with pytest.raises(StreamlineError):
            config.updated({path: 3})


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ({"repair": "swiglu"}, r"repair='swiglu'.*mapping with its fields, such as \{kind: swiglu\}"),
        ({"search": "disjoint"}, r"search='disjoint'.*such as \{kind: disjoint\}"),
        ({"healing": "lora"}, r"healing='lora'.*In a file, write a mapping with its fields\."),
        ({"distillation": {"loss": "kl"}}, r"loss='kl'.*In a file, write \{name: value\}"),
    ],
)
def test_a_short_form_in_a_file_is_refused_with_the_form_of_files(values: dict[str, Any], written: str) -> None:
    with pytest.raises(StreamlineError, match=written):
        CompressionConfig.from_dict(values)

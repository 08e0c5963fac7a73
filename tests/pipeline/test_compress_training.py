"""The whole way with training and healing, on trained weights."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import (
    RunOptions,
    StreamlineError,
    UnsupportedSurgery,
    compress,
    find_stack,
    load,
    profile,
)
from streamline_hooks.cli import parse_healing
from streamline_hooks.distillation import DistillationConfig, HealingConfig, TrainingCallback
from streamline_hooks.pipeline import one_round
from streamline_hooks.repair import MergedConfig
from streamline_hooks.testing import tiny_model
from tests.configured import arguments, configured
from tests.training_callbacks import BeforeSteps, RaiseAt

repair_training = import_module("streamline_hooks.distillation.train")  # the package has a function of this name

SMALL: dict[str, Any] = {
    "sequence_length": 64, "calibration_tokens": 6400, "validation_tokens": 640, "test_tokens": 640,
    "speed": False, "generation": False,
}  # fmt: skip
TRAINING = DistillationConfig(learning_rate=3e-3, epochs=2, validations=4)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "healing"),
    [
        ("linear", None),
        ("swiglu", "partial:where=after"),
        ("block", "lora:rank=4"),
        ("folded", "lora:rank=4,where=after"),
        ("none", "partial:where=beside,count=1"),
    ],
)
def test_training_ends_in_a_better_model_that_loads(
    kind: str,
    healing: str | None,
    story_model: tuple[Any, Any],
    story_texts: list[str],
    tmp_path: Path,
    log_messages: list[str],
) -> None:
    model, tokenizer = story_model
    keep = (0,) if kind == "folded" else ()
    result = compress(
        model,
        story_texts,
        configured(
            remove=1,
            repair=kind,
            protect=keep,
            shortlist=2,
            distillation=TRAINING,
            healing=None if healing is None else parse_healing(healing),
            **SMALL,
        ),
        tokenizer=tokenizer,
        output=tmp_path / "out",
    )
    p, trained = result.perplexities, result.training
    assert trained is not None
    before = p["removed"] if kind == "none" else p["repaired"]
    assert p["original"] < p["trained"] < before <= p["removed"]
    assert trained.distance < trained.distance_before
    assert any(line.startswith("trained    ") for line in log_messages)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["training"]["history"] == trained.history
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "the file to go on from outlives its use"
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict()), "an adapter is left"
    ids = tokenizer(story_texts[0], return_tensors="pt").input_ids[:, :64]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    a, b = (loaded.generate(ids[:, :8], max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)


@pytest.mark.long
def test_what_was_compressed_can_be_compressed_and_healed_again(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    """The splice of the first time is beside a block that is healed the second time."""
    model, tokenizer = story_model
    compress(model, story_texts, configured(remove=1, shortlist=2, **SMALL), tokenizer=tokenizer)
    before = {name: p.clone() for name, p in model.named_parameters() if "spliced" in name}
    options = {"distillation": TRAINING, "healing": HealingConfig("partial"), "output": tmp_path / "o", **SMALL}
    result = compress(model, story_texts, tokenizer=tokenizer, **arguments(remove=1, shortlist=2, **options))
    assert result.perplexities["trained"] < result.perplexities["repaired"]
    splices = {name for name, _ in model.named_parameters() if "spliced" in name}
    assert len(splices) in (1, 2) and before
    ids = tokenizer(story_texts[0], return_tensors="pt").input_ids[:, :64]
    torch.testing.assert_close(load(tmp_path / "o")(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_killed_training_is_resumed_where_it_was(
    stories: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str, resume: bool = False, callbacks: Sequence[TrainingCallback] = ()) -> Any:
        model, tokenizer = copy.deepcopy(stories[0]), stories[1]
        settings = replace(TRAINING, checkpoint_minutes=0.0)
        options = {
            "remove": 1,
            "shortlist": 2,
            "distillation": settings,
            "resume": resume,
            "callbacks": callbacks,
            **SMALL,
        }
        return compress(model, story_texts, tokenizer=tokenizer, output=tmp_path / folder, **arguments(**options)).model

    class Killed(BaseException):
        pass

    whole = run("whole")
    with pytest.raises(Killed):
        run("out", callbacks=[RaiseAt(20, Killed)])
    assert (tmp_path / "out.training").is_file() and not (tmp_path / "out").exists()
    with pytest.raises(StreamlineError, match=r"out.training is the training checkpoint of an earlier run.*--resume"):
        run("out")
    resumed = run("out", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not (tmp_path / "out.training").exists()


def test_another_replacement_does_not_resume_a_training(tmp_path: Path) -> None:
    """Their initial weights differ, and the training file would replace them."""
    batches = [torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(k)) for k in range(12)]
    distillation = DistillationConfig(checkpoint_minutes=0)
    options: dict[str, Any] = {"remove": 2, "distillation": distillation, "output": tmp_path / "out"}
    with pytest.raises(RuntimeError):
        stop = RaiseAt(2, RuntimeError)
        compress(tiny_model("llama"), batches, repair=MergedConfig(weight=1.0), callbacks=[stop], **options)
    with pytest.raises(StreamlineError, match="belongs to another training run"):
        compress(tiny_model("llama"), batches, repair=MergedConfig(weight=0.5), resume=True, **options)
    resumed = compress(tiny_model("llama"), batches, repair=MergedConfig(weight=1.0), resume=True, **options)
    assert resumed.training is not None and not resumed.training.stopped


def test_what_is_asked_for_in_vain_is_refused_at_once(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    before = find_stack(model).blocks
    for options, message in (
        ({"healing": HealingConfig()}, r"healing.*without training"),
        ({"resume": True}, r"resume.*no distillation"),
        ({"train_until": 60.0}, r"train_until.*without training"),
        ({"distillation": TRAINING, "resume": True, "train_until": 60.0}, r"train_until=60.0.*Leave train_until out"),
        ({"distillation": TRAINING, "train_until": 0.0}, r"train_until=0.0.*seconds > 0"),
        ({"distillation": TRAINING, "train_until": float("nan")}, r"train_until=nan.*number"),
        ({"distillation": TRAINING, "resume": True}, "no training checkpoint at any path"),
        (
            {"distillation": TRAINING, "resume": True, "output": tmp_path / "out"},
            r"no training checkpoint at .*out\.training",
        ),
    ):
        with pytest.raises(StreamlineError, match=message):
            compress(model, story_texts, tokenizer=tokenizer, **arguments(**options, **SMALL))
    measured = profile(model, [torch.arange(3, 11)[None]])
    with pytest.raises(UnsupportedSurgery, match="zeroes attention or MLP branches"):
        compress(
            model,
            story_texts,
            configured(remove=1, search="mlp", distillation=TRAINING, **SMALL),
            tokenizer=tokenizer,
            options=RunOptions(profile=measured),
        )
    assert find_stack(model).blocks == before


@pytest.mark.long
@pytest.mark.parametrize("kind", ["none", "folded", "scale"])
def test_a_window_behind_which_nothing_could_be_healed_is_not_chosen(
    kind: str, story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else is trained, for then all would have been ranked and judged in vain."""
    model, tokenizer = story_model
    options = {**SMALL, "remove": 1, "repair": kind, "distillation": TRAINING}
    with pytest.raises(StreamlineError, match=rf"nothing to train.*'{kind}'"):
        compress(model, story_texts, tokenizer=tokenizer, **arguments(**options))
    options |= {"healing": HealingConfig("partial", "after")}
    with monkeypatch.context() as patch:
        patch.setattr(one_round, "distributed_verify", None)
        said = r"nothing to train after the removal of 4.*1 selections.*'after'"
        with pytest.raises(StreamlineError, match=said):
            compress(model, story_texts, tokenizer=tokenizer, **arguments(protect=(0, 1, 2, 3), **options))
        with pytest.raises(StreamlineError, match="nothing to train after the removal of 3-4"):
            compress(
                model,
                story_texts,
                tokenizer=tokenizer,
                **arguments(protect=(0, 1, 2), **{**options, "search": "greedy", "remove": 2}),
            )
    result = compress(model, story_texts, tokenizer=tokenizer, **arguments(protect=(0, 1, 2), **options))
    assert result.plan.removed == (3,) and result.training is not None and result.training.steps


def test_blocks_that_are_healed_do_not_go(
    story_model: tuple[Any, Any], story_texts: list[str], log_messages: list[str]
) -> None:
    result = compress(
        story_model[0],
        story_texts,
        configured(
            remove=1,
            protect=(0, 1, 2),
            distillation=TRAINING,
            healing=HealingConfig(method="partial", where="last", count=1),
            **SMALL,
        ),
        tokenizer=story_model[1],
    )
    assert result.plan.removed == (3,)
    assert "left out   1 of 2 windows: nothing could be trained after their removal" in log_messages


def test_of_windows_apart_the_last_block_may_go() -> None:
    """For what is between them is behind the first."""
    batches = [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    result = compress(
        tiny_model("llama"),
        {"calibration": batches[:5], "validation": batches[5:7], "test": batches[7:]},
        configured(
            remove=3,
            protect=(0, 1, 2, 3),
            repair="none",
            search="disjoint",
            distillation=TRAINING,
            healing=HealingConfig(method="partial", where="after"),
        ),
    )
    assert result.plan.removed in ((4, 6, 7), (4, 5, 7)) and result.training is not None and result.training.steps


@pytest.mark.long
def test_a_kind_with_parameters_may_be_trained_alone(
    story_model: tuple[Any, Any], story_texts: list[str], log_messages: list[str]
) -> None:
    model, tokenizer = story_model
    result = compress(
        model,
        story_texts,
        configured(
            distillation=TRAINING,
            remove=1,
            healing=HealingConfig(method="partial", where="after"),
            protect=(0, 1, 2, 3),
            **SMALL,
        ),
        tokenizer=tokenizer,
    )
    assert result.plan.removed == (4,)
    assert any("only the replacement is trained" in line for line in log_messages)


@pytest.mark.sample(1)
@pytest.mark.parametrize("slow", ["", "distributed_verify", "train_selection"])
def test_a_training_ends_by_the_clock_of_the_whole_call(
    slow: str, story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before it took longer than was planned: it makes as many steps fewer."""
    now = [0.0]

    def ticking(seconds: float, run: Any) -> Any:
        def ticked(*given: Any, **options: Any) -> Any:
            now[0] += seconds
            return run(*given, **options)

        return ticked

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = BeforeSteps(ticking(10.0, lambda progress: None))
    if slow == "distributed_verify":
        monkeypatch.setattr(one_round, slow, ticking(75.0, one_round.distributed_verify))
    if slow == "train_selection":  # the original's pass, which is a part of it
        monkeypatch.setattr(repair_training, "cache_for_student", ticking(37.5, repair_training.cache_for_student))
    result = compress(
        story_model[0],
        story_texts,
        configured(remove=1, shortlist=1, distillation=TRAINING, train_until=100.0, **SMALL),
        tokenizer=story_model[1],
        options=RunOptions(callbacks=[clock]),
    )
    trained = result.training
    assert trained is not None and trained.steps == (3 if slow else 10)
    assert f"after step {trained.steps}" in trained.stopped


@pytest.mark.long
def test_where_no_time_is_left_what_was_fitted_stays(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the original is not run over a text that nothing is trained on."""
    monkeypatch.setattr(repair_training, "cache_for_student", None)
    result = compress(
        story_model[0],
        story_texts,
        configured(
            remove=1,
            shortlist=1,
            distillation=TRAINING,
            train_until=1e-6,
            healing=HealingConfig(method="partial", where="after"),
            **SMALL,
        ),
        tokenizer=story_model[1],
        output=tmp_path / "out",
    )
    assert result.training is None and list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert re.search(r"Nothing was trained.*1e-06 seconds", result.warnings[0])
    assert list(result.perplexities) == ["original", "removed", "repaired"]
    ids = story_model[1](story_texts[0], return_tensors="pt").input_ids[:, :64]
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, result.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_time_that_ends_while_the_original_is_run_leaves_no_step(
    story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, late = repair_training.cache_for_student, time.perf_counter

    def slow(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(time, "perf_counter", lambda: late() + 1e4)
        return run(*given, **options)

    monkeypatch.setattr(repair_training, "cache_for_student", slow)
    result = compress(
        story_model[0],
        story_texts,
        configured(remove=1, shortlist=1, distillation=TRAINING, train_until=5e3, **SMALL),
        tokenizer=story_model[1],
    )
    assert result.training is not None and result.training.steps == 0
    assert "training run made no step" in result.warnings[0]
    assert result.perplexities["trained"] == pytest.approx(result.perplexities["repaired"], rel=1e-4)


def test_states_alone_can_be_trained_for(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    settings = replace(TRAINING, loss={"relative": 1.0})
    result = compress(
        model,
        story_texts,
        configured(remove=1, shortlist=1, repair="mlp", distillation=settings, **SMALL),
        tokenizer=tokenizer,
    )
    assert result.perplexities["trained"] <= result.perplexities["repaired"]
    losses = [row["loss"] for row in result.training.history[1:]]  # type: ignore[union-attr]
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_ctrl_c_saves_the_best_and_leaves_what_can_be_gone_on_from(
    stories: tuple[Any, Any],
    story_texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_messages: list[str],
) -> None:

    def run(folder: str, **more: Any) -> Any:
        model, tokenizer = copy.deepcopy(stories[0]), stories[1]
        options = {"remove": 1, "shortlist": 2, "distillation": TRAINING, **SMALL, **more}
        return compress(model, story_texts, tokenizer=tokenizer, output=tmp_path / folder, **arguments(**options))

    whole = run("whole").model
    result = run("out", callbacks=[RaiseAt(20, KeyboardInterrupt)])
    assert result.training.stopped == "interrupted after step 20"
    assert (tmp_path / "out/report.json").is_file()
    kept = f"The training checkpoint {tmp_path / 'out.training'} is kept."
    assert any(line.startswith(kept) for line in log_messages)
    resumed = run("out", resume=True, overwrite=True).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not (tmp_path / "out.training").exists()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_what_is_folded_survives_the_healing_of_its_own_block(
    kind: str, story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    model, tokenizer = story_model
    options = {"repair": kind, "protect": (0,), "remove": 1, "shortlist": 1, **SMALL}
    settings = replace(TRAINING, learning_rate=1e-30, warmup_ratio=0.0)
    result = compress(
        model,
        story_texts,
        tokenizer=tokenizer,
        **arguments(distillation=settings, healing=HealingConfig(method="lora", rank=2), **options),
    )
    assert result.perplexities["repaired"] != pytest.approx(result.perplexities["removed"], rel=1e-3)
    assert result.perplexities["trained"] == pytest.approx(result.perplexities["repaired"], rel=1e-5)

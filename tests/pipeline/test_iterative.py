"""Removing in rounds: each ranks what the one before left, the original teaches, and the numbers are the original's."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import (
    RunOptions,
    StreamlineError,
    compress,
    load,
)
from streamline_hooks.data import BatchSplit, TokenSplit
from streamline_hooks.distillation import DistillationConfig, HealingConfig, TrainingProgress
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline.report import write_report
from streamline_hooks.surgery import Slot, Splice, SurgeryPlan
from streamline_hooks.testing import tiny_model
from tests.configured import arguments, configured
from tests.training_callbacks import BeforeSteps

iterative = import_module("streamline_hooks.pipeline.compress")  # the package has a function of this name

QUICK = DistillationConfig({"kl": 1.0, "lm": 1.0}, learning_rate=3e-3, validations=2)
OPTIONS: dict[str, Any] = {
    "repair": "linear",
    "healing": HealingConfig("partial", "after", learning_rate_ratio=0.2),
    "speed": False,
    "generation": False,
}


def texts(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


PARTS = {"calibration": texts(0, 12), "validation": texts(1, 2), "test": texts(2, 3)}


class Killed(BaseException):
    pass


def killed_at(step: int, training: DistillationConfig, **options: Any) -> None:
    """Compress in rounds of six steps each, until one of all the steps, which is not made."""
    made = [0]

    def dies(progress: TrainingProgress) -> None:
        made[0] += 1
        if made[0] == step:
            raise Killed

    settings = training
    with pytest.raises(Killed):
        compress(
            tiny_model("llama"),
            PARTS,
            options=RunOptions(callbacks=[BeforeSteps(dies)]),
            **arguments(distillation=settings, **options),
        )


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_each_round_sees_its_part_and_is_taught_by_the_original(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounds: list[dict[str, Any]] = []
    run = iterative.compress_once

    def watched(given: Any, part: Any, config: Any, **options: Any) -> Any:
        teacher = options["options"].teacher or given  # the model is the original, at first
        assert (teacher is given) == (not rounds) and len(find_stack(teacher)) == 8
        assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters()), "the teacher was changed"
        rounds.append(
            {"blocks": len(find_stack(given)), "seen": [int(b["input_ids"].sum()) for b in part["calibration"]]}
        )
        return run(given, part, config, **options)

    monkeypatch.setattr(iterative, "compress_once", watched)
    result = compress(
        model, PARTS, configured(rounds=3, remove=4, distillation=QUICK, **OPTIONS), output=tmp_path / "out"
    )
    assert [one["blocks"] for one in rounds] == [8, 6, 5]
    seen = [number for one in rounds for number in one["seen"]]
    assert sorted(seen) == sorted(int(b["input_ids"].sum()) for b in PARTS["calibration"]), "a batch twice, or left out"
    assert [len(one["removed"]) for one in result.rounds] == [2, 1, 1]
    gone = sorted(k for one in result.rounds for k in one["removed"])
    assert list(result.plan.removed) == gone and len(set(gone)) == 4
    assert (result.plan.old_length, len(result.plan.slots), len(find_stack(model))) == (8, 4, 4)
    assert sum(one["training"]["tokens"] for one in result.rounds) == 12 * 24
    for k, slot in enumerate(result.plan.slots):  # what stays is where the plan says, but for what healing changed
        name = "self_attn.q_proj.weight"
        old, new = before[f"model.layers.{slot.source}.{name}"], find_stack(model)[k].get_parameter(name)
        assert (old - new).norm() < 0.1 * old.norm()
    assert "removed " + ", then ".join(" ".join(map(str, one["removed"])) for one in result.rounds) in result.table()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rounds"] == json.loads(json.dumps(result.rounds))
    ids = PARTS["test"][0]["input_ids"]
    assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)
    page = write_report(tmp_path / "page", title=result.title, command="x", compression=result.report()).read_text()
    said = ", then ".join(" ".join(map(str, one["removed"])) for one in result.rounds)
    assert f"In 3 rounds: {said}. The figures by depth are those of the original" in page
    assert "8 blocks became 4" in page and len(result.profile.cosine) == 9
    assert not list(tmp_path.glob("*.round-*"))


def test_what_is_measured_is_measured_against_the_original() -> None:
    model = tiny_model("llama")
    ids = torch.cat([batch["input_ids"] for batch in PARTS["test"]])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    size = sum(p.numel() for p in model.parameters())
    result = compress(model, PARTS, configured(rounds=2, remove=2, distillation=QUICK, **OPTIONS))
    assert set(result.perplexities) == {"original", "trained"}
    assert result.perplexities["original"] == pytest.approx(float(wanted), rel=1e-5)
    assert result.parameters[0] == size


def test_blocks_that_must_stay_are_the_original_s() -> None:
    """After the first round they have other numbers, by which others would stay."""
    model = tiny_model("llama")
    before = {k: find_stack(model)[k].self_attn.q_proj.weight.detach().clone() for k in (3, 4, 7)}
    options = {**OPTIONS, "healing": None}
    result = compress(model, PARTS, **arguments(rounds=3, remove=5, protect=(3, 4, -1), distillation=QUICK, **options))
    assert set(result.plan.removed) == {0, 1, 2, 5, 6}
    stays = [slot.source for slot in result.plan.slots]
    assert stays == [3, 4, 7]
    for block, old in zip(find_stack(model), stays, strict=True):
        assert torch.equal(block.self_attn.q_proj.weight, before[old])


def test_a_later_round_without_a_window_says_what_is_gone() -> None:
    model = tiny_model("llama")
    options = {**OPTIONS, "rounds": 2, "distillation": QUICK, "remove": 4, "protect": (1, 3, 5)}
    with pytest.raises(StreamlineError, match=r"Round 2 of 2 failed.*removed 2 blocks.*fewer rounds"):
        compress(model, PARTS, **arguments(**options))
    assert len(find_stack(model)) == 6


def test_a_round_that_fails_says_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = iterative.compress_once, tiny_model("llama")

    def fails(*given: Any, options: RunOptions, **more: Any) -> Any:
        if options.teacher is not None:
            raise StreamlineError("The disk is full.")
        return run(*given, options=options, **more)

    monkeypatch.setattr(iterative, "compress_once", fails)
    with pytest.raises(StreamlineError, match=r"2 of 2 failed.*disk is full.*removed 2"):
        compress(model, PARTS, configured(rounds=2, remove=4, distillation=QUICK, **OPTIONS))
    assert len(find_stack(model)) == 6


def test_the_training_of_an_earlier_call_is_not_overwritten(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rounds": 2, "remove": 2, "output": tmp_path / "out", **OPTIONS}
    kept = replace(QUICK, checkpoint_minutes=0.0)
    killed_at(9, kept, **settings)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert files
    with pytest.raises(StreamlineError, match=r"out.training.round-1 is the training checkpoint of an earlier run"):
        compress(tiny_model("llama"), PARTS, **arguments(distillation=kept, **settings))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    result = compress(
        tiny_model("llama"), PARTS, options=RunOptions(resume=True), **arguments(distillation=kept, **settings)
    )
    assert len(result.rounds) == 2 and result.seconds["save"] > 0


def test_a_call_that_is_refused_leaves_the_files_of_an_earlier_one(tmp_path: Path) -> None:
    files = [tmp_path / f"out.training.round-{number}" for number in (1, 2)]
    for file in files:
        file.write_text("hours")
    settings: dict[str, Any] = {"rounds": 7, "remove": 7, "distillation": QUICK, "output": tmp_path / "out", **OPTIONS}
    with pytest.raises(StreamlineError, match="12 calibration batches"):
        compress(tiny_model("llama"), PARTS, **arguments(**settings))
    assert [file.read_text() for file in files] == ["hours"] * 2


def test_of_batches_all_rounds_together_are_told(tmp_path: Path) -> None:
    result = compress(tiny_model("llama"), PARTS, configured(rounds=3, remove=3, distillation=QUICK, **OPTIONS))
    whole = BatchSplit.of(PARTS, Task("causal-lm")).report()
    assert result.data["calibration_tokens"] == 12 * 2 * 12
    assert {name: result.data[name] for name in whole} == whole


@pytest.mark.long
def test_one_round_copies_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    make, copied = copy.deepcopy, []

    def noted(one: Any, *more: Any) -> Any:
        copied.append(type(one).__name__)
        return make(one, *more)

    monkeypatch.setattr(copy, "deepcopy", noted)
    for rounds, copies in ((1, 0), (2, 1)):
        copied.clear()
        model = tiny_model("llama")
        kind = type(model).__name__
        result = compress(model, PARTS, configured(rounds=rounds, remove=2, distillation=QUICK, **OPTIONS))
        assert len(result.rounds) == (rounds if rounds > 1 else 0) and copied.count(kind) == copies


def test_each_round_sees_every_source_of_a_mixture() -> None:
    """Whose sequences take turns: with every second one, a round would see one source alone."""
    rows = torch.tensor([[0, 0], [1, 1]] * 6)
    split = TokenSplit(rows, rows[:1], rows[:1], "mixture")
    for number in range(2):
        assert split.part_of_calibration(number, 2).calibration[:, 0].float().mean() == 0.5


@pytest.mark.parametrize(("asked", "found"), [(144, [64, 80]), (96, [48, 48]), (80, [32, 48]), (16, [32, 32])])
def test_rounds_are_fitted_on_their_share_in_whole_sequences(
    asked: int, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 sequences of 16 tokens the first round has four."""
    seen, make = [], iterative.compress_once

    def noted(*given: Any, **options: Any) -> Any:
        seen.append(given[2].data.fitting_tokens)
        return make(*given, **options)

    monkeypatch.setattr(iterative, "compress_once", noted)
    rows = torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(0))
    split = TokenSplit(rows[:9], rows[9:10], rows[10:], "text")
    result = compress(
        tiny_model("llama"),
        split,
        configured(rounds=2, remove=2, distillation=QUICK, fitting_tokens=asked, **OPTIONS),
        tokenizer=lambda text: {},
    )
    assert seen == found
    assert result.data["fitting_tokens"] == sum(seen)


def test_a_round_that_was_broken_off_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"rounds": 2, "remove": 2, **OPTIONS}
    whole = tiny_model("llama")
    wanted = compress(whole, PARTS, **arguments(distillation=QUICK, **settings))
    kept = replace(QUICK, checkpoint_minutes=0.0)
    killed_at(9, kept, output=tmp_path / "out", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.training.round-1", "out.training.round-2"]
    model = tiny_model("llama")
    made: list[TrainingProgress] = []
    counted = kept
    found = compress(
        model,
        PARTS,
        output=tmp_path / "out",
        options=RunOptions(resume=True, callbacks=[BeforeSteps(made.append)]),
        **arguments(distillation=counted, **settings),
    )
    assert len(made) == 4, "steps that were made already were made again"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert found.plan == wanted.plan
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_a_later_round_is_gone_on_with_where_the_first_left_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it leaves none where it ended by a loss that is not finite: it is made again, and the later one is not."""
    settings: dict[str, Any] = {"rounds": 2, "remove": 2, "output": tmp_path / "out", **OPTIONS}
    kept = replace(QUICK, checkpoint_minutes=0.0)
    killed_at(9, kept, **settings)
    (tmp_path / "out.training.round-1").unlink()
    made: list[TrainingProgress] = []
    counted = kept
    compress(
        tiny_model("llama"),
        PARTS,
        options=RunOptions(resume=True, callbacks=[BeforeSteps(made.append)]),
        **arguments(distillation=counted, **settings),
    )
    assert len(made) == 6 + 4


def test_a_round_behind_one_that_took_the_first_blocks_is_told_as_it_is() -> None:
    """What stands before block 0 is run once, and the distance told is that of the model which is returned."""
    model = tiny_model("llama", seed=1)
    original = copy.deepcopy(model).eval()
    asked: dict[str, Any] = {"rounds": 2, "remove": 3, "protect": [2, 3, 4, 5, 7], "distillation": QUICK, **OPTIONS}
    result = compress(model, PARTS, **arguments(**asked))
    assert [one["removed"] for one in result.rounds] == [[0, 1], [6]]
    answers, counted = 0.0, 0
    with torch.no_grad():
        for batch in PARTS["validation"]:
            before, after = (one(**batch).logits.double().log_softmax(-1) for one in (original, model.eval()))
            answers += float((before.exp() * (before - after)).sum())
            counted += before[..., 0].numel()
    assert result.training is not None and result.training.distance == pytest.approx(answers / counted, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 3, "remove": 2}, r"rounds=3.*2 blocks.*Expected 1 to 2"),
        ({"rounds": 2, "remove": 2, "teacher": tiny_model("llama")}, "a profile or a teacher was given with rounds=2"),
        ({"rounds": 2, "remove": 2, "resume": True}, "no training checkpoint at any path"),
        ({"rounds": 2, "remove": 3, "search": "disjoint"}, r"1 block.*2 windows.*Remove more"),
        (
            {"rounds": 2, "remove": 2, "test_texts": ["a"]},
            r"already have a test part.*Leave test_texts",
        ),
        ({"rounds": 7, "remove": 7}, r"12 calibration batches.*7 rounds.*two per round"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_removed(options: dict[str, Any], said: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=said):
        compress(model, PARTS, **arguments(**{"distillation": QUICK, **OPTIONS, **options}))
    assert len(find_stack(model)) == 8


def test_sequences_are_dealt_to_the_rounds_with_their_positions() -> None:
    rows = torch.arange(28).view(7, 4)
    split = TokenSplit(rows, rows[:1], rows[1:2], "whole", positions={"calibration": rows + 100, "test": rows[:1]})
    parts = [split.part_of_calibration(k, 3) for k in range(3)]
    assert sorted(torch.cat([part.calibration for part in parts])[:, 0].tolist()) == rows[:, 0].tolist()
    assert all(torch.equal(part.positions["calibration"], part.calibration + 100) for part in parts)
    assert len({part.fingerprint for part in parts} | {"whole"}) == 4
    assert all(part.test is split.test for part in parts)
    with pytest.raises(StreamlineError, match=r"7 sequences.*of 4.*4 rounds"):
        split.part_of_calibration(0, 4)


def test_two_plans_are_one_in_the_first_numbering() -> None:
    first = SurgeryPlan(
        "layers",
        6,
        (Slot(0, "B"), Slot(None, "New"), Slot(4, "B", zeroed=("mlp",)), Slot(5, "B")),
        (Splice(1, 1, (1, 4), "Linear"),),
    )
    second = SurgeryPlan(
        "layers",
        4,
        (Slot(0, "B"), Slot(1, "New"), Slot(2, "B", zeroed=("attention",), folded=("mlp",))),
        (Splice(1, 1, None, "Linear"), Splice(3, 3, (3, 4), "Linear")),
    )
    both = second.after(first)
    assert both.removed == (1, 2, 3, 5)
    assert both.slots[1] == Slot(None, "New")
    assert both.slots[2] == Slot(4, "B", zeroed=("attention", "mlp"), folded=("mlp",))
    assert both.splices == (Splice(1, 4, None, "Linear"), Splice(3, 5, (5, 6), "Linear"))
    with pytest.raises(StreamlineError, match=r"3 blocks.*6"):
        first.after(second)


def test_a_round_whose_training_was_in_vain_is_told_once() -> None:
    settings = DistillationConfig({"kl": 1.0}, learning_rate=10.0, warmup_ratio=0.0, validations=1)
    result = compress(tiny_model("llama"), PARTS, configured(rounds=2, remove=2, distillation=settings, **OPTIONS))
    first, second = result.warnings
    for number, text in ((1, first), (2, second)):
        assert re.search(rf"^Round {number}: .*not improve the model: KL", text)

"""How much text a time suffices for, by arithmetic, and planned on a model by a clock that its parts move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import CompressionConfig, StreamlineError, compress
from streamline_hooks.planning import plan_training, rates, training_plan_here
from streamline_hooks.planning.training_budget import BudgetPlan, Given, Paces, Sizes, plan_in
from streamline_hooks.repair import HealingConfig
from streamline_hooks.repair.training_pace import TrainingPace
from tests.configured import configured

BEST = CompressionConfig.preset("best")
FAST = TrainingPace(original=1e-3, apart=2e-3, step=4e-3, validation=2e-3, around=1.0, autocast="bfloat16")
SLOW = TrainingPace(original=2e-3, apart=2e-3, step=8e-3, validation=4e-3)
PACES = Paces(
    plan=20.0, prepare=1.0, encode=1e-5, rank=1e-3, fit=1.5e-3, judge=8e-3, score=4e-3, search=3.0, solve=4.0,
    training=FAST, compare=10.0, save=2.0, others=(SLOW,),
)  # fmt: skip
MINUTES = st.floats(8.0, 600.0)


def planned(minutes: float, paces: Paces = PACES, available: int | None = None, **given_: Any) -> BudgetPlan:
    return plan_in(60 * minutes, paces, BEST, Given(**given_), available)


def test_a_plan_by_hand() -> None:
    sizes = Sizes(calibration=102_400, fitting=20_480, validation=4_096, test=12_288, epochs=2, validations=5)
    stages = PACES.stages(sizes)
    dealt = 1e-5 * (102_400 + 4_096 + 12_288)
    assert stages == pytest.approx(
        {
            "plan": 20.0 + dealt,
            "prepare": 1.0 + dealt,
            "rank": 20.48 + 3.0,
            "verify": 30.72 + 4.0 + 32.768,
            "measure": 49.152,
            "train": 1.0 + 102.4 + 8.192 + 2 * 409.6 + 6 * 8.192,
            "compare": 10.0,
            "save": 2.0,
        }
    )


def test_what_is_kept_of_a_training_is_planned_for() -> None:
    """A file of 30 s, each five minutes and at the end."""
    kept = replace(PACES, keep=30.0)
    sizes = Sizes(calibration=102_400, fitting=20_480, validation=4_096, test=12_288, epochs=2, validations=5)
    steps = 2 * 409.6 + 6 * 8.192
    more = kept.stages(sizes)["train"] - PACES.stages(sizes)["train"]
    assert more == pytest.approx(30.0 * (1 + steps / 300))
    plan = planned(40, kept)
    assert plan.sizes.calibration < planned(40).sizes.calibration


@given(MINUTES)
def test_as_much_as_fits_and_one_sequence_more_does_not(minutes: float) -> None:
    plan = planned(minutes)
    sequences = plan.sizes.calibration // 512
    assert plan.seconds <= 60 * minutes
    assert sum(PACES.stages(Given().sizes(sequences + 1)).values()) > 60 * minutes
    assert plan.seconds >= 0.95 * 60 * minutes


@given(MINUTES, MINUTES)
def test_more_time_is_never_for_less_text(one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert planned(less).sizes.calibration <= planned(more).sizes.calibration


@given(MINUTES, MINUTES, st.integers(20_480, 2_000_000))
def test_more_time_or_more_text_is_never_for_less(one: float, other: float, there: int) -> None:
    """Text that does not suffice is not cut down for the rest to be seen once more."""
    less, more = sorted((one, other))
    short, long = (planned(minutes, available=there).sizes for minutes in (less, more))
    assert short.calibration <= long.calibration and short.trained <= long.trained
    assert long.epochs == 1 or long.calibration == there // 512 * 512
    assert long.calibration <= planned(more, available=2 * there).sizes.calibration


@given(st.integers(40, 10_000), st.integers(1, 4))
def test_the_parts_keep_to_their_bounds(sequences: int, epochs: int) -> None:
    sizes = Given().sizes(sequences, epochs)
    assert sizes.calibration == 512 * sequences and sizes.trained == epochs * sizes.calibration
    assert 8_192 <= sizes.fitting <= 40_960 and sizes.fitting <= max(8_192, sizes.calibration / 5)
    assert 2_048 <= sizes.validation <= 4_096 and 4_096 <= sizes.test <= 12_288 and 2 <= sizes.validations <= 8
    assert all(size % 512 == 0 for size in (sizes.fitting, sizes.validation, sizes.test))


def test_what_was_asked_for_is_kept() -> None:
    sizes = planned(20, validation=1_000, test=640, sequence_length=64).sizes
    assert (sizes.validation, sizes.test) == (960, 640)


def test_text_that_does_not_suffice_is_all_taken_and_seen_again_up_to_four_times() -> None:
    free = planned(30)
    assert free.sizes.epochs == 1
    for share, epochs in ((0.9, 1.1), (0.7, 1.5), (0.45, 2.6), (0.35, 3.45)):
        available = round(share * free.sizes.calibration)
        plan = planned(30, available=available)
        assert plan.sizes.epochs == epochs
        assert plan.sizes.calibration == available // 512 * 512
        assert 0.93 * 1800 <= plan.seconds <= 1800
        assert not any(line.startswith("text ") for line in plan.lines())
    short = planned(30, available=30_000)
    assert short.sizes == replace(Given().sizes(58, 4)) and short.seconds < 0.9 * 1800
    assert short.lines()[-1].startswith("text       suffices for ")
    assert "seen 4 times, so that it will end earlier; give more text (--calibration)" in short.lines()[-1]


def test_a_machine_that_is_too_slow_is_told_the_minutes_it_would_need() -> None:
    with pytest.raises(StreamlineError) as raised:
        planned(2)
    said = str(raised.value)
    assert "2.0 min does not suffice" in said and "20,480 tokens" in said
    minutes = int(said.split("Give ")[1].split("m or more")[0])
    assert planned(minutes).sizes.calibration >= 20_480
    with pytest.raises(StreamlineError, match="does not suffice"):
        planned(minutes - 1)


def test_the_training_is_the_presets_and_ends_so_that_all_is_a_tenth_of_the_budget_late() -> None:
    plan = planned(20, available=60_000)
    training, sizes = plan.config.distillation, plan.sizes
    assert training is not None
    assert replace(training, epochs=1, validations=8) == BEST.distillation
    assert (training.epochs, training.validations, plan.config.hardware.autocast) == (
        sizes.epochs,
        sizes.validations,
        "bfloat16",
    )
    planning = 20.0 + 1e-5 * sizes.dealt
    last = 2e-3 * sizes.validation + 0.25 * 4e-3 * sizes.test
    assert plan.config.train_until == pytest.approx(1.1 * 1200 - planning - last - 10.0 - 2.0)
    kept = planned(20, replace(PACES, keep=30.0), available=60_000)
    assert kept.train_until == pytest.approx(plan.train_until - 30.0)


def test_what_it_took_is_said_beside_what_was_planned() -> None:
    plan = planned(20)
    stages = plan.stages
    took = {name: seconds for name, seconds in stages.items() if name != "plan"}
    assert took.pop("save") == 2.0
    took["train"] += 300.0
    line = plan.taken(took)
    share = (plan.seconds + 298.0) / 1200
    assert line.startswith(f"taken      {(plan.seconds + 298) / 60:.1f} min, {share:.0%} of the budget; ")
    assert line.endswith("compare 10 s (10 s), save 0 s (2 s)")
    assert f"train {(stages['train'] + 300) / 60:.1f} min ({stages['train'] / 60:.1f} min)" in line


def test_the_plan_is_said() -> None:
    lines = planned(20).lines()
    assert [line.split()[0] for line in lines] == ["budget", "products", "planned"]
    assert lines[1] == (
        "products   of the training in bfloat16 (a step takes 4.00 ms a token in bfloat16, 8.00 ms a token in the "
        "weights' precision)"
    )
    for stage in PACES.stages(Given().sizes(40)):
        assert f"{stage} " in lines[2]
    assert f"trained on {planned(20).sizes.calibration:,} tokens once" in lines[0]


# On a model.


def small(base: CompressionConfig = BEST, **more: Any) -> CompressionConfig:
    """A config for a small model, in batches of one sequence."""
    return configured(base, **{"remove": 1, "sequence_length": 64, "shortlist": 2, "batch_size": 1, **more})


def test_of_two_precisions_the_faster_is_taken(
    story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = story_model

    for fast, slow in (("bfloat16", None), (None, "bfloat16")):

        def pace(
            student: Any, batches: Any, validation: Any, config: Any, hardware: Any, fast: Any = fast
        ) -> TrainingPace:
            return replace(FAST if hardware.autocast == fast else SLOW, autocast=hardware.autocast)

        monkeypatch.setattr(training_plan_here, "measure_training_pace", pace)
        monkeypatch.setattr(training_plan_here, "precisions_to_time", lambda *given: ["bfloat16", None])
        plan = plan_training(model, tokenizer, story_texts, 3600.0, small())
        assert plan.config.hardware.autocast == fast
        assert [one.autocast for one in plan.paces.others] == [slow]


@pytest.mark.parametrize(
    ("weights", "products", "found"),
    [
        (torch.float32, {torch.float32: 2.0, torch.bfloat16: 1.0}, ["bfloat16", None]),
        (torch.float32, {torch.float32: 1.0, torch.bfloat16: 8.0}, [None]),
        (torch.bfloat16, {torch.bfloat16: 1.0}, [None]),
    ],
)
def test_a_precision_that_is_emulated_is_not_timed(
    weights: torch.dtype, products: dict[torch.dtype, float], found: list[str | None]
) -> None:
    """Three steps of it would take a third of ten minutes."""

    def timed(action: Any) -> tuple[float, Any]:
        made = action()
        return products[made.dtype], made

    assert training_plan_here.precisions_to_time(torch.nn.Linear(2, 2, dtype=weights), timed) == found


def test_planning_leaves_the_model_and_the_random_numbers_as_they_were(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    model, tokenizer = story_model
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    plan_training(model, tokenizer, story_texts, 3600.0, small())
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(t, after[name]) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training


def test_little_text_is_all_taken_and_the_plan_is_carried_out(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that were planned are those that the text is dealt into, to the token; and what is kept is as large."""
    (model, tokenizer), story_texts = story_model, story_texts[:30]
    monkeypatch.setattr(training_plan_here, "write_rate", lambda folder: 1e6)  # bytes a second
    plan = plan_training(model, tokenizer, story_texts, 3600.0, small(batch_size=4), output=tmp_path / "out")
    assert plan.sizes.epochs == 4 and plan.sizes.dealt <= sum(map(len, story_texts))
    assert "so that it will end earlier" in plan.lines()[-1]
    config = configured(plan.config, speed=False, generation=False)
    result = compress(model, tokenizer, story_texts, config, checkpoint=tmp_path / "kept")
    assert result.training is not None and result.training.tokens == plan.sizes.trained
    assert 0.8 < 1e6 * plan.paces.keep / (tmp_path / "kept").stat().st_size < 1.0  # small as it is, it has a head
    figures = [result.data[f"{name}_tokens"] for name in ("calibration", "fitting", "validation", "test")]
    sizes = plan.sizes
    assert figures == [sizes.calibration, sizes.fitting, sizes.validation, sizes.test]
    assert not any("shrunk" in note for note in result.data["notes"])
    assert len(result.model.model.layers) == 4


def test_a_folder_that_is_not_there_yet_is_told_by_the_nearest_above_it(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    write = rates.write_test_file
    monkeypatch.setattr(rates, "write_test_file", lambda folder: (asked.append(folder), write(folder)))
    plan = plan_training(*story_model, story_texts, 3600.0, small(), output=tmp_path / "new" / "dir" / "out")
    assert asked == [tmp_path] and plan.paces.keep > 0 and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told_before_anything_is_timed(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rates, "write_test_file", full)
    monkeypatch.setattr(training_plan_here, "profile", None)
    with pytest.raises(StreamlineError, match=r"No space left.*Choose"):
        plan_training(*story_model, story_texts, 3600.0, small(), output=tmp_path / "out")


def test_the_whole_search_of_a_preset_is_planned_for(
    story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows apart are trained together, each is fitted in a pass of its own, and blocks are scored one by one."""
    trained: list[tuple[range, ...]] = []
    made = training_plan_here.student_of

    def student_of(stack: Any, pairs: Any, *given: Any, **options: Any) -> Any:
        trained.append(tuple(window for window, _ in pairs))
        return made(stack, pairs, *given, **options)

    monkeypatch.setattr(training_plan_here, "student_of", student_of)
    apart = CompressionConfig.preset("two-windows")  # of which only blocks 1 and 3 can go
    plans = {
        by: plan_training(*story_model, story_texts, 3600.0, small(apart, criterion=by, keep=(0,), remove=2))
        for by in ("kl", "cosine")
    }
    assert set(trained) == {(range(1, 2), range(3, 4))}
    paces = {name: plan.paces for name, plan in plans.items()}
    assert paces["cosine"].search == 0.0 < paces["kl"].search
    found = plans["kl"].config
    assert (found.search.kind, found.search.criterion, found.search.shortlist) == ("disjoint", "kl", 2)
    assert found.data.repeated == 1.0


@pytest.mark.parametrize("repeated", [0.0, 1.0])
def test_the_window_whose_training_is_timed_is_chosen_on_the_text_of_the_preset(
    repeated: float, story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have twice as many blocks behind it to be healed."""
    ranked: list[torch.Tensor] = []
    made = training_plan_here.profile

    def profile(model: Any, batches: Any, **options: Any) -> Any:
        ranked.extend(batch["input_ids"] for batch in batches)
        return made(model, batches, **options)

    monkeypatch.setattr(training_plan_here, "profile", profile)
    plan = plan_training(*story_model, story_texts, 3600.0, small(repeated=repeated))
    alike = [bool(torch.equal(ids[:, :32], ids[:, 32:])) for ids in ranked]
    assert ranked and set(alike) == {repeated == 1.0} and plan.config.data.repeated == repeated


def test_the_last_block_stays_where_blocks_behind_the_window_are_healed(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    """Else the best window may be the last, and that is told when the time for finding it is spent."""
    plan = plan_training(*story_model, story_texts, 3600.0, small(keep=(0, 1)))
    assert plan.config.search.keep == (0, 1, -1)
    with pytest.raises(StreamlineError, match=r"\(0.*1.*2.*3.*4\)"):
        plan_training(*story_model, story_texts, 3600.0, small(keep=(0, 1, 2, 3)))
    elsewhere = replace(BEST, healing=HealingConfig(method="partial", where="beside", count=1))
    alone = plan_training(*story_model, story_texts, 3600.0, small(elsewhere, keep=(0, 1, 2, 3)))
    assert alone.config.search.keep == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("found", "apart", "left", "others"),
    [
        ((16_384, 1_536, 3_072), False, 20_992 - 6_144, (2_048, 4_096)),  # enough for the others as they were meant
        ((3_584, 512, 1_024), False, 5_120 - 1_536, (512, 1_024)),  # a tenth and a fifth
        ((20_480, 2_048, 1_024), True, 20_480, (2_048, 1_024)),  # the test alone has too little
        ((2_048, 512, 4_096), True, 2_048, (512, 4_096)),  # all else has
    ],
)
def test_of_less_text_the_training_takes_what_the_others_leave(
    found: tuple[int, int, int], apart: bool, left: int, others: tuple[int, int]
) -> None:
    given_, available = training_plan_here.shrink_to_text(Given(), Given().sizes(40), found, apart=apart)
    assert available == left and (given_.validation, given_.test) == others


def test_what_is_fitted_on_are_two_sequences_at_least() -> None:
    """However long they are: a ridge is chosen on another one than those that are fitted on."""
    for length in (512, 4_096, 8_192, 50_000):
        for sequences in (2, 5, 50):
            sizes = Given(sequence_length=length).sizes(sequences)
            assert 2 * length <= sizes.fitting <= sizes.calibration == sequences * length


def test_what_no_plan_is_made_for_is_refused(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    with pytest.raises(StreamlineError, match=r"2 rounds.*one"):
        plan_training(*story_model, story_texts, 600.0, CompressionConfig.preset("iterative"))


def test_what_is_not_trained_has_no_budget(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    with pytest.raises(StreamlineError, match="trains nothing"):
        plan_training(*story_model, story_texts, 60.0, CompressionConfig.preset("none"))

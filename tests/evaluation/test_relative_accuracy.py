"""Relative accuracy and paired comparisons: by hand, what must hold always, and against another error estimate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality_scores import Quality, Scores
from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import (
    PairedScores,
    RelativeAccuracy,
    RelativeAccuracyDifference,
    paired_bootstrap,
    relative_accuracy,
)
from streamline_hooks.evaluation.bootstrap import bootstrap_accuracies


def answers(right: int, of: int) -> list[bool]:
    return [k < right for k in range(of)]


def correlated(count: int, seed: int, kept: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """A model right about seven of ten questions, and one that says the same but for a tenth of them."""
    random = np.random.default_rng(seed)
    original = random.random(count) < 0.7
    changed = np.where(random.random(count) < kept, original, random.random(count) < 0.5)
    return original, changed


def only(tasks: list[PairedScores], **options: Any) -> RelativeAccuracy:
    (found,) = relative_accuracy(tasks, **{"draws": 1000, **options}).values()
    return found


def test_by_hand() -> None:
    """Accuracies 0.8 → 0.7 and 0.6 → 0.6 of chance 0.25 and 0.5; a third is 0.52 of 0.5, and left out above chance."""
    tasks = [
        PairedScores("a", answers(80, 100), answers(70, 100), 0.25),
        PairedScores("b", answers(600, 1000), answers(600, 1000), 0.5),
        PairedScores("c", answers(52, 100), answers(50, 100), 0.5),
    ]
    found = only(tasks)
    assert found.ratio.value == pytest.approx((0.7 + 0.6 + 0.5) / (0.8 + 0.6 + 0.52))
    assert found.above_chance is not None
    assert found.above_chance.value == pytest.approx((0.45 / 0.55 + 0.1 / 0.1) / 2)
    assert {name: each.value for name, each in found.tasks.items()} == {"a": pytest.approx(0.45 / 0.55), "b": 1.0}
    assert found.left_out == {"c": "where the original's 52.0% ± 5.0% is not clearly above the chance of 50.0%"}
    text = str(found)
    assert text.startswith("93.8% [") and "of the mean accuracy, 90.9% [" in text
    assert text.endswith(f"above chance (2 of 3 tasks; without c, {found.left_out['c']})")
    assert list(only(tasks, clearly=0.3).tasks) == ["a", "b", "c"]
    nothing = only(tasks[2:])
    assert nothing.above_chance is None and "no task above chance (0 of 1 tasks" in str(nothing)


def test_the_mean_is_taken_before_the_ratio_as_in_the_paper() -> None:
    """Llama 2 7B and what LLM-Streamline made of it on BoolQ, HellaSwag, PIQA and MMLU: 91.2 %, as reported.

    The mean of the four ratios would be 91.3 %.
    """
    reported = {"boolq": (708, 675), "hellaswag": (713, 611), "piqa": (781, 715), "mmlu": (492, 455)}
    tasks = [PairedScores(name, answers(a, 1000), answers(b, 1000)) for name, (a, b) in reported.items()]
    found = only(tasks)
    assert found.ratio.value == pytest.approx(0.912, abs=5e-4)
    assert found.above_chance is not None and found.above_chance.value == pytest.approx(0.9127, abs=1e-4)


def test_groups_are_apart() -> None:
    tasks = [
        PairedScores("write", [1.0, 0.5, 0.0], [0.5, 0.25, 0.0], group="generation"),
        PairedScores("a", answers(80, 100), answers(70, 100), 0.25),
    ]
    both = relative_accuracy(tasks, draws=200)
    assert list(both) == ["generation", "classification"]
    assert both["generation"].ratio.value == pytest.approx(0.5)  # scores between wrong and right
    assert both["classification"] == relative_accuracy(tasks[1:], draws=200)["classification"]


TASKS = st.lists(
    st.tuples(st.integers(2, 60), st.integers(0, 10_000), st.floats(0.0, 0.6), st.sampled_from([0.25, 0.5, 0.0])),
    min_size=1, max_size=4,
)  # fmt: skip


def drawn(of: list[tuple[int, int, float, float]]) -> list[PairedScores]:
    found = []
    for number, (count, seed, gone, chance) in enumerate(of):
        original, changed = correlated(count, seed, kept=1.0 - gone)
        original[0] = True  # of nothing, nothing is retained
        found.append(PairedScores(f"task {number}", original.tolist(), changed.tolist(), chance))
    return found


@given(TASKS, st.integers(0, 5))
def test_a_model_retains_all_of_itself_for_sure(of: list[tuple[int, int, float, float]], seed: int) -> None:
    tasks = [PairedScores(t.name, t.original, t.original, t.chance) for t in drawn(of)]
    found = only(tasks, draws=100, seed=seed, clearly=0.5)
    for each in (found.ratio, found.above_chance, *found.tasks.values()):
        if each is not None:
            assert (each.value, each.low, each.high, each.standard_error, each.undefined) == (1.0, 1.0, 1.0, 0.0, 0.0)


@given(TASKS, st.randoms())
def test_neither_the_order_of_tasks_nor_that_of_questions_matters(
    of: list[tuple[int, int, float, float]], random: Any
) -> None:
    tasks = drawn(of)
    found = only(tasks, draws=100)
    moved = []
    for task in random.sample(tasks, len(tasks)):
        order = random.sample(range(len(task.original)), len(task.original))
        pair = [[side[k] for k in order] for side in (task.original, task.changed)]
        moved.append(PairedScores(task.name, *pair, task.chance))
    again = only(moved, draws=100)
    assert again == found


@settings(max_examples=60)
@given(TASKS)
def test_an_interval_holds_its_value(of: list[tuple[int, int, float, float]]) -> None:
    found = only(drawn(of), draws=500)
    for each in (found.ratio, found.above_chance, *found.tasks.values()):
        if each is not None:
            assert each.low <= each.value + 1e-12 and each.value <= each.high + 1e-12
            assert each.standard_error >= 0.0
            # Of two questions a quarter of the draws may have none that was answered right.
            assert each.undefined < 0.1 or min(count for count, *_ in of) < 20


def test_the_error_is_that_of_the_benchmark() -> None:
    """Which is linearized, and knows nothing of draws."""
    tasks = [PairedScores(f"{k}", *correlated(400, k), 0.25) for k in range(5)]  # type: ignore[arg-type]
    quality = Quality.__new__(Quality)
    quality.chance = {t.name: t.chance for t in tasks}
    told = [{t.name: "".join("01"[int(a)] for a in side(t)) for t in tasks} for side in (_original, _changed)]
    quality.scores = Scores({}, told[0])
    expected = quality.retained_scores(Scores({}, told[1]))
    found = only(tasks, draws=4000)
    assert found.above_chance is not None and list(found.tasks) == quality.counted == ["0", "1", "2", "3", "4"]
    assert found.above_chance.value == pytest.approx(expected["mean_retained"])
    assert found.above_chance.standard_error == pytest.approx(expected["mean_retained_standard_error"], rel=0.1)


def _original(task: PairedScores) -> Any:
    return task.original


def _changed(task: PairedScores) -> Any:
    return task.changed


def test_questions_drawn_for_each_model_apart_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: where both models find the same questions hard, the interval becomes far too wide."""
    tasks = [PairedScores(f"{k}", *correlated(300, k), 0.25) for k in range(4)]  # type: ignore[arg-type]
    paired = only(tasks)

    def apart(name: str, answers: np.ndarray, draws: int, seed: int, clusters: Any) -> np.ndarray:
        random = np.random.default_rng(seed)
        chosen = [side[random.integers(0, len(side), (draws, len(side)))].mean(axis=1) for side in answers.T]
        return np.stack([np.append(side.mean(), c) for side, c in zip(answers.T, chosen, strict=True)])

    monkeypatch.setattr(sys.modules[relative_accuracy.__module__], "bootstrap_accuracies", apart)
    unpaired = only(tasks)
    for one, other in ((paired.ratio, unpaired.ratio), (paired.above_chance, unpaired.above_chance)):
        assert one is not None and other is not None and one.value == pytest.approx(other.value)
        assert 1.5 * (one.high - one.low) < other.high - other.low
        assert 1.5 * one.standard_error < other.standard_error


def test_draws_of_kinds_are_draws_of_questions() -> None:
    """The multinomial against indices drawn one by one; and an interval that holds as much as it says."""
    original, changed = correlated(200, 3)
    found = only([PairedScores("one", original.tolist(), changed.tolist())], draws=20_000)
    chosen = np.random.default_rng(0).integers(0, 200, (20_000, 200))
    ratios = changed[chosen].mean(axis=1) / original[chosen].mean(axis=1)
    assert found.ratio.standard_error == pytest.approx(ratios.std(), rel=0.03)
    assert [found.ratio.low, found.ratio.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist(), abs=0.01)
    narrow = only([PairedScores("one", original.tolist(), changed.tolist())], draws=20_000, level=0.5)
    assert [narrow.ratio.low, narrow.ratio.high] == pytest.approx(np.quantile(ratios, [0.25, 0.75]).tolist(), abs=0.01)


def test_questions_that_stand_or_fall_together_are_drawn_together() -> None:
    """Twenty passages of five questions, which a model answers all or none of, against passages drawn by index."""
    random = np.random.default_rng(2)
    passages = np.repeat(np.arange(20), 5)
    original, changed = (np.repeat(random.random(20) < share, 5) for share in (0.8, 0.6))
    order = random.permutation(100)
    together = PairedScores(
        "a", original[order].tolist(), changed[order].tolist(), clusters=[f"passage {k}" for k in passages[order]]
    )
    alone = PairedScores("a", original.tolist(), changed.tolist())
    found, narrow = only([together], draws=20_000).ratio, only([alone], draws=20_000).ratio
    chosen = np.random.default_rng(0).integers(0, 20, (20_000, 20))
    ratios = changed[::5][chosen].mean(axis=1) / original[::5][chosen].mean(axis=1)
    assert found.value == pytest.approx(narrow.value)
    assert [found.low, found.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist(), abs=0.02)
    assert (
        found.standard_error == pytest.approx(ratios.std(), rel=0.03)
        and found.standard_error > 1.8 * narrow.standard_error
    )
    each_alone = PairedScores("a", alone.original, alone.changed, clusters=range(100))
    assert only([each_alone], draws=500) == only([alone], draws=500)


def test_clusters_of_different_size_weigh_by_their_questions() -> None:
    """A passage of three and one of one: the accuracy is 3/4, and 1, 3/4 or 0 in one, two and one of four draws."""
    task = PairedScores("a", [True] * 4, [True, True, True, False], clusters=["a", "a", "a", "b"])
    found, narrow = (only([task], draws=2000, level=level) for level in (0.6, 0.4))
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (0.75, 0.0, 1.0)
    assert (narrow.ratio.low, narrow.ratio.high) == (0.75, 0.75)
    assert found.ratio.standard_error == pytest.approx(np.std([1.0, 0.75, 0.75, 0.0]), rel=0.1)


def test_what_is_clear_of_questions_alone_may_not_be_of_clusters() -> None:
    """70 of 100 above a chance of a half are four standard errors; of ten passages that are answered as one, one."""
    right = ([True] * 7 + [False] * 3) * 10
    clusters = list(range(10)) * 10
    assert not only([PairedScores("a", right, right, 0.5)]).left_out
    left_out = only([PairedScores("a", right, right, 0.5, clusters=clusters)]).left_out["a"]
    assert left_out == "where the original's 70.0% ± 15.3% is not clearly above the chance of 50.0%"
    one = PairedScores("a", right, right, 0.5, clusters=["all"] * 100)
    assert only([one]).left_out == {"a": "whose questions all belong to one cluster"}


def test_scores_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores between 0 and 1 make many kinds of question, of which few draws are held at a time."""
    random = np.random.default_rng(1)
    task = PairedScores("f1", random.random(50).tolist(), random.random(50).tolist(), group="generation")
    whole = only([task])
    monkeypatch.setattr(sys.modules[bootstrap_accuracies.__module__], "DRAWS_AT_ONCE", 333)
    assert only([task]) == whole


def test_an_interval_is_open_where_the_original_may_know_nothing() -> None:
    """Barely above chance: in many draws there is nothing to retain, and no number would be honest."""
    tasks = [PairedScores("a", answers(56, 100), answers(20, 56) + answers(36, 44), 0.5)]
    found = only(tasks, clearly=1.0)
    assert found.above_chance is not None and found.above_chance.undefined > 0.05
    assert (found.above_chance.low, found.above_chance.high) == (-np.inf, np.inf)
    assert np.isfinite([found.ratio.low, found.ratio.high]).all()


def test_what_cannot_be_compared() -> None:
    right = answers(3, 4)
    for tasks, text in (
        ([], "no task"),
        ([PairedScores("a", right, right[:3])], r"'a'.*4 scores.*3 of"),
        ([PairedScores("a", [], [])], r"'a'.*0 scores.*at least one item"),
        ([PairedScores("a", [0.5, 2.0], [0.0, 1.0])], r"'a'.*between 0 .*1"),
        ([PairedScores("a", [0.5, float("nan")], [0.0, 1.0])], r"'a'.*between"),
        ([PairedScores("a", right, right, 1.5)], r"'a'.*1.5.*between 0"),
        (
            [PairedScores("a", right, right, clusters="ab")],
            r"'a'.*4 scores.*2 clusters",
        ),
        ([PairedScores("a", right, right), PairedScores("a", right, right, group="b")], r"Two tasks.*'a'"),
        ([PairedScores("a", answers(0, 4), right)], r"scores 0 on every item.*'classification'"),
    ):
        with pytest.raises(StreamlineError, match=text):
            relative_accuracy(tasks)  # type: ignore[arg-type]
    for options in ({"clearly": -1.0}, {"draws": 10}, {"level": 1.0}, {"seed": -1}):
        with pytest.raises(StreamlineError, match=r"is out of range\. Expected"):
            relative_accuracy([PairedScores("a", right, right)], **options)  # type: ignore[arg-type]
    assert only([PairedScores("a", [True], [True])]).left_out == {"a": "which has one question"}


# Two changed models


def three(count: int, seed: int) -> list[list[bool]]:
    """An original, one that says nine tenths of it, and one that says nine tenths of that."""
    random = np.random.default_rng(seed)
    found = [random.random(count) < 0.8]
    for _ in range(2):
        found.append(np.where(random.random(count) < 0.9, found[-1], random.random(count) < 0.5))
    found[0][0] = True  # of nothing, nothing is retained
    return [side.tolist() for side in found]


def sides(*several: tuple[int, int], chance: float = 0.25) -> tuple[list[PairedScores], list[PairedScores]]:
    """The two models' answers to some tasks, each of so many questions with a seed."""
    found: tuple[list[PairedScores], list[PairedScores]] = ([], [])
    for number, (count, seed) in enumerate(several):
        original, one, other = three(count, seed)
        for side, changed in zip(found, (one, other), strict=True):
            side.append(PairedScores(f"task {number}", original, changed, chance))
    return found


def difference(
    first: Sequence[PairedScores], second: Sequence[PairedScores], **options: Any
) -> RelativeAccuracyDifference:
    (found,) = paired_bootstrap(first, second, **{"draws": 1000, **options}).values()
    return found


def test_a_difference_by_hand() -> None:
    """Of 0.8 above chance 0.3 the one keeps 0.7 and the other 0.5; of all of 1.0 one keeps 0.4 and the other 0.6."""
    first = [
        PairedScores("a", answers(80, 100), answers(65, 100), 0.3),
        PairedScores("b", answers(50, 50), answers(20, 50)),
    ]
    second = [
        PairedScores("b", answers(50, 50), answers(30, 50)),
        PairedScores("a", answers(80, 100), answers(55, 100), 0.3),
    ]
    found = difference(first, second)
    assert found.above_chance is not None
    assert {name: one.value for name, one in found.tasks.items()} == pytest.approx({"a": 0.2, "b": -0.2})
    assert found.above_chance.value == pytest.approx(0.0)
    assert found.ratio.value == pytest.approx((0.65 + 0.4 - 0.55 - 0.6) / 1.8)
    guessed = [PairedScores("c", answers(52, 100), answers(50, 100), 0.5)]
    known = difference(first + guessed, second + guessed)
    assert known.left_out == {"c": "where the original's 52.0% ± 5.0% is not clearly above the chance of 50.0%"}
    assert list(known.tasks) == ["a", "b"] and known.above_chance == found.above_chance
    assert difference(guessed, guessed).above_chance is None


SEVERAL = st.lists(st.tuples(st.integers(10, 60), st.integers(0, 10_000)), min_size=1, max_size=3)


@given(SEVERAL, st.integers(0, 5))
def test_it_is_what_the_one_retains_less_what_the_other_does(several: list[tuple[int, int]], seed: int) -> None:
    first, second = sides(*several)
    found, back = difference(first, second, seed=seed), difference(second, first, seed=seed)
    each = [relative_accuracy(side, draws=100)["classification"] for side in (first, second)]
    assert found.ratio.value == pytest.approx(each[0].ratio.value - each[1].ratio.value)
    assert found.left_out == each[0].left_out
    for name, one in found.tasks.items():
        assert one.value == pytest.approx(each[0].tasks[name].value - each[1].tasks[name].value)
    pairs = [(found.ratio, back.ratio), *((one, back.tasks[name]) for name, one in found.tasks.items())]
    for one, other in pairs:
        assert one.value == pytest.approx(-other.value) and one.undefined == other.undefined
        assert one.low <= one.value + 1e-12 and one.value <= one.high + 1e-12


@given(SEVERAL)
def test_between_a_model_and_itself_there_is_no_difference(several: list[tuple[int, int]]) -> None:
    first, _ = sides(*several)
    found = difference(first, first, draws=100)
    for each in (found.ratio, *found.tasks.values()):
        # Of a few questions a draw may leave nothing that could be retained.
        assert each.value == 0.0 and (each.undefined > 0 or (each.low, each.high) == (0.0, 0.0))


def test_a_difference_of_questions_drawn_apart_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: one model answers some questions more, and none less, and it would not be told."""
    original, other = three(300, 5)[:2]
    one = [better or k % 12 == 0 for k, better in enumerate(other)]
    first, second = ([PairedScores("a", original, changed)] for changed in (one, other))
    found = difference(first, second).ratio
    assert found.value > 0 and found.low > 0

    module = sys.modules[paired_bootstrap.__module__]
    paired = module.bootstrap_accuracies

    def apart(name: str, answers: np.ndarray, draws: int, seed: int, clusters: Any) -> np.ndarray:
        return np.concatenate([paired(name, side[:, None], draws, seed + k) for k, side in enumerate(answers.T)])

    monkeypatch.setattr(module, "bootstrap_accuracies", apart)
    unpaired = difference(first, second).ratio
    assert unpaired.value == pytest.approx(found.value) and unpaired.low < 0 < found.low


def test_an_interval_holds_as_often_as_it_says() -> None:
    """Of 200 draws from two models of which the one is 5 points better, some 90 % hold these 5 points."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        both, more = random.random(400) < 0.6, random.random(400) < 0.125  # of the other 0.4
        first, second = ([PairedScores("a", [True] * 400, side.tolist())] for side in (both | more, both))
        one = difference(first, second, draws=200, level=0.9).ratio
        held += one.low <= 0.05 <= one.high
    assert 165 <= held <= 195


def test_models_that_cannot_be_compared() -> None:
    first, second = sides((20, 1), (20, 2))
    others, _ = sides((20, 3), (20, 2))
    moved = [PairedScores(task.name, task.original, task.changed, 0.5) for task in second]
    together = [PairedScores(task.name, task.original, task.changed, 0.25, clusters=[1, 2] * 10) for task in second]
    for several, text in (
        (second[:1], r"'task 1'.*Expected"),
        (others, r"'task 0' differ.*one original"),
        (together, "chance or clusters"),
        (moved, r"chance or clusters on the task 'task 0' differ"),
        ([], "no task"),
    ):
        with pytest.raises(StreamlineError, match=text):
            paired_bootstrap(first, several)
    with pytest.raises(StreamlineError, match=r"draws=10 is out of range.*100"):
        paired_bootstrap(first, second, draws=10)

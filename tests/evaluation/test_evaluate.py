"""A whole suite against each measure alone; what is kept, and what is asked again."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError, evaluate
from streamline_hooks.evaluation import (
    Evaluation,
    Problem,
    ProblemResults,
    Scores,
    Suite,
    TaskSettings,
    TextGenerationConfig,
    agreement,
    generate_texts,
    run_tasks,
    sliding_perplexity,
    solve_problems,
    task_config_from_rows,
)
from streamline_hooks.evaluation.synthetic_tasks import guessing_accuracy
from streamline_hooks.modeling import inference
from streamline_hooks.surgery import PromptSkip

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

QUERY = "Once upon a time, there was a little girl named"
ROWS = [
    {"query": QUERY, "choices": ["Lily.", "Table.", "Seventeen."], "gold": 0},
    {"query": "Tom and his dog went to the", "choices": ["seven", "park.", "because"], "gold": 1},
    {"query": "She was very", "choices": ["river.", "and", "happy."], "gold": 2},
    {"query": "One day, a bird", "choices": ["blue", "Lily", "flew"], "gold": 2},
]
ENDS = [
    {"context": "Once upon a", "continuation": "time"},
    {"context": "Once upon a time, there was a little", "continuation": "xylophone"},
]
TASKS = [
    task_config_from_rows(ROWS, "girls"),
    task_config_from_rows(ROWS[1:], "dogs"),
    task_config_from_rows(ENDS, "ends"),
]
PROMPTS = [f"{QUERY} Lily. She", "One day, a big dog"]


@pytest.fixture(scope="module")
def pair(stories: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """The original, the same with a block less, and their tokenizer."""
    original, tokenizer = stories
    changed = copy.deepcopy(original)
    with LayerSurgeon(changed) as surgeon:
        surgeon.remove(range(2, 3))
        surgeon.commit()
    return original, changed, tokenizer


@pytest.fixture(scope="module")
def suite(pair: tuple[Any, Any, Any], story_texts: list[str]) -> Suite:
    original, _, tokenizer = pair
    (told,) = generate_texts(original, tokenizer, PROMPTS[:1], TextGenerationConfig(new_tokens=8))[0]
    return Suite(
        text={"tales": story_texts[:3], "more tales": story_texts[3:5]},
        tasks=TASKS,
        problems={"told": [Problem(PROMPTS[0], told.text), Problem(PROMPTS[1], "no")]},
        problem_tokens=8,
        stop=(),
        prompts=PROMPTS,
        window=48,
        stride=16,
        new_tokens=12,
        timed=None,
    )


def test_it_is_what_each_measure_alone_gives(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, tokenizer, suite, original, name="shorter", reference_name="stories")
    assert found.original is not None
    for model, scores in ((changed, found.scores), (original, found.original)):
        assert scores.tasks == run_tasks(model, tokenizer, TASKS)
        assert scores.problems["told"] == solve_problems(
            model, tokenizer, suite.problems["told"], TextGenerationConfig(new_tokens=8)
        )
        assert list(scores.generated) == [
            text for (text,) in generate_texts(model, tokenizer, PROMPTS, TextGenerationConfig(new_tokens=12))
        ]
        for domain, documents in suite.text.items():
            alone = sliding_perplexity(model, tokenizer, documents, window=48, stride=16)
            assert scores.text[domain].value == pytest.approx(alone.value, rel=1e-6)
            assert (scores.text[domain].tokens, scores.text[domain].bytes) == (alone.tokens, alone.bytes)
        assert scores.parameters == sum(p.numel() for p in model.parameters())
    assert found.original.tasks["ends"].scores == (1.0, 0.0)
    assert found.original.problems["told"].correct == (True, False)
    ratios = [found.scores.text[d].value / found.original.text[d].value for d in suite.text]
    assert found.mean_perplexity_ratio == pytest.approx(sum(ratios) / 2)
    assert found.mean_perplexity_ratio is not None and found.mean_perplexity_ratio > 1.01


def test_agreement_is_that_of_the_same_windows(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    """A document that fits one window is one sequence, whose last logits predict nothing that is there."""
    original, changed, tokenizer = pair
    text = suite.text["tales"][0][:100]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    expected = agreement(changed, original, [torch.tensor([ids[:-1]])])
    found = evaluate(changed, tokenizer, Suite(text={"a tale": [text]}, timed=None), original).agreement["a tale"]
    assert found.tokens == expected.tokens == len(ids) - 1
    assert (found.kl, found.top1) == (pytest.approx(expected.kl, rel=1e-5), expected.top1)
    assert found.spread.quantile(0.0) <= found.kl <= found.spread.quantile(1.0) * 1.02


def test_a_copy_retains_everything(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, tokenizer = pair
    found = evaluate(copy.deepcopy(original), tokenizer, suite, original)
    assert found.mean_perplexity_ratio == pytest.approx(1.0)
    assert set(found.retained) == {"classification", "generation"}
    assert all((r.ratio.value, r.ratio.low, r.ratio.high) == (1.0, 1.0, 1.0) for r in found.retained.values())
    assert found.stability == {name: {"value": pytest.approx(1.0), "share": 1.0} for name in ("girls", "dogs")}
    assert found.matched is not None and found.matched.share == 1.0 and found.matched.length == 12
    whole = found.report()["agreement"]
    assert abs(whole["kl"]) < 1e-6 and whole["top1"] == 1.0 and whole["quantiles"]["0.99"] < 1e-6


def test_what_is_retained_is_that_of_the_changed_model(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    """Of one that finds likeliest what its original finds least likely."""
    original, _, tokenizer = pair
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        wrong.model.norm.weight.neg_()
    found = evaluate(wrong, tokenizer, suite, original)
    assert found.original is not None
    tasks, theirs = found.scores.tasks, found.original.tasks
    means = [statistics.fmean([of["girls"].accuracy, of["dogs"].accuracy]) for of in (tasks, theirs)]
    assert found.retained["classification"].ratio.value == pytest.approx(means[0] / means[1])
    assert means[0] < means[1]
    assert found.retained["generation"].ratio.value == 0.0
    assert found.stability["girls"]["value"] < 1.0 and found.matched is not None and found.matched.length < 3
    whole = evaluate(copy.deepcopy(original), tokenizer, suite, original)
    more, less = whole.accuracy_difference(found), found.accuracy_difference(whole)
    assert more["classification"].ratio.value == pytest.approx(1.0 - means[0] / means[1])
    assert (more["generation"].ratio.value, less["generation"].ratio.value) == (1.0, -1.0)


def solved_by_tries(*tries: list[int]) -> Scores:
    return Scores(
        1, 1, problems={"sums": ProblemResults(tuple(() for _ in tries), tuple(tuple(map(bool, t)) for t in tries))}
    )


def test_all_tries_count_for_what_is_retained() -> None:
    """As they do for the accuracy beside it."""
    theirs = solved_by_tries([1, 1], [1, 1], [1, 1], [1, 1])
    sides = [
        Evaluation("changed", mine, "original", theirs, chance={"sums": 0.0})
        for mine in (solved_by_tries([1, 0], [1, 0], [1, 0], [1, 0]), solved_by_tries(*[[1, 1]] * 3, [0, 0]))
    ]
    assert [side.retained["generation"].ratio.value for side in sides] == [0.5, 0.75]
    more = sides[1].accuracy_difference(sides[0])["generation"]
    assert more.ratio.value == 0.25 and more.above_chance is not None and more.above_chance.value == 0.25


def test_who_always_writes_one_answer_retains_nothing_above_chance() -> None:
    problems = tuple(Problem(f"Row {k}: how many?", "1" if k < 21 else str(k)) for k in range(41))

    def scores(right: Iterable[bool]) -> Scores:
        each = [(one,) for one in right]
        return Scores(1, 1, problems={"counting": ProblemResults(tuple(() for _ in each), tuple(each))})

    guesses = scores(p.answer == "1" for p in problems)
    chance = {"counting": guessing_accuracy(problems)}
    found = Evaluation("guesses", guesses, "original", scores(k < 36 for k in range(41)), chance=chance)
    kept = found.retained["generation"].above_chance
    assert kept is not None and kept.value == pytest.approx((21 / 41 - 0.5) / (36 / 41 - 0.5))
    assert kept.low < 0 < kept.high
    assert found.report()["accuracy"]["counting"]["chance"] == 0.5


def test_a_model_is_held_against_another_beside_one_original(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, tokenizer, suite, original)
    assert all(
        one.ratio.value == one.ratio.low == one.ratio.high == 0.0 for one in found.accuracy_difference(found).values()
    )
    with pytest.raises(StreamlineError, match=r"no original.*`reference`"):
        found.accuracy_difference(evaluate(changed, tokenizer, suite))
    few = Suite(tasks=TASKS[:1], timed=None)
    with pytest.raises(StreamlineError, match=r"'dogs' was evaluated for one model only"):
        found.accuracy_difference(evaluate(changed, tokenizer, few, original))
    with pytest.raises(StreamlineError, match="Expected one original"):
        found.accuracy_difference(evaluate(original, tokenizer, suite, changed))
    nothing = evaluate(changed, tokenizer, Suite(text=suite.text, timed=None), original)
    assert nothing.accuracy_difference(nothing) == {}


def test_the_report_is_json_and_says_what_the_scores_say(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, tokenizer, suite, original, name="shorter", reference_name="stories")
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert (report["model"], report["reference"]) == ("shorter", "stories")
    girls = found.scores.tasks["girls"]
    assert report["accuracy"]["girls"]["value"] == girls.accuracy
    assert report["accuracy"]["girls"]["metric"] == "acc"
    said = report["tasks"]["girls"]
    assert said["metrics"]["acc_norm"] == dict(
        zip(("value", "standard_error"), girls.metrics["girls"]["acc_norm"], strict=True)
    )
    assert (said["items"], said["few_shot"], said["version"]) == (4, 0, "1.0") and "lm_eval" in report["packages"]
    assert report["original"]["tasks"].keys() == report["tasks"].keys() == {"girls", "dogs", "ends"}
    assert report["accuracy"]["girls"]["chance"] == pytest.approx(1 / 3)
    assert report["original"]["accuracy"]["told"] == {
        "value": 0.5, "standard_error": 0.5, "chance": 0.0, "items": 2, "metric": "exact match",
    }  # fmt: skip
    assert report["samples"][0]["prompt"] == PROMPTS[0]
    assert report["samples"][0]["reference"] == found.original.generated[0].text
    assert report["perplexity"]["tales"]["tokens"] == found.scores.text["tales"].tokens
    assert {"girls", "tales", "ends", "told", "prompts"} <= report["seconds"].keys()
    table = found.table()
    assert (
        "perplexity, tales" in table
        and "dogs (acc)" in table
        and "dogs (acc_norm)" in table
        and "retained, classification" in table
    )
    assert f"x {found.scores.text['tales'].value / found.original.text['tales'].value:.2f}" in table


def test_without_an_original(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, tokenizer = pair
    found = evaluate(original, tokenizer, suite)
    assert found.scores.text["tales"] == sliding_perplexity(
        original, tokenizer, suite.text["tales"], window=48, stride=16
    )
    report = found.report()
    assert not report.keys() & {"original", "agreement", "retained", "stability", "speed"}
    assert report["reference"] is None and report["samples"][0]["reference"] is None
    assert found.table().splitlines()[0].split() == ["model"]


def test_what_is_known_is_not_asked_again(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    """Not even by a copy that was saved and loaded; but where one weight is another, everything is."""
    original, changed, tokenizer = pair
    file = tmp_path / "kept" / "measured.json"
    first = evaluate(changed, tokenizer, suite, original, cache_file=file)
    runs: list[int] = []
    with_hook = copy.deepcopy(changed)
    with_hook.config._name_or_path = "somewhere else"
    with_hook.register_forward_pre_hook(lambda *_: runs.append(1))
    again = evaluate(with_hook, tokenizer, suite, original, cache_file=file)
    assert not runs
    assert again.scores == first.scores and again.original == first.original and again.agreement == first.agreement
    assert again.report() == first.report()
    with torch.no_grad():
        with_hook.model.layers[0].mlp.down_proj.weight[17, 31] += 1.0
    other = evaluate(with_hook, tokenizer, suite, original, cache_file=file)
    assert runs and other.original is not None and other.original.tasks == first.original.tasks
    assert other.scores.text != first.scores.text


def test_what_is_known_of_another_tokenizer_is_asked_again(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    """What texts begin and end with is a part of what was measured."""
    original, _, tokenizer = pair
    file = tmp_path / "measured.json"
    first = evaluate(original, tokenizer, suite, cache_file=file)
    other = copy.deepcopy(tokenizer)
    other.bos_token = other.eos_token
    again = evaluate(original, other, suite, cache_file=file)
    assert again.scores.text["tales"].nll != first.scores.text["tales"].nll
    ends = copy.deepcopy(original)
    ends.generation_config.eos_token_id = first.scores.generated[0].tokens[3]
    assert len(evaluate(ends, tokenizer, suite, cache_file=file).scores.generated[0].tokens) <= 3
    assert evaluate(original, tokenizer, suite, cache_file=file).scores == first.scores


def test_what_is_known_of_full_precision_is_asked_again_under_autocast(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    original, changed, tokenizer = pair
    file = tmp_path / "measured.json"
    asked = replace(suite, problems={}, prompts=[])
    full = evaluate(changed, tokenizer, asked, original, cache_file=file)
    with torch.autocast("cpu", torch.bfloat16):
        half = evaluate(changed, tokenizer, asked, original, cache_file=file)
    assert evaluate(changed, tokenizer, asked, original, cache_file=file).report() == full.report()
    assert half.scores.text != full.scores.text
    assert half.agreement != full.agreement


def test_what_is_known_of_all_blocks_is_asked_again_of_skipped_prompts(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, _, tokenizer = pair
    file, asked = tmp_path / "measured.json", Suite(prompts=suite.prompts, text=suite.text, new_tokens=8, timed=None)
    full = evaluate(original, tokenizer, asked, cache_file=file).scores
    assert not caplog.records
    with PromptSkip(original, range(1, 4), last_tokens=1):
        skipped = evaluate(original, tokenizer, asked, cache_file=file).scores
        assert skipped.generated == evaluate(original, tokenizer, asked).scores.generated != full.generated
    assert "this measurement runs all of them for every token" in caplog.text  # of texts
    with PromptSkip(original, range(1, 4), last_tokens=4):
        assert evaluate(original, tokenizer, asked, cache_file=file).scores.generated == (
            evaluate(original, tokenizer, asked).scores.generated
        )
    assert evaluate(original, tokenizer, asked, cache_file=file).scores.generated == full.generated


class Halves:
    """A tokenizer of one's own, which reads what it was not shown before as another does."""

    def __init__(self, tokenizer: Any, unlike: str = "") -> None:
        self.tokenizer, self.unlike = tokenizer, unlike

    def __getattr__(self, name: str) -> Any:
        if name in ("backend_tokenizer", "get_vocab"):
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text.replace(self.unlike, "X") if self.unlike else text, **options)


@pytest.mark.parametrize(("unlike", "part"), [("girl", "text"), ("big dog", "generated")])
def test_what_another_tokenizer_reads_otherwise_is_asked_again(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path, unlike: str, part: str
) -> None:
    original, _, tokenizer = pair
    file = tmp_path / "measured.json"
    asked, other = replace(suite, tasks=()), Halves(tokenizer, unlike)
    first = evaluate(original, Halves(tokenizer), asked, cache_file=file).scores
    again = evaluate(original, other, asked, cache_file=file).scores
    assert getattr(again, part) == getattr(evaluate(original, other, asked).scores, part) != getattr(first, part)


def test_tasks_have_the_suites_settings(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, tokenizer = pair
    asked = replace(suite, add_bos=False, items=2, metric="acc_norm", shots=1, seed=3, text={}, prompts=())
    settings = TaskSettings(items=2, few_shot=1, metric="acc_norm", add_bos=False, seed=3)
    assert evaluate(original, tokenizer, asked).scores.tasks == run_tasks(original, tokenizer, TASKS, settings)


def test_under_an_open_surgeon_the_reduced_model_is_measured(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    original, changed, tokenizer = pair
    model, file = copy.deepcopy(original), tmp_path / "measured.json"
    whole = evaluate(model, tokenizer, suite, cache_file=file).scores
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(2, 3))
        reduced = evaluate(model, tokenizer, suite, cache_file=file).scores
    committed = evaluate(changed, tokenizer, suite).scores
    assert reduced.tasks == committed.tasks != whole.tasks and reduced.text == committed.text != whole.text
    assert evaluate(model, tokenizer, suite, cache_file=file).scores == whole


def test_another_file_of_the_same_name_is_evaluated_again(pair: tuple[Any, Any, Any], tmp_path: Path) -> None:
    original, _, tokenizer = pair
    path, found = tmp_path / "girls.jsonl", []
    for rows in (ROWS, ROWS[:1] + ROWS[2:], ROWS):
        path.write_text("\n".join(map(json.dumps, rows)))
        suite = Suite(tasks=[str(path)], timed=None)
        found.append(evaluate(original, tokenizer, suite, cache_file=tmp_path / "measured.json").scores)
        assert found[-1].tasks == run_tasks(original, tokenizer, [str(path)])
    assert found[0] == found[2] and len(found[1].tasks["girls"].scores) == 3


def test_an_original_with_fewer_positions_has_the_say_about_the_window(
    pair: tuple[Any, Any, Any], suite: Suite
) -> None:
    original, changed, tokenizer = pair
    few = copy.deepcopy(original)
    few.config.max_position_embeddings = 32
    text = {"tales": suite.text["tales"]}
    found = evaluate(changed, tokenizer, Suite(text=text, timed=None), few)
    assert found.original is not None
    assert found.original.text["tales"] == sliding_perplexity(few, tokenizer, text["tales"], window=32, stride=16)
    with pytest.raises(StreamlineError, match=r"window=48.*32 positions"):
        evaluate(changed, tokenizer, Suite(text=text, window=48, timed=None), few)


def test_it_goes_on_where_it_was_interrupted(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    original, changed, tokenizer = pair
    file, runs = tmp_path / "measured.json", [0]
    model = copy.deepcopy(changed)

    def interrupt(*_: Any) -> None:
        runs[0] += 1
        if runs[0] == 20:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, suite, original, cache_file=file)
    (known,) = json.loads(file.read_text()).values()
    assert 1 <= len(known) < 10
    runs[0] = 100
    found = evaluate(model, tokenizer, suite, original, cache_file=file)
    handle.remove()
    whole = evaluate(model, tokenizer, suite, original)
    assert found.scores.tasks == whole.scores.tasks and found.scores.generated == whole.scores.generated
    assert known.items() <= json.loads(file.read_text())["streamline_hooks_measured"].items()


def test_speed_is_measured_in_turn(pair: tuple[Any, Any, Any]) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, tokenizer, Suite(timed=(9999, 2, 3)), original, name="shorter", reference_name="stories")
    assert found.speed is not None and list(found.speed.timings) == ["stories", "shorter"]
    assert len(found.speed.timings["shorter"].prefill) == 3
    assert found.report()["speed"]["tokens"] == 512 - 2 - 1 and "shorter" in found.table()


def test_several_tries_give_pass_at_k(pair: tuple[Any, Any, Any]) -> None:
    original, _, tokenizer = pair
    tries = {"tries": [Problem(PROMPTS[0], "no")] * 2}
    suite = Suite(problems=tries, problem_tokens=4, samples=3, temperature=1.0, timed=None)
    found = evaluate(original, tokenizer, suite)
    assert [len(tries) for tries in found.scores.problems["tries"].solved] == [3, 3]
    assert found.report()["accuracy"]["tries"]["pass@3"] == 0.0


def test_a_group_without_a_right_answer_is_left_out(pair: tuple[Any, Any, Any]) -> None:
    original, changed, tokenizer = pair
    hard = [Problem("One", "no"), Problem("Two", "nor this")]
    found = evaluate(changed, tokenizer, Suite(problems={"hard": hard}, problem_tokens=2, timed=None), original)
    assert found.retained == {} and "retained" not in found.report()


def test_what_cannot_be_evaluated(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    original, changed, tokenizer = pair
    with pytest.raises(StreamlineError, match=r"agrees with itself.*Keep"):
        evaluate(original, tokenizer, suite, original)
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "other.json").write_text('{"model": "x"}')
    for name in ("bad.json", "other.json"):
        before = (tmp_path / name).read_text()
        with pytest.raises(StreamlineError, match=rf"{name} is not a result cache.*delete"):
            evaluate(original, tokenizer, suite, cache_file=tmp_path / name)
        assert (tmp_path / name).read_text() == before
    with pytest.raises(StreamlineError, match=r"'model'.*Pass another name"):
        evaluate(changed, tokenizer, suite, original, reference_name="model")
    with pytest.raises(StreamlineError, match=r"new_tokens=4096.*512"):
        evaluate(changed, tokenizer, replace(suite, new_tokens=4096), original)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 4096, "stride": None}, r"window=4096.*512 positions"),
        ({"window": None, "stride": 4096}, r"stride=4096.*no more than the window"),
        ({"timed": (16, 600, 2)}, r"601 exceeds the 512 positions"),
        ({"problems": {"told": [Problem("One", "two")]}, "chat": True}, "no chat template"),
    ],
)
def test_what_can_be_told_beforehand_is_told_before_anything_is_run(
    pair: tuple[Any, Any, Any], suite: Suite, change: dict[str, Any], says: str
) -> None:
    original, changed, tokenizer = pair
    runs: list[int] = []
    handle = changed.register_forward_pre_hook(lambda *_: runs.append(1))
    for reference in (None, original):
        with pytest.raises(StreamlineError, match=says):
            evaluate(changed, tokenizer, replace(suite, **change), reference)
    handle.remove()
    assert not runs


def test_another_vocabulary_is_told_before_anything_is_run(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    larger, runs = copy.deepcopy(original), list[int]()
    larger.resize_token_embeddings(520)
    handle = changed.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(StreamlineError, match=r"520 and 512 tokens"):
        evaluate(changed, tokenizer, suite, larger)
    assert not runs
    tasks = evaluate(changed, tokenizer, replace(suite, text={}), larger)
    handle.remove()
    assert tasks.scores.tasks and runs, "of questions there is nothing to compare token by token"


def test_a_compiled_model(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    compiled = torch.compile(changed, backend="eager")
    asked = replace(suite, problems={}, prompts=[], tasks=())
    assert (
        evaluate(compiled, tokenizer, asked, original).scores.text
        == evaluate(changed, tokenizer, asked, original).scores.text
    )
    with pytest.raises(StreamlineError, match="Compile in place"):
        evaluate(compiled, tokenizer, replace(asked, timed=(8, 2, 1)))


def test_a_model_that_says_nan_is_not_scored(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    broken = copy.deepcopy(changed)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(StreamlineError, match="nan"), inference(broken):
        evaluate(broken, tokenizer, suite, original)

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

from streamline_hooks import LayerSurgeon, StreamlineError, agreement, evaluate
from streamline_hooks.evaluation import (
    ChoiceTask,
    Evaluation,
    LastWord,
    Problem,
    ProblemTask,
    Question,
    Scores,
    Solved,
    Suite,
    score_choices,
    score_last_words,
    sliding_perplexity,
    solve,
    write_on,
)
from streamline_hooks.passes import inference

QUERY = "Once upon a time, there was a little girl named"
QUESTIONS = tuple(
    Question((query,) * 3, choices, gold, f"question {gold}")
    for query, choices, gold in (
        (QUERY, ("Lily.", "Table.", "Seventeen."), 0),
        ("Tom and his dog went to the", ("seven", "park.", "because"), 1),
        ("She was very", ("river.", "and", "happy."), 2),
        ("One day, a bird", ("blue", "Lily", "flew"), 2),
    )
)
ENDS = [LastWord("Once upon a", "time"), LastWord("Once upon a time, there was a little", "xylophone")]
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
    (told,) = write_on(original, tokenizer, PROMPTS[:1], new_tokens=8)[0]
    return Suite(
        tokenizer,
        text={"tales": story_texts[:3], "more tales": story_texts[3:5]},
        choices={"girls": ChoiceTask(QUESTIONS), "dogs": ChoiceTask(QUESTIONS[1:], normalised=True)},
        last_words={"ends": ENDS},
        problems={"told": ProblemTask((Problem(PROMPTS[0], told.text), Problem(PROMPTS[1], "no")), new_tokens=8)},
        prompts=PROMPTS,
        window=48,
        stride=16,
        new_tokens=12,
        timed=None,
    )


def test_it_is_what_each_measure_alone_gives(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, suite, original, name="shorter", reference_name="stories")
    assert found.original is not None
    for model, scores in ((changed, found.scores), (original, found.original)):
        for task, choices in suite.choices.items():
            alone_ = score_choices(model, tokenizer, choices.questions)
            assert scores.choices[task].right == alone_.right
            for mine, theirs in zip(scores.choices[task].loglikelihoods, alone_.loglikelihoods, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4)
        assert scores.last_words["ends"].right == score_last_words(model, tokenizer, ENDS).right
        assert scores.problems["told"] == solve(model, tokenizer, suite.problems["told"].problems, new_tokens=8)
        assert list(scores.written) == [text for (text,) in write_on(model, tokenizer, PROMPTS, new_tokens=12)]
        for domain, documents in suite.text.items():
            alone = sliding_perplexity(model, tokenizer, documents, window=48, stride=16)
            assert scores.text[domain].value == pytest.approx(alone.value, rel=1e-6)
            assert (scores.text[domain].tokens, scores.text[domain].bytes) == (alone.tokens, alone.bytes)
        assert scores.parameters == sum(p.numel() for p in model.parameters())
    assert found.original.last_words["ends"].right == (True, False)
    assert found.original.problems["told"].right == (True, False)
    ratios = [found.scores.text[d].value / found.original.text[d].value for d in suite.text]
    assert found.mean_perplexity_ratio == pytest.approx(sum(ratios) / 2)
    assert found.mean_perplexity_ratio is not None and found.mean_perplexity_ratio > 1.01


def test_agreement_is_that_of_the_same_windows(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    """A document that fits one window is one sequence, whose last logits predict nothing that is there."""
    original, changed, tokenizer = pair
    text = suite.text["tales"][0][:100]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    expected = agreement(changed, original, [torch.tensor([ids[:-1]])])
    found = evaluate(changed, Suite(tokenizer, text={"a tale": [text]}, timed=None), original).agreement["a tale"]
    assert found.tokens == expected.tokens == len(ids) - 1
    assert (found.kl, found.top1) == (pytest.approx(expected.kl, rel=1e-5), expected.top1)
    assert found.spread.quantile(0.0) <= found.kl <= found.spread.quantile(1.0) * 1.02


def test_a_copy_retains_everything(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, _ = pair
    found = evaluate(copy.deepcopy(original), suite, original)
    assert found.mean_perplexity_ratio == pytest.approx(1.0)
    assert set(found.retained) == {"classification", "generation"}
    assert all((r.ratio.value, r.ratio.low, r.ratio.high) == (1.0, 1.0, 1.0) for r in found.retained.values())
    assert all(one.value == pytest.approx(1.0) for one in found.stability.values())
    assert found.matched is not None and found.matched.share == 1.0 and found.matched.length == 12
    whole = found.report()["agreement"]
    assert abs(whole["kl"]) < 1e-6 and whole["top1"] == 1.0 and whole["quantiles"]["0.99"] < 1e-6


def test_what_is_retained_is_that_of_the_changed_model(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    """Of one that finds likeliest what its original finds least likely."""
    original, _, _ = pair
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        wrong.model.norm.weight.neg_()
    found = evaluate(wrong, suite, original)
    assert found.original is not None
    tasks, theirs = found.scores.choices, found.original.choices
    means = [statistics.fmean([of["girls"].accuracy, of["dogs"].normalised_accuracy]) for of in (tasks, theirs)]
    assert found.retained["classification"].ratio.value == pytest.approx(means[0] / means[1])
    assert means[0] < means[1]
    assert found.retained["generation"].ratio.value == 0.0
    assert found.stability["girls"].value < 1.0 and found.matched is not None and found.matched.length < 3
    whole = evaluate(copy.deepcopy(original), suite, original)
    more, less = whole.more_than(found), found.more_than(whole)
    assert more["classification"].ratio.value == pytest.approx(1.0 - means[0] / means[1])
    assert (more["generation"].ratio.value, less["generation"].ratio.value) == (1.0, -1.0)


def solved_by_tries(*tries: list[int]) -> Scores:
    return Scores(1, 1, problems={"sums": Solved(tuple(() for _ in tries), tuple(tuple(map(bool, t)) for t in tries))})


def test_all_tries_count_for_what_is_retained() -> None:
    """As they do for the accuracy beside it."""
    problems = tuple(Problem(f"{k} + 1 =", str(k + 1)) for k in range(4))
    asked = Suite(None, problems={"sums": ProblemTask(problems, samples=2, temperature=1.0)}, timed=None)
    theirs = solved_by_tries([1, 1], [1, 1], [1, 1], [1, 1])
    sides = [
        Evaluation(asked, "changed", mine, "original", theirs)
        for mine in (solved_by_tries([1, 0], [1, 0], [1, 0], [1, 0]), solved_by_tries(*[[1, 1]] * 3, [0, 0]))
    ]
    assert [side.retained["generation"].ratio.value for side in sides] == [0.5, 0.75]
    more = sides[1].more_than(sides[0])["generation"]
    assert more.ratio.value == 0.25 and more.above_chance is not None and more.above_chance.value == 0.25


def test_who_always_writes_one_answer_retains_nothing_above_chance() -> None:
    problems = tuple(Problem(f"Row {k}: how many?", "1" if k < 21 else str(k)) for k in range(41))
    asked = Suite(None, problems={"counting": ProblemTask(problems)}, timed=None)

    def scores(right: Iterable[bool]) -> Scores:
        each = [(one,) for one in right]
        return Scores(1, 1, problems={"counting": Solved(tuple(() for _ in each), tuple(each))})

    guesses = scores(p.answer == "1" for p in problems)
    found = Evaluation(asked, "guesses", guesses, "original", scores(k < 36 for k in range(41)))
    kept = found.retained["generation"].above_chance
    assert kept is not None and kept.value == pytest.approx((21 / 41 - 0.5) / (36 / 41 - 0.5))
    assert kept.low < 0 < kept.high
    assert found.report()["accuracy"]["counting"]["chance"] == 0.5


def test_a_model_is_held_against_another_beside_one_original(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, suite, original)
    assert all(one.ratio.value == one.ratio.low == one.ratio.high == 0.0 for one in found.more_than(found).values())
    with pytest.raises(StreamlineError, match=r"give.*`reference`"):
        found.more_than(evaluate(changed, suite))
    few = Suite(tokenizer, choices={"girls": suite.choices["girls"]}, timed=None)
    with pytest.raises(StreamlineError, match=r"'dogs' is of one model only"):
        found.more_than(evaluate(changed, few, original))
    with pytest.raises(StreamlineError, match="Expected one original"):
        found.more_than(evaluate(original, suite, changed))
    nothing = evaluate(changed, Suite(tokenizer, text=suite.text, timed=None), original)
    assert nothing.more_than(nothing) == {}


def test_the_report_is_json_and_says_what_the_scores_say(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, _ = pair
    found = evaluate(changed, suite, original, name="shorter", reference_name="stories")
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert (report["model"], report["reference"]) == ("shorter", "stories")
    assert report["accuracy"]["girls"]["value"] == found.scores.choices["girls"].accuracy
    assert report["accuracy"]["dogs"]["value"] == found.scores.choices["dogs"].normalised_accuracy
    assert report["accuracy"]["dogs"]["metric"] == "accuracy, normalised"
    assert report["accuracy"]["girls"]["chance"] == pytest.approx(1 / 3)
    assert report["original"]["accuracy"]["told"] == {
        "value": 0.5, "standard_error": 0.5, "chance": 0.0, "items": 2, "metric": "exact match",
    }  # fmt: skip
    assert report["samples"][0]["prompt"] == PROMPTS[0]
    assert report["samples"][0]["reference"] == found.original.written[0].text
    assert report["perplexity"]["tales"]["tokens"] == found.scores.text["tales"].tokens
    assert {"girls", "tales", "ends", "told", "prompts"} <= report["seconds"].keys()
    table = found.table()
    assert (
        "perplexity, tales" in table and "dogs (accuracy, normalised)" in table and "retained, classification" in table
    )
    assert f"x {found.scores.text['tales'].value / found.original.text['tales'].value:.2f}" in table


def test_without_an_original(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, tokenizer = pair
    found = evaluate(original, suite)
    assert found.scores.text["tales"] == sliding_perplexity(
        original, tokenizer, suite.text["tales"], window=48, stride=16
    )
    report = found.report()
    assert not report.keys() & {"original", "agreement", "retained", "stability", "speed"}
    assert report["reference"] is None and report["samples"][0]["reference"] is None
    assert found.table().splitlines()[0].split() == ["model"]


def test_what_is_known_is_not_asked_again(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    """Not even by a copy that was saved and loaded; but where one weight is another, everything is."""
    original, changed, _ = pair
    file = tmp_path / "kept" / "measured.json"
    first = evaluate(changed, suite, original, keep_in=file)
    runs: list[int] = []
    with_hook = copy.deepcopy(changed)
    with_hook.config._name_or_path = "somewhere else"
    with_hook.register_forward_pre_hook(lambda *_: runs.append(1))
    again = evaluate(with_hook, suite, original, keep_in=file)
    assert not runs
    assert again.scores == first.scores and again.original == first.original and again.agreement == first.agreement
    assert again.report() == first.report()
    with torch.no_grad():
        with_hook.model.layers[0].mlp.down_proj.weight[17, 31] += 1.0
    other = evaluate(with_hook, suite, original, keep_in=file)
    assert runs and other.original is not None and other.original.choices == first.original.choices
    assert other.scores.text != first.scores.text


def test_what_is_known_of_another_tokenizer_is_asked_again(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    """What texts begin and end with is a part of what was measured."""
    original, _, tokenizer = pair
    file = tmp_path / "measured.json"
    first = evaluate(original, suite, keep_in=file)
    other = copy.deepcopy(tokenizer)
    other.bos_token = other.eos_token
    again = evaluate(original, replace(suite, tokenizer=other), keep_in=file)
    assert again.scores.text["tales"].nll != first.scores.text["tales"].nll
    ends = copy.deepcopy(original)
    ends.generation_config.eos_token_id = first.scores.written[0].tokens[3]
    assert len(evaluate(ends, suite, keep_in=file).scores.written[0].tokens) <= 3
    assert evaluate(original, suite, keep_in=file).scores == first.scores


class Scale(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state * self.by


def test_a_splice_without_weights_is_not_taken_for_another(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    model, file = copy.deepcopy(pair[0]), tmp_path / "measured.json"
    found = []
    for by in (1.0, 0.5, 1.0):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(range(2, 3), Scale(by))
            found.append(evaluate(model, suite, keep_in=file).scores)
            assert evaluate(model, suite).scores.text == found[-1].text
    assert found[0] == found[2] and found[0].text != found[1].text


def test_an_adapter_that_is_off_is_not_taken_for_one_that_is_on(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, file = peft.get_peft_model(copy.deepcopy(pair[0]), config), tmp_path / "measured.json"
    asked = replace(suite, problems={}, prompts=[])
    on = evaluate(model, asked, keep_in=file).scores
    with model.disable_adapter():
        off = evaluate(model, asked, keep_in=file).scores
        assert evaluate(model, asked).scores.text == off.text
    assert evaluate(model, asked, keep_in=file).scores == on
    assert on.text != off.text


def test_what_is_known_of_full_precision_is_asked_again_under_autocast(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path
) -> None:
    original, changed, _ = pair
    file = tmp_path / "measured.json"
    asked = replace(suite, problems={}, prompts=[])
    full = evaluate(changed, asked, original, keep_in=file)
    with torch.autocast("cpu", torch.bfloat16):
        half = evaluate(changed, asked, original, keep_in=file)
    assert evaluate(changed, asked, original, keep_in=file).report() == full.report()
    assert half.scores.text != full.scores.text and half.scores.last_words != full.scores.last_words
    assert half.agreement != full.agreement


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


@pytest.mark.parametrize(
    ("unlike", "part"), [("girl", "text"), ("park", "choices"), ("xylophone", "last_words"), ("big dog", "written")]
)
def test_what_another_tokenizer_reads_otherwise_is_asked_again(
    pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path, unlike: str, part: str
) -> None:
    original, _, tokenizer = pair
    file = tmp_path / "measured.json"
    first = evaluate(original, replace(suite, tokenizer=Halves(tokenizer)), keep_in=file).scores
    asked = replace(suite, tokenizer=Halves(tokenizer, unlike))
    again = evaluate(original, asked, keep_in=file).scores
    assert getattr(again, part) == getattr(evaluate(original, asked).scores, part) != getattr(first, part)


def test_questions_begin_with_bos_where_that_is_asked_for(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, _, tokenizer = pair
    plain, begun = (evaluate(original, replace(suite, add_bos=add)).scores.choices["girls"] for add in (False, True))
    alone = score_choices(original, tokenizer, QUESTIONS, add_bos=True).loglikelihoods
    assert begun.loglikelihoods[0] == pytest.approx(alone[0], rel=1e-4) != plain.loglikelihoods[0]


def test_an_original_with_fewer_positions_has_the_say_about_the_window(
    pair: tuple[Any, Any, Any], suite: Suite
) -> None:
    original, changed, tokenizer = pair
    few = copy.deepcopy(original)
    few.config.max_position_embeddings = 32
    text = {"tales": suite.text["tales"]}
    found = evaluate(changed, Suite(tokenizer, text=text, timed=None), few)
    assert found.original is not None
    assert found.original.text["tales"] == sliding_perplexity(few, tokenizer, text["tales"], window=32, stride=16)
    with pytest.raises(StreamlineError, match=r"window=48.*32 positions"):
        evaluate(changed, Suite(tokenizer, text=text, window=48, timed=None), few)


def test_it_goes_on_where_it_was_interrupted(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    original, changed, _ = pair
    file, runs = tmp_path / "measured.json", [0]
    model = copy.deepcopy(changed)

    def interrupt(*_: Any) -> None:
        runs[0] += 1
        if runs[0] == 20:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, suite, original, keep_in=file)
    (known,) = json.loads(file.read_text()).values()
    assert 1 <= len(known) < 10
    runs[0] = 100
    found = evaluate(model, suite, original, keep_in=file)
    handle.remove()
    whole = evaluate(model, suite, original)
    assert found.scores.choices == whole.scores.choices and found.scores.written == whole.scores.written
    assert known.items() <= json.loads(file.read_text())["streamline_hooks_measured"].items()


def test_speed_is_measured_in_turn(pair: tuple[Any, Any, Any]) -> None:
    original, changed, tokenizer = pair
    found = evaluate(changed, Suite(tokenizer, timed=(9999, 2, 3)), original, name="shorter", reference_name="stories")
    assert found.speed is not None and list(found.speed.timings) == ["stories", "shorter"]
    assert len(found.speed.timings["shorter"].prefill) == 3
    assert found.report()["speed"]["tokens"] == 512 - 2 - 1 and "shorter" in found.table()


def test_several_tries_give_pass_at_k(pair: tuple[Any, Any, Any]) -> None:
    original, _, tokenizer = pair
    task = ProblemTask((Problem(PROMPTS[0], "no"),) * 2, new_tokens=4, samples=3, temperature=1.0)
    found = evaluate(original, Suite(tokenizer, problems={"tries": task}, timed=None))
    assert [len(tries) for tries in found.scores.problems["tries"].solved] == [3, 3]
    assert found.report()["accuracy"]["tries"]["pass@3"] == 0.0


def test_a_group_without_a_right_answer_is_left_out(pair: tuple[Any, Any, Any]) -> None:
    original, changed, tokenizer = pair
    hard = ProblemTask((Problem("One", "no"), Problem("Two", "nor this")), new_tokens=2)
    found = evaluate(changed, Suite(tokenizer, problems={"hard": hard}, timed=None), original)
    assert found.retained == {} and "retained" not in found.report()


def test_what_cannot_be_evaluated(pair: tuple[Any, Any, Any], suite: Suite, tmp_path: Path) -> None:
    original, changed, tokenizer = pair
    with pytest.raises(StreamlineError, match=r"agrees with itself.*Keep"):
        evaluate(original, suite, original)
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "other.json").write_text('{"model": "x"}')
    for name in ("bad.json", "other.json"):
        before = (tmp_path / name).read_text()
        with pytest.raises(StreamlineError, match=rf"{name}.*not a file of results.*delete"):
            evaluate(original, suite, keep_in=tmp_path / name)
        assert (tmp_path / name).read_text() == before
    with pytest.raises(StreamlineError, match=r"'model'.*give"):
        evaluate(changed, suite, original, reference_name="model")
    with pytest.raises(StreamlineError, match=r"0 and 4096 more.*512"):
        evaluate(changed, replace(suite, new_tokens=4096), original)
    with pytest.raises(StreamlineError, match=r"nothing in tales.*give"):
        Suite(tokenizer, text={"tales": []})
    with pytest.raises(StreamlineError, match=r"suite is empty.*give text"):
        Suite(tokenizer, timed=None)
    with pytest.raises(StreamlineError, match=r"named a;.*give"):
        Suite(tokenizer, choices={"a": ChoiceTask(QUESTIONS)}, last_words={"a": ENDS})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 4096, "stride": None}, r"window=4096.*512 positions"),
        ({"window": None, "stride": 4096}, r"stride=4096.*no more than the window"),
        ({"timed": (16, 600, 2)}, r"512 positions.*601"),
        (
            {"problems": {"told": ProblemTask((Problem("One", "two"),), chat=True)}},
            "no chat template",
        ),
    ],
)
def test_what_can_be_told_beforehand_is_told_before_anything_is_run(
    pair: tuple[Any, Any, Any], suite: Suite, change: dict[str, Any], says: str
) -> None:
    original, changed, _ = pair
    runs: list[int] = []
    handle = changed.register_forward_pre_hook(lambda *_: runs.append(1))
    for reference in (None, original):
        with pytest.raises(StreamlineError, match=says):
            evaluate(changed, replace(suite, **change), reference)
    handle.remove()
    assert not runs


def test_another_vocabulary_is_told_before_anything_is_run(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, _ = pair
    larger, runs = copy.deepcopy(original), list[int]()
    larger.resize_token_embeddings(520)
    handle = changed.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(StreamlineError, match=r"520 and.*512 tokens"):
        evaluate(changed, suite, larger)
    assert not runs
    questions = evaluate(changed, replace(suite, text={}), larger)
    handle.remove()
    assert questions.scores.choices and runs, "of questions there is nothing to compare token by token"


def test_a_compiled_model(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, _ = pair
    compiled = torch.compile(changed, backend="eager")
    asked = replace(suite, problems={}, prompts=[], last_words={}, choices={})
    assert evaluate(compiled, asked, original).scores.text == evaluate(changed, asked, original).scores.text
    with pytest.raises(StreamlineError, match="Compile in place"):
        evaluate(compiled, replace(asked, timed=(8, 2, 1)))


def test_a_model_that_says_nan_is_not_scored(pair: tuple[Any, Any, Any], suite: Suite) -> None:
    original, changed, _ = pair
    broken = copy.deepcopy(changed)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(StreamlineError, match="nan"), inference(broken):
        evaluate(broken, suite, original)

"""Answers that are right whatever they are written like, and wrong where they are wrong."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.problems import Problem, Solved, chance_of_guessing, number_in, read_problems, solve


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("18", " She makes 9 * 2 = $18 every day.", True),
        ("18", "18", True),
        ("18", " 18.0 apples", True),
        ("18", " She has 18 and gives away 3", False),  # the last number counts
        ("18", " none", False),
        ("18", "", False),
        ("-3", "it is -3.", True),
        ("3", "it is -3.", False),
        ("1,250.50", "$1250.5", True),
        ("0.5", "about .5", True),
        ("70000", "He made $70,000.", True),
        ("9", "so 18-9", True),  # a dash behind a number is no sign
        ("3", "1,2,3", True),  # commas are parts of a number before three digits only
        ("-5", "it costs \u22125", True),
        ("5", "it costs \u22125", False),
    ],
)
def test_numbers(answer: str, text: str, right: bool) -> None:
    assert Problem("", answer, "number").solved_by(text) is right


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("] )", " ] )\nOpen:", True),
        ("] )", "\n ] ) \n", True),
        ("] )", " ] ) )", False),
        ("] )", "", False),
        ("4", " 4 and so on", False),
    ],
)
def test_lines(answer: str, text: str, right: bool) -> None:
    assert Problem("", answer).solved_by(text) is right


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_read_as_it_was_written(number: int) -> None:
    assert number_in(f"first 7, then {number:,}.") == number
    assert number_in(f"${number}" if number >= 0 else f"-${-number}") == number


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_tries(tries: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(tries)))
    chosen = [any(some) for some in itertools.combinations(tries, k)]
    solved = Solved(((),), (tuple(tries),))
    assert solved.pass_at(k) == pytest.approx(statistics.fmean(chosen))
    assert solved.accuracy == pytest.approx(statistics.fmean(tries))


@given(st.lists(st.sampled_from(["1", "2", "3.0", "3"]), min_size=2, max_size=8))
def test_what_is_guessed_is_the_commonest_of_the_other_answers(answers: list[str]) -> None:
    for match, alike in (("number", [float(a) for a in answers]), ("line", answers)):
        best = max(
            statistics.fmean(one == said for k, one in enumerate(alike) if k != its) for its, said in enumerate(alike)
        )
        assert chance_of_guessing([Problem("", a, match) for a in answers]) == pytest.approx(best)  # type: ignore[arg-type]


def test_nothing_is_guessed_of_one_problem_and_none_is_refused() -> None:
    assert chance_of_guessing([Problem("", "7")]) == 0.0
    with pytest.raises(StreamlineError, match="no problem whose answer"):
        chance_of_guessing([])


def test_more_tries_than_there_are() -> None:
    solved = Solved(((), ()), ((True,), (False,)))
    assert solved.accuracy == 0.5 and solved.right == (True, False)
    assert solved.standard_error == pytest.approx(statistics.stdev([1.0, 0.0]) / math.sqrt(2))
    with pytest.raises(StreamlineError, match=r"pass@2.*2 tries.*1"):
        solved.pass_at(2)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reading_and_shots(tmp_path: Path) -> None:
    path = written(
        tmp_path / "problems.jsonl",
        {"question": "2 + 2?", "answer": "2 and 2 make 4.\n#### 4"},
        {"context": "3 + 3?", "chain_of_thought": "Twice 3.", "answer": "6"},
        {"question": "How many?", "answer": 7},
    )
    first, second, third = read_problems(path)
    assert (first.prompt, first.answer) == ("Question: 2 + 2?\nAnswer:", "4")
    assert (second.answer, third.answer, third.match) == ("6", "7", "number")
    (asked,) = read_problems(path, shots=2)
    assert asked.prompt == (
        "Question: 2 + 2?\nAnswer: 2 and 2 make 4. The answer is 4.\n\n"
        "Question: 3 + 3?\nAnswer: Twice 3. The answer is 6.\n\nQuestion: How many?\nAnswer:"
    )
    assert "row 2" in asked.where


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?"}, r'row 0.*keys question.*expected {"context" or "question", "answer"}'),
        ({"question": "?", "answer": "many"}, r"row 0.*'many'.*no number"),
    ],
)
def test_what_is_no_problem(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(StreamlineError, match=says.replace("{", r"\{")):
        read_problems(written(tmp_path / "problems.jsonl", row))


def test_shots_that_leave_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", {"question": "?", "answer": "1"})
    with pytest.raises(StreamlineError, match=r"shots=1.*1 problems"):
        read_problems(path, shots=1)


def test_real_problems(data_folder: Path) -> None:
    """Every answer of GSM8K is its own solution, and none is that of the next."""
    problems = read_problems(data_folder / "bench" / "gsm8k.jsonl")
    assert len(problems) == 1319
    assert all(problem.solved_by(f" So it is {problem.answer}.") for problem in problems)
    others = itertools.pairwise(problems)
    assert not any(a.solved_by(b.answer) for a, b in others if number_in(a.answer) != number_in(b.answer))


def test_a_model_is_right_where_it_writes_the_answer(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    prompts = ["Once upon a time, there was a little girl named Lily. She", "One day, a big dog"]
    free = solve(model, tokenizer, [Problem(p, "?") for p in prompts], new_tokens=12, stop=["\n"])
    assert free.right == (False, False)
    known = [Problem(p, text.text) for p, (text,) in zip(prompts, free.written, strict=True)]
    known[1] = Problem(prompts[1], known[1].answer + "!")
    found = solve(model, tokenizer, known, new_tokens=12, stop=["\n"])
    assert found.right == (True, False)
    assert str(found).startswith("50.0% ± 50.0% of 2 problems solved")
    with pytest.raises(StreamlineError, match="no problem to solve"):
        solve(model, tokenizer, [])

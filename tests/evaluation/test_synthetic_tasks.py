"""Answers of problems however they are written, pass@k, files of problems, and synthetic ones solved in another way."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.probe_levels import LEVELS, probes_at
from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import GeneratedText, ResultCache
from streamline_hooks.evaluation.synthetic_tasks import (
    PROBLEM_MAKERS,
    Problem,
    ProblemResults,
    TextGenerationConfig,
    guessing_accuracy,
    last_number,
    read_problems,
    solve_problems,
    synthetic_problems,
)


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
    assert last_number(f"first 7, then {number:,}.") == number
    assert last_number(f"The answer is {number}".replace("-", "\u2013")) == number
    assert last_number(f"Between 3\u2013{abs(number)}") == abs(number)
    assert last_number(f"${number}" if number >= 0 else f"-${-number}") == number


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_tries(tries: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(tries)))
    chosen = [any(some) for some in itertools.combinations(tries, k)]
    solved = ProblemResults(((),), (tuple(tries),))
    assert solved.pass_at(k) == pytest.approx(statistics.fmean(chosen))
    assert solved.accuracy == pytest.approx(statistics.fmean(tries))


@given(st.lists(st.sampled_from(["1", "2", "3.0", "3"]), min_size=2, max_size=8))
def test_what_is_guessed_is_the_commonest_of_the_other_answers(answers: list[str]) -> None:
    for match, alike in (("number", [float(a) for a in answers]), ("line", answers)):
        best = max(
            statistics.fmean(one == said for k, one in enumerate(alike) if k != its) for its, said in enumerate(alike)
        )
        assert guessing_accuracy([Problem("", a, match) for a in answers]) == pytest.approx(best)  # type: ignore[arg-type]


def test_nothing_is_guessed_of_one_problem_and_none_is_refused() -> None:
    assert guessing_accuracy([Problem("", "7")]) == 0.0
    with pytest.raises(StreamlineError, match="guessing_accuracy: problems is empty"):
        guessing_accuracy([])


def test_more_tries_than_there_are() -> None:
    solved = ProblemResults(((), ()), ((True,), (False,)))
    assert solved.accuracy == 0.5 and solved.correct == (True, False)
    assert solved.standard_error == pytest.approx(statistics.stdev([1.0, 0.0]) / math.sqrt(2))
    with pytest.raises(StreamlineError, match=r"pass@2.*2 attempts.*there are 1"):
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
        ({"question": "?"}, r'row 0.*keys question.*Expected {"context" or "question", "answer"}'),
        *(
            ({"question": "?", "answer": answer}, rf"row 0.*'{answer}', which is not one number")
            for answer in ("many", "1/2", "3:30", "1e5", "3 or 4")
        ),
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
    assert not any(a.solved_by(b.answer) for a, b in others if last_number(a.answer) != last_number(b.answer))


def test_a_model_is_right_where_it_writes_the_answer(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    prompts = ["Once upon a time, there was a little girl named Lily. She", "One day, a big dog"]
    free = solve_problems(
        model, tokenizer, [Problem(p, "?") for p in prompts], TextGenerationConfig(new_tokens=12, stop=["\n"])
    )
    assert free.correct == (False, False)
    known = [Problem(p, text.text) for p, (text,) in zip(prompts, free.texts, strict=True)]
    known[1] = Problem(prompts[1], known[1].answer + "!")
    found = solve_problems(model, tokenizer, known, TextGenerationConfig(new_tokens=12, stop=["\n"]))
    assert found.correct == (True, False)
    assert str(found).startswith("50.0% ± 50.0% of 2 problems solved")
    with pytest.raises(StreamlineError, match="solve_problems: problems is empty"):
        solve_problems(model, tokenizer, [])


def worked_out(name: str, question: str) -> str:
    if name == "arithmetic":
        return str(eval(question.removesuffix("=")))
    if question.startswith("Count: "):
        numbers = list(map(int, question.removeprefix("Count: ").removesuffix(" Next:").split()))
        (step,) = {b - a for a, b in itertools.pairwise(numbers)}
        return str(numbers[-1] + step)
    if name == "brackets":
        text = question.removeprefix("Open: ").removesuffix(" Close:").replace(" ", "")
        while any(pair in text for pair in ("()", "[]", "{}")):
            text = text.replace("()", "").replace("[]", "").replace("{}", "")
        return " ".join(text[::-1].translate(str.maketrans("([{", ")]}")))
    if name == "copying":
        return question.removeprefix("Say: ").removesuffix(" Again:")
    row, word = question.removeprefix("Row: ").removesuffix(":").split(" How many ")
    return str(row.split().count(word))


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 6))
def test_answers_are_right_and_no_problem_comes_twice(seed: int, shots: int, difficulty: int) -> None:
    for name, problems in probes_at(6, difficulty, seed=seed, shots=shots).items():
        lines = problems[0].prompt.split("\n")
        questions = [*lines[:-1], *(problem.prompt.split("\n")[-1] for problem in problems)]
        assert len(lines) == shots + 1
        asked = {
            line if k >= shots else line[: len(line) - len(worked(name, line)) - 1] for k, line in enumerate(questions)
        }
        assert len(asked) == shots + 6
        for problem in problems:
            assert problem.prompt.startswith("".join(f"{line}\n" for line in lines[:-1]))
            assert problem.answer == worked_out(name, problem.prompt.split("\n")[-1])
            assert problem.solved_by(f" {problem.answer}\nmore") and not problem.solved_by(f" {problem.answer}1\n")


def worked(name: str, line: str) -> str:
    """The answer at the end of a solved line."""
    mark = {"arithmetic": "= ", "brackets": "Close: ", "copying": "Again: ", "counting": ": "}[name]
    mark = "Next: " if line.startswith("Count: ") else mark
    question, answer = line.rsplit(mark, 1)
    assert worked_out(name, question + mark.rstrip()) == answer
    return answer


def test_a_smaller_count_is_a_part_of_a_larger() -> None:
    few, many = synthetic_problems(3, seed=7), synthetic_problems(9, seed=7)
    assert all(many[name][:3] == few[name] for name in few)
    assert synthetic_problems(3, seed=8) != few


def test_what_cannot_be_made() -> None:
    with pytest.raises(StreamlineError, match=r"count=0.*at least 1"):
        synthetic_problems(0)
    with pytest.raises(StreamlineError, match="1000004 different"):
        synthetic_problems(1_000_000)


def test_the_usual_problems_are_those_that_were_scored_before() -> None:
    """What was kept of older evaluations is of these."""
    found = [digest(synthetic_problems(50)), digest(synthetic_problems(7, seed=3, shots=1))]
    assert found == ["06401413707659fa", "1fa77a046ef1a495"]
    assert probes_at(9, 4, seed=0, shots=4) == probes_at(9, {}, seed=0, shots=4) == synthetic_problems(9)


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def test_a_level_of_one_sort_leaves_the_others_as_they_are() -> None:
    given = {"seed": 0, "shots": 4}
    usual, mixed = synthetic_problems(5), probes_at(5, {"copying": 1, "arithmetic": 5}, **given)
    assert mixed["copying"] == probes_at(5, 1, **given)["copying"]
    assert mixed["arithmetic"] == probes_at(5, 5, **given)["arithmetic"]
    assert mixed["brackets"] == usual["brackets"] and mixed["counting"] == usual["counting"]


@pytest.mark.parametrize("level", range(1, 7))
def test_each_level_is_what_it_says(level: int) -> None:
    """Of 100 problems, which each level has whatever the seed."""
    found = probes_at(100, level, seed=level, shots=4)
    asked = {name: [problem.prompt.split("\n")[-1] for problem in several] for name, several in found.items()}
    numbers = [sorted(map(int, q.removesuffix(" =").replace("-", "+").split("+"))) for q in asked["arithmetic"]]
    least, below = {1: (1, 16), 2: (1, 20), 3: (1, 50), 4: (2, 100), 5: (100, 1_000), 6: (1_000, 10_000)}[level]
    assert least <= min(a for a, _ in numbers) and below * 0.9 < max(b for _, b in numbers) < below
    assert any("-" in q for q in asked["arithmetic"]) == (level >= 4)
    brackets = [q.split()[1:-1] for q in asked["brackets"]]
    fewest, most, kinds = {1: (3, 5, 2), 2: (2, 5, 3), 3: (4, 7, 3), 4: (4, 10, 3), 5: (8, 14, 3), 6: (12, 20, 3)}[
        level
    ]
    lengths = {len(text) for text in brackets}
    assert max(lengths) in (most, most + 1) and min(lengths) >= fewest  # one more where all were closed
    assert len({one for text in brackets for one in text}) == 2 * kinds
    words = {len(q.split()) - 2 for q in asked["copying"]}
    least, most = {1: (2, 2), 2: (2, 3), 3: (3, 5), 4: (3, 7), 5: (6, 8), 6: (9, 12)}[level]
    assert words == set(range(least, most + 1))
    if level <= 2:
        rows = [list(map(int, q.split()[1:-1])) for q in asked["counting"]]
        assert {row[1] - row[0] for row in rows} == ({1} if level == 1 else {1, 2, 5, 10})
    else:
        times = {int(problem.answer) for problem in found["counting"]}
        assert times == set(range(1, {3: 2, 4: 5, 5: 7, 6: 9}[level] + 1))


def test_every_sort_has_the_same_levels() -> None:
    assert {tuple(levels) for levels in LEVELS.values()} == {(1, 2, 3, 4, 5, 6)} and list(LEVELS) == list(
        PROBLEM_MAKERS
    )


def test_results_of_a_cache_with_the_earlier_field_are_read(tmp_path: Path) -> None:
    results = ProblemResults(((GeneratedText("?", "1", (3,), True),),), ((True,),))
    file = tmp_path / "cache.json"
    ResultCache(file).get(ProblemResults, ["a model"], lambda: results)
    file.write_text(file.read_text().replace('"texts"', '"written"'))
    assert '"written"' in file.read_text()
    assert ResultCache(file).get(ProblemResults, ["a model"], lambda: pytest.fail("measured again"))[0] == results

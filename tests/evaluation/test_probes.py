"""Made-up problems whose answers are worked out here in another way."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.probe_levels import LEVELS, probes_at
from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.probes import SORTS, probes


def worked_out(name: str, question: str) -> str:
    if name == "arithmetic":
        return str(eval(question.removesuffix("=")))
    if question.startswith("Count: "):
        numbers = list(map(int, question.removeprefix("Count: ").removesuffix(" Next:").split()))
        (step,) = {b - a for a, b in pairwise(numbers)}
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
    few, many = probes(3, seed=7), probes(9, seed=7)
    assert all(many[name][:3] == few[name] for name in few)
    assert probes(3, seed=8) != few


def test_what_cannot_be_made() -> None:
    with pytest.raises(StreamlineError, match=r"count=0.*at least 1"):
        probes(0)
    with pytest.raises(StreamlineError, match="1000004 different"):
        probes(1_000_000)


def test_the_usual_problems_are_those_that_were_scored_before() -> None:
    """What was kept of older evaluations is of these."""
    found = [digest(probes(50)), digest(probes(7, seed=3, shots=1))]
    assert found == ["06401413707659fa", "1fa77a046ef1a495"]
    assert probes_at(9, 4, seed=0, shots=4) == probes_at(9, {}, seed=0, shots=4) == probes(9)


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def test_a_level_of_one_sort_leaves_the_others_as_they_are() -> None:
    given = {"seed": 0, "shots": 4}
    usual, mixed = probes(5), probes_at(5, {"copying": 1, "arithmetic": 5}, **given)
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
    assert {tuple(levels) for levels in LEVELS.values()} == {(1, 2, 3, 4, 5, 6)} and list(LEVELS) == list(SORTS)

"""Made-up problems whose answers are worked out here in another way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.probes import probes


def worked_out(name: str, question: str) -> str:
    if name == "arithmetic":
        return str(eval(question.removesuffix("=")))
    if name == "brackets":
        text = question.removeprefix("Open: ").removesuffix(" Close:").replace(" ", "")
        while any(pair in text for pair in ("()", "[]", "{}")):
            text = text.replace("()", "").replace("[]", "").replace("{}", "")
        return " ".join(text[::-1].translate(str.maketrans("([{", ")]}")))
    if name == "copying":
        return question.removeprefix("Say: ").removesuffix(" Again:")
    row, word = question.removeprefix("Row: ").removesuffix(":").split(" How many ")
    return str(row.split().count(word))


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_answers_are_right_and_no_problem_comes_twice(seed: int, shots: int) -> None:
    for name, problems in probes(6, seed=seed, shots=shots).items():
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
    question, answer = line.rsplit(mark, 1)
    assert worked_out(name, question + mark.rstrip()) == answer
    return answer


def test_a_smaller_count_is_a_part_of_a_larger() -> None:
    few, many = probes(3, seed=7), probes(9, seed=7)
    assert all(many[name][:3] == few[name] for name in few)
    assert probes(3, seed=8) != few


def test_what_cannot_be_made() -> None:
    with pytest.raises(StreamlineError, match="Got count=0, shots=4; expected a count of 1 or more"):
        probes(0)
    with pytest.raises(StreamlineError, match="There are not 1000004 different problems of the sort"):
        probes(1_000_000)

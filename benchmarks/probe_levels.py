"""Synthetic problems at six levels of difficulty, for models that solve all or none of the library's problems."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from streamline_hooks.evaluation import Problem, ProblemMaker, arithmetic, brackets, copying, counting, make_problems


def probes_at(count: int, difficulty: int | Mapping[str, int], *, seed: int, shots: int) -> dict[str, list[Problem]]:
    """Return `probes` of one of the `LEVELS`, or of one level per kind; level 4 is that of the library."""
    levels = difficulty if isinstance(difficulty, Mapping) else dict.fromkeys(LEVELS, difficulty)
    return {
        name: make_problems(name, several[levels.get(name, 4)], count, seed, shots) for name, several in LEVELS.items()
    }


def _sum(below: int) -> ProblemMaker:
    def make(random: Random) -> tuple[str, str]:
        a, b = random.randrange(1, below), random.randrange(1, below)
        return f"{a} + {b} =", str(a + b)

    return make


def _next(*steps: int) -> ProblemMaker:
    def make(random: Random) -> tuple[str, str]:
        first, step = random.randrange(1, 300), random.choice(steps)
        return f"Count: {' '.join(str(first + step * k) for k in range(4))} Next:", str(first + step * 4)

    return make


LEVELS: dict[str, dict[int, ProblemMaker]] = {
    "arithmetic": {
        1: _sum(16),
        2: _sum(20),
        3: _sum(50),
        4: arithmetic(2, 100),
        5: arithmetic(100, 1_000),
        6: arithmetic(1_000, 10_000),
    },
    "brackets": {
        1: brackets(3, 5, kinds=2),
        2: brackets(2, 5, kinds=3),
        3: brackets(4, 7, kinds=3),
        4: brackets(4, 10, kinds=3),
        5: brackets(8, 14, kinds=3),
        6: brackets(12, 20, kinds=3),
    },
    "copying": {
        1: copying(2, 2),
        2: copying(2, 3),
        3: copying(3, 5),
        4: copying(3, 7),
        5: copying(6, 8),
        6: copying(9, 12),
    },
    "counting": {
        1: _next(1),
        2: _next(1, 2, 5, 10),
        3: counting(2, others=2),
        4: counting(5, others=4),
        5: counting(7, others=5),
        6: counting(9, others=6),
    },
}
"""Problem makers by kind and level, from easy to hard.

- arithmetic: sums of two numbers below 16, 20 and 50, then sums and differences of numbers with up to two, three and
  four digits
- brackets: up to 5 brackets of two kinds and of three kinds, then up to 7, 10, 14 and 20
- copying: 2 words, then up to 3, 5, 7, 8 and 12
- counting: the next number in steps of 1, and of 1, 2, 5 or 10, then a word that occurs up to 2, 5, 7 and 9 times
  among others
"""

"""What is common to all benchmarks that let SmolLM2 write: precision, problems, and how long an answer may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.probe_levels import probes_at
from streamline_hooks.evaluation.problems import Problem

SHOTS, BEHIND = 4, 5  # solved problems in a set, and problems behind each
_SPARE = 3  # tokens: a line's end, and what shows that an answer is too long


def problems_of(count: int, seed: int, difficulty: int | Mapping[str, int]) -> dict[str, list[Problem]]:
    """Problems of each sort, five behind each set of solved ones; the sets take turns, see `sets_of`.

    Which ones are shown matters much: with one set for all, SmolLM2 solved 54 of 100 rows to copy, and 34 with another.
    """
    many = sets_of(count)
    sets = [probes_at(BEHIND, difficulty, seed=1000 * seed + k, shots=SHOTS) for k in range(many)]
    return {
        sort: [problem for turn in zip(*(one[sort] for one in sets), strict=True) for problem in turn][:count]
        for sort in sets[0]
    }


def sets_of(count: int) -> int:
    """Sets of solved problems that so many stand behind: the k-th behind the (k mod sets)-th."""
    return -(-count // BEHIND)


def same_answer(problems: Sequence[Problem]) -> float:
    """What always writing the commonest answer would reach."""
    return Counter(problem.answer for problem in problems).most_common(1)[0][1] / len(problems)


def guessed(asked: Sequence[Problem], problems: Sequence[Problem], tries: int) -> float:
    """What drawing answers, each as often as it is one of the other problems', would reach in so many tries."""
    common = Counter(problem.answer for problem in problems)
    wrong = [(1.0 - (common[problem.answer] - 1) / (len(problems) - 1)) ** tries for problem in asked]
    return 1.0 - sum(wrong) / len(wrong)


def room(tokenizer: Any, problems: Sequence[Problem]) -> int:
    """New tokens in which the longest of the answers has room, and is seen not to go on."""
    answers = [f" {problem.answer}" for problem in problems]
    return max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"])) + _SPARE


def products() -> str:
    """The precision of matrix products that this machine is fast in: bfloat16 where it has them, else float32."""
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Matrix products as the machine has them fast, see `products`, but for those of the LM head.

    Its logits would be too coarse in bfloat16 to tell words apart. The same for an original and for what is made from
    it. A weight is converted once.
    """
    if products() == "float32":
        yield
        return
    head = model.get_output_embeddings()  # type: ignore[operator]
    around: list[bool] = []  # whether it was on: who asks for full precision in between goes on with it

    def enter(*_: Any) -> None:
        around.append(torch.is_autocast_enabled("cpu"))
        torch.set_autocast_enabled("cpu", False)

    def leave(*_: Any) -> None:
        torch.set_autocast_enabled("cpu", around.pop())

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True)]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        for handle in handles:
            handle.remove()

"""Shared by the benchmarks of generation: precision, problems, and the length of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.probe_levels import probes_at
from streamline_hooks.evaluation import Problem

SHOTS, BEHIND = 4, 5  # few-shot examples in a set, and problems per set
_SPARE = 3  # tokens: the end of the line, and tokens by which a longer answer is detected


def problems_of(
    count: int, seed: int, difficulty: int | Mapping[str, int], shots: int = SHOTS
) -> dict[str, list[Problem]]:
    """Return problems of each kind, five per set of few-shot examples; the sets alternate, see `sets_of`.

    The examples matter much: with one set for all problems SmolLM2 solved 54 of 100 rows to copy, with another 34.
    """
    count_of_sets = sets_of(count)
    sets = [probes_at(BEHIND, difficulty, seed=1000 * seed + k, shots=shots) for k in range(count_of_sets)]
    return {
        sort: [problem for turn in zip(*(problem_set[sort] for problem_set in sets), strict=True) for problem in turn][
            :count
        ]
        for sort in sets[0]
    }


def sets_of(count: int) -> int:
    """Return the number of example sets for a number of problems; problem k has set k mod sets."""
    return -(-count // BEHIND)


def guessed(subset: Sequence[Problem], problems: Sequence[Problem], tries: int) -> float:
    """Return the accuracy of guessing in several tries by the frequency of the answers of the other problems."""
    common = Counter(problem.answer for problem in problems)
    wrong = [(1.0 - (common[problem.answer] - 1) / (len(problems) - 1)) ** tries for problem in subset]
    return 1.0 - sum(wrong) / len(wrong)


def answer_tokens(tokenizer: Any, problems: Sequence[Problem]) -> int:
    """Return the number of new tokens for the longest answer, plus a few to detect longer ones."""
    answers = [f" {problem.answer}" for problem in problems]
    return max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"])) + _SPARE


def products() -> str:
    """Return the precision of matrix products: bfloat16 if the CPU supports it, otherwise float32."""
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Run matrix products in the precision of `products`, except those of the LM head.

    Logits in bfloat16 would be too coarse to distinguish words. Autocast converts each weight once.
    """
    if products() == "float32":
        yield
        return
    head = model.get_output_embeddings()  # type: ignore[operator]
    around: list[bool] = []  # whether autocast was on, to restore it after the LM head

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

"""Tokenizers of texts that are numbers, and multiple choice made of such texts."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from torch import nn

from streamline_hooks.evaluation import run_tasks, task_config_from_rows
from tests.tiny_models import VOCABULARY


class Numbers:
    """A tokenizer that is none of Transformers."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def number_tokenizer(bos: str = "1") -> Any:
    """The same as one of Transformers, which lm-eval needs."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({str(k): k for k in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="2", pad_token="2", unk_token="0"
    )


def numbers(random: Random, count: int) -> str:
    return " ".join(str(random.randrange(3, VOCABULARY)) for _ in range(count))


def rows_of(model: nn.Module, count: int, choices: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose right answers are those that a model gives."""
    random = Random(seed)
    rows = [
        {"query": numbers(random, 8), "choices": [numbers(random, 3) for _ in range(choices)], "gold": 0}
        for _ in range(count)
    ]
    found = run_tasks(model, number_tokenizer(), [task_config_from_rows(rows, "numbers")])["numbers"].loglikelihoods
    return [row | {"gold": int(np.argmax(nats))} for row, nats in zip(rows, found, strict=True)]

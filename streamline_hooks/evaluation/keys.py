"""What the answers of a model depend on, as the file of what was measured knows them by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from streamline_hooks.digests import autocast_dtype, model_digest, texts_digest, tokenizer_digest, tokens_digest
from streamline_hooks.evaluation.last_words import LastWord
from streamline_hooks.evaluation.problems import Problem
from streamline_hooks.evaluation.questions import Question, joined
from streamline_hooks.evaluation.writing import prompt_tokens
from streamline_hooks.generation import end_tokens


class Keys:
    """Digests of models, and of what they are asked, as one tokenizer reads it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._rules = tokenizer_digest(tokenizer)
        self._models: dict[int, str] = {}

    def model(self, model: nn.Module) -> str:
        """Of a model with the tokenizer, of where its texts end, and of the precision of its products."""
        if id(model) not in self._models:
            ends = sorted(end_tokens(model, self.tokenizer)) if hasattr(model, "generation_config") else []
            self._models[id(model)] = texts_digest(
                [model_digest(model), self._rules, repr(ends), autocast_dtype(model)]
            )
        return self._models[id(model)]

    def read(self, asked: Sequence[Question | LastWord | str]) -> str:
        """Of questions, texts whose end is asked for, or documents, and of their tokens."""
        texts = [text for one in asked for text in ([one] if isinstance(one, str) else texts_of(one))]
        return texts_digest([*map(repr, asked), tokens_digest(self.tokenizer, texts)])

    def written_on(self, asked: Sequence[Problem | str], chat: bool = False) -> str:
        """Of problems, or prompts, and of their tokens."""
        prompts = [one if isinstance(one, str) else one.prompt for one in asked]
        return texts_digest([*map(repr, asked), *(repr(prompt_tokens(self.tokenizer, p, chat)) for p in prompts)])


def texts_of(one: Question | LastWord) -> Iterable[str]:
    """The contexts of a question, or of a text whose end is asked for, and what each is with a continuation."""
    if isinstance(one, LastWord):
        return one.context, joined(one.context, one.continuation)
    return *one.contexts, *map(joined, one.contexts, one.continuations)

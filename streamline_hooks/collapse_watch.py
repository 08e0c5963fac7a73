"""Compare problem solving and generation before and after surgery, and warn of a collapse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from streamline_hooks.batch import Batch, positions_of
from streamline_hooks.evaluation.collapse import collapse_of_probes, collapse_of_writing, fewest_solved, fewest_texts
from streamline_hooks.evaluation.probes import STOP, probes
from streamline_hooks.evaluation.problems import solve
from streamline_hooks.evaluation.reasoning import reasoning_in_words, sign_in_writing, sign_of_reasoning
from streamline_hooks.evaluation.writing import Written, write_on
from streamline_hooks.side_by_side import text_beginnings

_PROBES, _SHOTS, _ANSWER_TOKENS = 8, 3, 24  # of each sort
_TEXTS, _PROMPT_TOKENS, _TEXT_TOKENS = 8, 24, 48
_OPENING_TOKENS, _THOUGHT_TOKENS = 8, 256
_THINK_ABOUT = (
    "A farmer has 17 sheep. All but 9 run away, and then he buys 4 more. How many sheep does he have?",
    "A train leaves at 9:40 and arrives at 13:05. It stands still for 25 minutes on its way. How long does it move?",
    "Three friends share 84 marbles. Ann gets twice as many as Ben, and Ben twice as many as Cem. What does Ben get?",
)


class CollapseWatch:
    """Compare generation before and after surgery, and warn where it has collapsed.

    The original solves 32 small generated problems (see `probes`), continues 8 texts, and, if it is a reasoning model,
    answers 3 questions in at most 256 tokens. The compressed model repeats only tasks in which the original has
    something to lose. Tasks that fail on the original are skipped, and `say` is told why.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batches: Sequence[Batch | Tensor], say: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.say = tokenizer, say
        self._failures: list[str] = []
        self._half = (positions_of(model.config) or 10**9) // 2
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        length = min(_PROMPT_TOKENS, self._half)
        self._beginnings = text_beginnings(tokenizer, batches, count=_TEXTS, length=length)
        if 0 < len(self._beginnings) < fewest_texts():
            say(
                f"There is text for {len(self._beginnings)} beginnings alone: whether the compressed model repeats "
                f"itself is not told, which takes {fewest_texts()}. Give more test_tokens."
            )
        self._probes = probes(_PROBES, shots=_SHOTS)
        self._solved = self._solve(model, "original")
        self._solves = sum(map(sum, self._solved.values()))
        asked = sum(map(len, self._solved.values()))
        if asked and self._solves < fewest_solved(len(self._probes)):
            say(
                f"The original solves {self._solves} of {asked} small problems: whether the compressed model has lost "
                f"them is not told, which takes {fewest_solved(len(self._probes))}."
            )
        self._written = self._write(model, "original")
        self._sign = sign_of_reasoning(tokenizer) or self._opening(model)
        self._thoughts = self._think(model, "original") if self._sign else []

    def warnings(self, model: Any) -> list[str]:
        """Return the warnings on a compressed model; empty if nothing has collapsed."""
        said = []
        self._failures.clear()
        if self._solves >= fewest_solved(len(self._probes)) and (now := self._solve(model, "compressed")):
            said.append(collapse_of_probes(self._solved, now))
        if self._written and (texts := self._write(model, "compressed")):
            said.append(collapse_of_writing(self._written, texts))
        if self._sign:
            thoughts = self._think(model, "compressed") if self._thoughts else []
            said.append(reasoning_in_words(self._sign, self._thoughts, thoughts, min(_THOUGHT_TOKENS, self._half)))
        if self._failures:
            said.append(f"The compressed model cannot write as the original does: {self._failures[0]}")
        return [text for text in said if text]

    def _solve(self, model: Any, whose: str) -> dict[str, list[bool]]:
        problems = [problem for sort in self._probes.values() for problem in sort]
        try:
            found = solve(
                model,
                self.tokenizer,
                problems,
                new_tokens=_ANSWER_TOKENS,
                stop=STOP,
                what=f"small problems: {whose}",
            )
        except Exception as error:  # whatever a model's own generate raises: it is not worth a compressed model
            self._failures.append(f"{type(error).__name__}: {error}")
            self.say(f"No small problems were asked: {self._failures[-1]}")
            return {}
        right = iter(found.right)
        return {name: [next(right) for _ in sort] for name, sort in self._probes.items()}

    def _write(self, model: Any, whose: str) -> list[Written]:
        return self._texts(model, self._beginnings, min(_TEXT_TOKENS, self._half), False, f"repetition: {whose}")

    def _think(self, model: Any, whose: str) -> list[Written]:
        return self._texts(model, _THINK_ABOUT, min(_THOUGHT_TOKENS, self._half), self._chat, f"reasoning: {whose}")

    def _opening(self, model: Any) -> str:
        """What its first words say: a model may reason whose template does not speak of it."""
        texts = self._texts(model, _THINK_ABOUT, min(_OPENING_TOKENS, self._half), self._chat, "first words: original")
        signs = [sign_in_writing(self.tokenizer.decode(text.tokens)) for text in texts]
        return next(filter(None, signs), "")

    def _texts(self, model: Any, prompts: Sequence[str], tokens: int, chat: bool, what: str) -> list[Written]:
        try:
            found = write_on(model, self.tokenizer, prompts, new_tokens=tokens, chat=chat, what=what)
        except Exception as error:  # see above
            self._failures.append(f"{type(error).__name__}: {error}")
            self.say(f"Nothing was written ({what}): {self._failures[-1]}")
            return []
        return [text for (text,) in found]

"""Ask a model everything in a suite, and hold it against its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import Agreement, require_two
from streamline_hooks.evaluation.beforehand import require_askable
from streamline_hooks.evaluation.choices import ChoiceScores, score_choices
from streamline_hooks.evaluation.kept import Kept
from streamline_hooks.evaluation.keys import Keys
from streamline_hooks.evaluation.last_words import LastWordScores, score_last_words
from streamline_hooks.evaluation.problems import Solved, solve
from streamline_hooks.evaluation.result import Evaluation, Scores
from streamline_hooks.evaluation.sliding import TextPerplexity, sliding_perplexity
from streamline_hooks.evaluation.sliding_agreement import TextComparison, sliding_agreement
from streamline_hooks.evaluation.speed import SpeedReport, measure_speed, room_for_prompt
from streamline_hooks.evaluation.suite import PROMPTS, Suite
from streamline_hooks.evaluation.writing import Written, write_on

T = TypeVar("T")


@checked(batch_size=1)
def evaluate(
    model: nn.Module,
    suite: Suite,
    reference: nn.Module | None = None,
    *,
    batch_size: int = 8,
    keep_in: str | Path | None = None,
    seed: int = 0,
    name: str = "model",
    reference_name: str = "original",
) -> Evaluation:
    """Ask a model everything in a suite.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    suite : Suite
    reference : transformers.PreTrainedModel, optional
        The original, of the same vocabulary: what is retained of it, and how far the two agree, are told besides.
    batch_size : int
        Texts at a time.
    keep_in : str or Path, optional
        A JSON file for what has been measured, by the weights and everything else that it depends on (but for hooks,
        see `model_digest`): an evaluation that was interrupted goes on from there, and an original is asked once for
        many models, but for the text, on which the two are run side by side. Speed is not kept.
    seed : int
        Of what is sampled.
    name, reference_name : str
        What the two are called.

    Returns
    -------
    Evaluation

    Raises
    ------
    StreamlineError
        If something in the suite cannot be asked of the models, both are one module, or have one name. What can be told
        beforehand is told before anything is run.

    Examples
    --------
    >>> from streamline_hooks.evaluation import Suite
    >>> from streamline_hooks.testing import tiny_model
    >>> class Letters:
    ...     bos_token_id, eos_token_id, pad_token_id = 1, 2, 2
    ...
    ...     def __call__(self, text, add_special_tokens=False):
    ...         return {"input_ids": [ord(letter) % 29 + 3 for letter in text]}
    ...
    ...     def decode(self, tokens, skip_special_tokens=False):
    ...         return "".join(chr(token + 94) for token in tokens)
    >>> suite = Suite(Letters(), text={"prose": ["a row of letters"]}, timed=None)
    >>> evaluate(tiny_model("llama"), suite).scores.text["prose"].tokens
    16
    """
    if reference is not None:
        require_two(model, reference)
    if name == reference_name:
        raise StreamlineError(f"The model and its original are both called {name!r}; give them names that differ.")
    models = {name: model} if reference is None else {reference_name: reference, name: model}
    require_askable(suite, models, batch_size)
    asker = _Asker(suite, batch_size, seed, Kept(None if keep_in is None else Path(keep_in)))
    if reference is None:
        scores = asker.scores(model, name)
        asker.text(model, scores, name)
        return Evaluation(suite, name, scores, speed=_speed(suite, models))
    scores, original = asker.scores(model, name), asker.scores(reference, reference_name)
    agreement = asker.compared_text(model, scores, reference, original, name)
    return Evaluation(suite, name, scores, reference_name, original, agreement, _speed(suite, models))


class _Asker:
    """Asks models what is in a suite, and keeps what they answered."""

    def __init__(self, suite: Suite, batch_size: int, seed: int, kept: Kept) -> None:
        self.suite, self.batch_size, self.seed, self.kept = suite, batch_size, seed, kept
        self.keys = None if kept.file is None else Keys(suite.tokenizer)

    def scores(self, model: nn.Module, name: str) -> Scores:
        """Everything but text."""
        parameters = list(model.parameters())
        scores = Scores(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
        measured = partial(self._measured, model, scores)
        suite = self.suite
        for task, choices in suite.choices.items():
            scores.choices[task] = measured(
                ChoiceScores, score_choices, name, task, choices.questions, add_bos=suite.add_bos
            )
        for task, ends in suite.last_words.items():
            scores.last_words[task] = measured(
                LastWordScores, score_last_words, name, task, ends, add_bos=suite.add_bos
            )
        for task, problems in suite.problems.items():
            settings = {key: value for key, value in vars(problems).items() if key != "problems"}
            scores.problems[task] = measured(Solved, solve, name, task, problems.problems, seed=self.seed, **settings)
        if suite.prompts:
            given = {"new_tokens": suite.new_tokens}
            scores.written = measured(_Texts, _written, name, PROMPTS, suite.prompts, **given).texts
        return scores

    def text(self, model: nn.Module, scores: Scores, name: str) -> None:
        """The perplexity of the text."""
        for domain, documents in self.suite.text.items():
            given = self._window()
            scores.text[domain] = self._measured(
                model, scores, TextPerplexity, sliding_perplexity, name, domain, documents, **given
            )

    def compared_text(
        self, model: nn.Module, scores: Scores, reference: nn.Module, original: Scores, name: str
    ) -> dict[str, Agreement]:
        """The perplexity of both models, and their agreement, from one pass of each."""
        agreement: dict[str, Agreement] = {}
        for domain, documents in self.suite.text.items():
            ask = partial(
                sliding_agreement,
                model,
                reference,
                self.suite.tokenizer,
                documents,
                batch_size=self.batch_size,
                what=f"{name} and original: {domain}",
                **self._window(),
            )
            parts: list[Any] = [self._window()]
            if self.keys is not None:
                parts += [self.keys.read(documents), self.keys.model(model), self.keys.model(reference)]
            found, seconds = self.kept.get(TextComparison, parts, ask)
            scores.text[domain], original.text[domain], agreement[domain] = (
                found.changed,
                found.original,
                found.agreement,
            )
            scores.seconds[domain] = original.seconds[domain] = seconds / 2
        return agreement

    def _measured(
        self,
        model: nn.Module,
        scores: Scores,
        kind: type[T],
        how: Callable[..., T],
        name: str,
        task: str,
        asked: Sequence[Any],
        **settings: Any,
    ) -> T:
        """What a model makes of something, from the file where it is known; its seconds go to the scores."""
        call = partial(
            how, model, self.suite.tokenizer, asked, batch_size=self.batch_size, what=f"{name}: {task}", **settings
        )
        parts: list[Any] = [how.__name__, settings]
        if self.keys is not None:
            written = "new_tokens" in settings
            key = self.keys.written_on(asked, settings.get("chat", False)) if written else self.keys.read(asked)
            parts += [key, self.keys.model(model)]
        if settings.get("temperature"):
            parts.append(self.batch_size)  # what is sampled depends on it
        found, scores.seconds[task] = self.kept.get(kind, parts, call)
        return found

    def _window(self) -> dict[str, Any]:
        return {"window": self.suite.window, "stride": self.suite.stride, "first": self.suite.first}


@dataclass(frozen=True)
class _Texts:
    texts: tuple[Written, ...]


def _written(*args: Any, **settings: Any) -> _Texts:
    return _Texts(tuple(text for (text,) in write_on(*args, **settings)))


def _speed(suite: Suite, models: dict[str, Any]) -> SpeedReport | None:
    if suite.timed is None:
        return None
    tokens, new_tokens, rounds = suite.timed
    tokens = min(room_for_prompt(model, new_tokens, tokens) for model in models.values())
    return measure_speed(models, tokens=tokens, new_tokens=new_tokens, repeats=rounds)

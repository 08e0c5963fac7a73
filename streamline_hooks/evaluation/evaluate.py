"""Evaluate a model on a suite, and compare it with its original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import positions_of
from streamline_hooks.digests import tokenizer_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import Agreement, require_two
from streamline_hooks.evaluation.problems import Solved, chance_of_guessing, solve
from streamline_hooks.evaluation.result import Evaluation, Scores
from streamline_hooks.evaluation.result_cache import ResultCache
from streamline_hooks.evaluation.sliding import (
    Documents,
    TextPerplexity,
    WindowSettings,
    sliding_perplexity,
    usual_window,
)
from streamline_hooks.evaluation.sliding_agreement import TextComparison, sliding_agreement
from streamline_hooks.evaluation.speed import SpeedReport, measure_speed, require_timed, room_for_prompt
from streamline_hooks.evaluation.suite import PROMPTS, Content, Suite
from streamline_hooks.evaluation.tasks import TaskResult
from streamline_hooks.evaluation.writing import Written, prompt_tokens, write_on

T = TypeVar("T")


@checked()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    reference: nn.Module | None = None,
    *,
    keep_in: str | Path | None = None,
    name: str = "model",
    reference_name: str = "original",
) -> Evaluation:
    """Evaluate a model on a suite.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is run as it is, inside an open `LayerSurgeon` as well.
    tokenizer : transformers.PreTrainedTokenizerBase
    suite : Suite
    reference : transformers.PreTrainedModel, optional
        The original, of the same vocabulary, to compare with.
    keep_in : str or Path, optional
        A JSON file that caches results by the model (but for hooks, see `model_digest`), the tokenizer, the data and
        the settings. An interrupted evaluation continues, and an original is evaluated once for many models, except on
        text, where both models are run side by side. Speed is not cached.
    name, reference_name : str
        Names of the two models.

    Returns
    -------
    Evaluation

    Raises
    ------
    StreamlineError
        If a part of the suite cannot be run by the models, or both are one module or have one name. What can be
        checked is checked before anything is run.

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
    >>> suite = Suite(text={"prose": ["a row of letters"]}, timed=None)
    >>> evaluate(tiny_model("llama"), Letters(), suite).scores.text["prose"].tokens
    16
    """
    if reference is not None:
        require_two(model, reference)
    if name == reference_name:
        raise StreamlineError(f"Both models are named {name!r}. Expected distinct names. Give another name.")
    content = suite.read(tokenizer)
    models = {name: model} if reference is None else {reference_name: reference, name: model}
    _require_runnable(suite, content, tokenizer, models)
    evaluator = _Evaluator(suite, content, tokenizer, ResultCache(None if keep_in is None else Path(keep_in)))
    chance = {task: chance_of_guessing(problems) for task, (problems, _) in content.problems.items()}
    if reference is None:
        scores = evaluator.scores(model, name)
        evaluator.text(model, scores, name)
        return Evaluation(name, scores, chance=chance, speed=_speed(suite, models))
    scores, original = evaluator.scores(model, name), evaluator.scores(reference, reference_name)
    agreement = evaluator.compared_text(model, scores, reference, original, name)
    return Evaluation(name, scores, reference_name, original, agreement, _speed(suite, models), chance)


def require_same_tokens(tokenizer: Any, other: Any) -> None:
    """Raise if two tokenizers read a text differently, so that two models cannot be compared."""
    text = "The quick brown fox, 12 lazy dogs: naïve?"
    first, second = ([one(text)["input_ids"], one.bos_token_id, one.eos_token_id] for one in (tokenizer, other))
    if first != second:
        raise StreamlineError(
            f"The tokenizers of the two models read {text!r} differently. Expected one tokenizer, to compare them. "
            "Evaluate them one by one."
        )


class _Evaluator:
    """Runs the parts of a suite on models, through the cache."""

    def __init__(self, suite: Suite, content: Content, tokenizer: Any, cache: ResultCache) -> None:
        self.suite, self.content, self.tokenizer, self.cache = suite, content, tokenizer, cache
        self.window: dict[str, Any] = {"window": suite.window, "stride": suite.stride, "first": suite.first}

    def scores(self, model: nn.Module, name: str) -> Scores:
        """Evaluate everything but text."""
        parameters = list(model.parameters())
        scores = Scores(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
        for task, loaded in self.content.tasks.items():
            parts = [loaded.digest(), self._tokenizer([]), model] if self.cache.file else []
            scores.tasks[task], scores.seconds[task] = self.cache.get(
                TaskResult, parts, partial(loaded.run, model, self.tokenizer)
            )
        measured = partial(self._measured, model, scores, name)
        for task, (problems, settings) in self.content.problems.items():
            texts = [problem.prompt for problem in problems]
            scores.problems[task] = measured(Solved, solve, task, problems, texts, seed=self.suite.seed, **settings)
        if prompts := self.content.prompts:
            new_tokens = self.suite.new_tokens
            scores.written = measured(_Texts, _write, PROMPTS, prompts, prompts, new_tokens=new_tokens).texts
        return scores

    def text(self, model: nn.Module, scores: Scores, name: str) -> None:
        """Measure the perplexity of the text."""
        for domain, documents in self.content.text.items():
            scores.text[domain] = self._measured(
                model, scores, name, TextPerplexity, sliding_perplexity, domain, documents, documents, **self.window
            )

    def compared_text(
        self, model: nn.Module, scores: Scores, reference: nn.Module, original: Scores, name: str
    ) -> dict[str, Agreement]:
        """Measure the perplexity of both models, and their agreement, in one pass of each."""
        agreement: dict[str, Agreement] = {}
        for domain, documents in self.content.text.items():
            run = partial(
                sliding_agreement,
                model,
                reference,
                self.tokenizer,
                documents,
                batch_size=self.suite.batch_size,
                what=f"{name} and original: {domain}",
                **self.window,
            )
            parts = [self.window, repr(documents), self._tokenizer(documents), model, reference]
            found, seconds = self.cache.get(TextComparison, parts, run)
            scores.text[domain], original.text[domain] = found.changed, found.original
            agreement[domain] = found.agreement
            scores.seconds[domain] = original.seconds[domain] = seconds / 2
        return agreement

    def _measured(
        self,
        model: nn.Module,
        scores: Scores,
        name: str,
        kind: type[T],
        how: Callable[..., T],
        task: str,
        items: Sequence[Any],
        texts: Sequence[str],
        **settings: Any,
    ) -> T:
        """Return the result of one part, cached or measured, and note its seconds."""
        size = self.suite.batch_size
        run = partial(how, model, self.tokenizer, items, batch_size=size, what=f"{name}: {task}", **settings)
        parts = [how.__name__, settings, repr(items), self._tokenizer(texts), model]
        if settings.get("temperature"):
            parts.append(size)  # samples depend on it
        found, scores.seconds[task] = self.cache.get(kind, parts, run)
        return found

    def _tokenizer(self, texts: Sequence[str]) -> str:
        return tokenizer_digest(self.tokenizer, texts) if self.cache.file else ""


@dataclass(frozen=True)
class _Texts:
    texts: tuple[Written, ...]


def _write(*args: Any, **settings: Any) -> _Texts:
    return _Texts(tuple(text for (text,) in write_on(*args, **settings)))


def _speed(suite: Suite, models: dict[str, Any]) -> SpeedReport | None:
    if suite.timed is None:
        return None
    tokens, new_tokens, rounds = suite.timed
    tokens = min(room_for_prompt(model, new_tokens, tokens) for model in models.values())
    return measure_speed(models, tokens=tokens, new_tokens=new_tokens, repeats=rounds)


def _require_runnable(suite: Suite, content: Content, tokenizer: Any, models: Mapping[str, Any]) -> None:
    """Raise, before anything is run, if a model lacks positions for a part of the suite, or vocabularies differ."""
    prompts = [(f"prompt {k}", prompt, False, suite.new_tokens) for k, prompt in enumerate(content.prompts)]
    for problems, settings in content.problems.values():
        prompts += [(p.where, p.prompt, settings.get("chat", False), settings["new_tokens"]) for p in problems]
    for model in models.values():
        positions = positions_of(getattr(model, "config", None))
        for where, prompt, chat, new_tokens in prompts:
            length = len(prompt_tokens(tokenizer, prompt, chat))
            if positions is not None and length + new_tokens > positions:
                raise StreamlineError(
                    f"{where} has {length} tokens, and {new_tokens} are to follow. Expected no more than the "
                    f"{positions} positions of this {type(model).__name__}. Shorten it, or ask for fewer new tokens."
                )
    if content.text:
        window = min(map(usual_window, models.values())) if suite.window is None else suite.window
        for model in models.values():
            Documents(model, tokenizer, [], WindowSettings(window, suite.stride, suite.batch_size, suite.first))
        heads = [getattr(model, "get_output_embeddings", lambda: None)() for model in models.values()]
        sizes = {size for head in heads if (size := getattr(head, "out_features", None)) is not None}
        if len(sizes) > 1:
            raise StreamlineError(
                f"The models have logits of {' and '.join(map(str, sorted(sizes, reverse=True)))} tokens. Expected one "
                "vocabulary, to compare them on text. Evaluate them without a reference."
            )
    if suite.timed is not None:
        tokens, new_tokens, _ = suite.timed
        tokens = min(room_for_prompt(model, new_tokens, tokens) for model in models.values())
        for name, model in models.items():
            require_timed(name, model, tokens + new_tokens)

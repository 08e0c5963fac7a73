"""Evaluate a model on a suite, and compare it with its original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
    TextComparison,
    TextPerplexity,
    first_tokens,
    sliding_agreement,
    sliding_perplexity,
    window_and_stride,
)
from streamline_hooks.evaluation.speed import measure_speed, require_timed, room_for_prompt
from streamline_hooks.evaluation.suite import PROMPTS, Content, Suite
from streamline_hooks.evaluation.tasks import TaskResult
from streamline_hooks.evaluation.writing import Written, prompt_tokens, write_on


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
    timed = suite.timed
    if timed is not None:
        timed = (min(room_for_prompt(one, timed[1], timed[0]) for one in models.values()), *timed[1:])
    _require_runnable(suite, content, tokenizer, models)
    if timed is not None:
        for one_name, one in models.items():
            require_timed(one_name, one, timed[0] + timed[1])
    evaluator = _Evaluator(suite, content, tokenizer, ResultCache(None if keep_in is None else Path(keep_in)))
    scores = {name: evaluator.scores(one, name) for name, one in reversed(models.items())}
    found = Evaluation(name, scores[name], "" if reference is None else reference_name, scores.get(reference_name))
    found.chance = {task: chance_of_guessing(problems) for task, (problems, _) in content.problems.items()}
    found.agreement = evaluator.add_text(found, model, reference)
    if timed is not None:
        found.speed = measure_speed(models, tokens=timed[0], new_tokens=timed[1], repeats=timed[2])
    return found


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

    def scores(self, model: nn.Module, name: str) -> Scores:
        """Evaluate everything but text."""
        content, suite, parameters = self.content, self.suite, list(model.parameters())
        scores = Scores(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
        for task, loaded in content.tasks.items():
            parts = [loaded.digest, self._tokenizer([]), model]
            scores.tasks[task], scores.seconds[task] = self.cache.get(
                TaskResult, parts, partial(loaded.run, model, self.tokenizer)
            )
        for task, (problems, settings) in content.problems.items():
            prompts = [problem.prompt for problem in problems]
            scores.problems[task], scores.seconds[task] = self._run(
                Solved, solve, [model], problems, prompts, what=f"{name}: {task}", seed=suite.seed, **settings
            )
        if prompts := content.prompts:
            written, scores.seconds[PROMPTS] = self._run(
                tuple[tuple[Written, ...], ...], write_on, [model], prompts, prompts, what=f"{name}: {PROMPTS}",
                new_tokens=suite.new_tokens,
            )  # fmt: skip
            scores.written = tuple(text for (text,) in written)
        return scores

    def add_text(self, found: Evaluation, model: nn.Module, reference: nn.Module | None) -> dict[str, Agreement]:
        """Add the perplexity of the text, of both models in one pass of each; return their agreement by domain."""
        agreement, suite = {}, self.suite
        window: dict[str, Any] = {"window": suite.window, "stride": suite.stride, "first": suite.first}
        for domain, documents in self.content.text.items():
            if reference is None or found.original is None:
                found.scores.text[domain], found.scores.seconds[domain] = self._run(
                    TextPerplexity, sliding_perplexity, [model], documents, documents, what=f"{found.name}: {domain}",
                    **window,
                )  # fmt: skip
                continue
            both, seconds = self._run(
                TextComparison, sliding_agreement, [model, reference], documents, documents,
                what=f"{found.name} and original: {domain}", **window,
            )  # fmt: skip
            for scores, text in ((found.scores, both.changed), (found.original, both.original)):
                scores.text[domain], scores.seconds[domain] = text, seconds / 2
            agreement[domain] = both.agreement
        return agreement

    def _run(
        self, kind: Any, how: Callable[..., Any], models: Sequence[nn.Module], items: Sequence[Any],
        texts: Sequence[str], what: str, **settings: Any,
    ) -> tuple[Any, float]:  # fmt: skip
        """Return the result of one part, cached or measured, and its seconds."""
        size = self.suite.batch_size
        run = partial(how, *models, self.tokenizer, items, batch_size=size, what=what, **settings)
        parts = [how.__name__, settings, repr(items), self._tokenizer(texts), *models]
        if settings.get("temperature"):
            parts.append(size)  # samples depend on it
        return self.cache.get(kind, parts, run)

    def _tokenizer(self, texts: Sequence[str]) -> Callable[[], str]:
        return partial(tokenizer_digest, self.tokenizer, texts)


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
        window_and_stride(models.values(), suite.window, suite.stride)
        first_tokens(tokenizer, suite.first)
    heads = [getattr(model, "get_output_embeddings", lambda: None)() for model in models.values()]
    sizes = {size for head in heads if (size := getattr(head, "out_features", None)) is not None}
    if content.text and len(sizes) > 1:
        raise StreamlineError(
            f"The models have logits of {' and '.join(map(str, sorted(sizes, reverse=True)))} tokens. Expected one "
            "vocabulary, to compare them on text. Evaluate them without a reference."
        )

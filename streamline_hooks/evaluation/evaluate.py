"""Evaluate a model on a suite, and compare it with the original."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from streamline_hooks.core import (
    StreamlineError,
    batches_digest,
    max_positions,
    tokenizer_digest,
    validate_arguments,
)
from streamline_hooks.evaluation.agreement import Agreement, require_distinct_models
from streamline_hooks.evaluation.batch_scores import BatchComparison, BatchScores, compare_on_batches, score_batches
from streamline_hooks.evaluation.lm_eval_tasks import TaskResult
from streamline_hooks.evaluation.result import Evaluation, Scores
from streamline_hooks.evaluation.result_cache import ResultCache, digest_with_settings
from streamline_hooks.evaluation.samples import GeneratedText, TextGenerationConfig, generate_texts, tokenize_prompt
from streamline_hooks.evaluation.sliding_perplexity import (
    TextComparison,
    TextPerplexity,
    domain_perplexity,
    first_tokens,
    sliding_agreement,
    window_and_stride,
)
from streamline_hooks.evaluation.speed import max_prompt_tokens, measure_speed, require_timeable
from streamline_hooks.evaluation.suite import PROMPTS, Suite, SuiteContent
from streamline_hooks.evaluation.synthetic_tasks import ProblemResults, guessing_accuracy, solve_problems
from streamline_hooks.modeling import Task, refuse_later_tokens, task_from_class_names


@validate_arguments()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    reference: nn.Module | None = None,
    *,
    cache_file: str | Path | None = None,
    name: str = "model",
    reference_name: str = "original",
) -> Evaluation:
    """Evaluate a model on a suite, and compare it with a reference.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, which may be inside an open `LayerSurgeon`. Text, tasks, problems and prompts require a causal
        language model. ``suite.batches`` support any model and score it by its task: accuracy if batches have labels,
        and agreement or similarity of the outputs with those of the reference.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        The tokenizer of both models; None if the suite has only batches.
    suite : Suite
        The data and settings.
    reference : transformers.PreTrainedModel, optional
        The original, with the same vocabulary, classes or features.
    cache_file : str or Path, optional
        JSON file that caches results by model (without hooks, see `model_digest`), tokenizer, data and settings; speed
        is not cached. An interrupted evaluation continues, and an original is evaluated once for many models, except on
        text and batches, where both models run together.
    name, reference_name : str
        Names of the two models in reports.

    Returns
    -------
    Evaluation

    Raises
    ------
    StreamlineError
        If the models cannot run a part of the suite, or are the same module, or have the same name. Arguments are
        validated before any expensive step.

    Examples
    --------
    >>> from streamline_hooks.evaluation import Suite
    >>> from streamline_hooks.testing import tiny_model, tiny_tokenizer
    >>> suite = Suite(text={"prose": ["a row of letters"]}, timed=None)
    >>> evaluate(tiny_model("llama"), tiny_tokenizer(), suite).scores.text["prose"].tokens
    16
    """
    if reference is not None:
        require_distinct_models(model, reference)
    if name == reference_name:
        raise StreamlineError(f"Both models are named {name!r}. Expected distinct names. Pass another name.")
    content = suite.read(tokenizer)
    models = {name: model} if reference is None else {reference_name: reference, name: model}
    task = (suite.task or Task.of(model)) if content.batches else None
    _require_runnable(suite, content, tokenizer, models)
    if task is not None and reference is None:
        _require_labels(content.batches, task)
    timed = suite.timed if all(map(_is_causal_lm, models.values())) else None
    if timed is not None:
        tokens, new_tokens, repeats = timed
        tokens = min(max_prompt_tokens(module, new_tokens, tokens) for module in models.values())
        for label, module in models.items():
            require_timeable(label, module, tokens + new_tokens)
    evaluator = _Evaluator(suite, content, tokenizer, ResultCache(None if cache_file is None else Path(cache_file)))
    scores = {label: evaluator.scores(module, label) for label, module in reversed(models.items())}
    result = Evaluation(name, scores[name], "" if reference is None else reference_name, scores.get(reference_name))
    result.chance = {problem: guessing_accuracy(problems) for problem, (problems, _) in content.problems.items()}
    result.agreement = evaluator.add_text(result, model, reference)
    if task is not None:
        evaluator.add_batches(result, model, reference, task)
    if timed is not None:
        result.speed = measure_speed(models, tokens=tokens, new_tokens=new_tokens, repeats=repeats)
    return result


def require_same_tokens(tokenizer: Any, other: Any) -> None:
    """Raise StreamlineError if two tokenizers encode a test text differently or differ in BOS or EOS."""
    text, both = "The quick brown fox, 12 lazy dogs: naïve?", (tokenizer, other)
    special = ("bos_token_id", "eos_token_id")
    first, second = ([each(text)["input_ids"], *(getattr(each, name, None) for name in special)] for each in both)
    if first != second:
        raise StreamlineError(
            f"The tokenizers of the two models encode {text!r} differently. Expected the same tokenizer for a "
            "comparison. Evaluate the models one by one."
        )


def require_same_inputs(processor: Any, other: Any) -> None:
    """Raise StreamlineError if two models have different tokenizers, or image processors with different settings.

    The batches for both models are created with one of the two processors.
    """
    from transformers import ImageProcessingMixin

    reads_images = [isinstance(each, ImageProcessingMixin) for each in (processor, other)]
    if not any(reads_images):
        require_same_tokens(processor, other)
        return
    if not all(reads_images):
        raise StreamlineError(
            f"One model has a {type(processor).__name__}, the other a {type(other).__name__}. Expected two models for "
            "images or two models for text. Evaluate the models one by one."
        )
    first, second = _image_settings(processor), _image_settings(other)
    differing = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    if differing:
        values = "; ".join(f"{name} is {first.get(name)} and {second.get(name)}" for name in differing)
        raise StreamlineError(
            f"The image processors of the two models differ: {values}. Expected the same settings for a comparison. "
            "Evaluate the models one by one, or save the same processor in both folders."
        )


def _image_settings(processor: Any) -> dict[str, str]:
    """Return the settings of an image processor as JSON, without the names of classes and files."""
    names = ("type", "class", "name_or_path", "auto_map", "version")
    settings = {name: value for name, value in processor.to_dict().items() if not name.endswith(names)}
    return {name: json.dumps(value, default=str) for name, value in settings.items() if value is not None}


class _Evaluator:
    """Run the parts of a suite on models, through the cache."""

    def __init__(self, suite: Suite, content: SuiteContent, tokenizer: Any, cache: ResultCache) -> None:
        self.suite, self.content, self.tokenizer, self.cache = suite, content, tokenizer, cache
        self.digests: dict[int, str] = {}

    def digest(self, model: nn.Module) -> str:
        """Return the digest of a model, computed once, because an evaluation changes no model."""
        if id(model) not in self.digests:
            self.digests[id(model)] = digest_with_settings(model)
        return self.digests[id(model)]

    def scores(self, model: nn.Module, name: str) -> Scores:
        """Evaluate everything except text and batches."""
        content, parameters = self.content, list(model.parameters())
        scores = Scores(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
        for task, loaded in content.tasks.items():
            parts = [loaded.digest, partial(tokenizer_digest, self.tokenizer, []), partial(self.digest, model)]
            run = partial(loaded.run, model, self.tokenizer)
            scores.tasks[task], scores.seconds[task] = self.cache.get(TaskResult, parts, run)
        for task, (problems, options) in content.problems.items():
            prompts, settings = [problem.prompt for problem in problems], {"seed": self.suite.seed, **options}
            scores.problems[task], scores.seconds[task] = self._run(
                ProblemResults, solve_problems, [model], problems, prompts, f"{name}: {task}", settings
            )
        if prompts := content.prompts:
            kind, settings = tuple[tuple[GeneratedText, ...], ...], {"new_tokens": self.suite.new_tokens}
            generated, scores.seconds[PROMPTS] = self._run(
                kind, generate_texts, [model], prompts, prompts, f"{name}: {PROMPTS}", settings
            )
            scores.generated = tuple(text for (text,) in generated)
        return scores

    def add_text(self, evaluation: Evaluation, model: nn.Module, reference: nn.Module | None) -> dict[str, Agreement]:
        """Add the perplexity on the text, for both models in one pass; return their agreement by domain."""
        agreement, suite = {}, self.suite
        window = {"window": suite.window, "stride": suite.stride, "first": suite.first}
        for domain, documents in self.content.text.items():
            if reference is None or evaluation.original is None:
                evaluation.scores.text[domain], evaluation.scores.seconds[domain] = self._run(
                    TextPerplexity,
                    domain_perplexity,
                    [model],
                    documents,
                    documents,
                    f"{evaluation.name}: {domain}",
                    window,
                )
                continue
            models, desc = [model, reference], f"{evaluation.name} and original: {domain}"
            both, seconds = self._run(TextComparison, sliding_agreement, models, documents, documents, desc, window)
            for scores, text in ((evaluation.scores, both.changed), (evaluation.original, both.original)):
                scores.text[domain], scores.seconds[domain] = text, seconds / 2
            agreement[domain] = both.agreement
        return agreement

    def add_batches(self, evaluation: Evaluation, model: nn.Module, reference: nn.Module | None, task: Task) -> None:
        """Add the scores on batches, for both models in one pass, and the agreement of their outputs."""
        for name, batches in self.content.batches.items():
            data = [str(task), partial(batches_digest, batches)]
            if reference is None or evaluation.original is None:
                run: Any = partial(score_batches, model, batches, task=task, desc=f"{evaluation.name}: {name}")
                parts = [score_batches.__name__, *data, partial(self.digest, model)]
                evaluation.scores.batches[name], evaluation.scores.seconds[name] = self.cache.get(
                    BatchScores, parts, run
                )
                continue
            desc = f"{evaluation.name} and original: {name}"
            run = partial(compare_on_batches, model, reference, batches, task=task, desc=desc)
            digests = [partial(self.digest, each) for each in (model, reference)]
            both, seconds = self.cache.get(BatchComparison, [compare_on_batches.__name__, *data, *digests], run)
            for scores, batch_scores in ((evaluation.scores, both.changed), (evaluation.original, both.original)):
                scores.batches[name], scores.seconds[name] = batch_scores, seconds / 2
            if both.similarity is None:
                evaluation.agreement[name] = both.agreement
            else:
                evaluation.similarity[name] = both.similarity

    def _run(
        self, kind: Any, measure: Callable[..., Any], models: Sequence[nn.Module], items: Sequence[Any],
        texts: Sequence[str], desc: str, settings: Mapping[str, Any],
    ) -> tuple[Any, float]:  # fmt: skip
        """Return the result of a part, from the cache or measured, and its seconds."""
        size = self.suite.batch_size
        options = {"batch_size": size, **settings}
        if measure in (solve_problems, generate_texts):
            options = {"config": TextGenerationConfig(**options)}
        run = partial(measure, *models, self.tokenizer, items, desc=desc, **options)
        digests = [partial(self.digest, model) for model in models]
        parts = [measure.__name__, settings, repr(items), partial(tokenizer_digest, self.tokenizer, texts), *digests]
        if settings.get("temperature"):
            parts.append(size)  # samples depend on the batch size
        return self.cache.get(kind, parts, run)


def _is_causal_lm(model: Any) -> bool:
    """Whether a model is a causal language model; classes unknown to Transformers count as such."""
    known = task_from_class_names([kind.__name__ for kind in type(model).__mro__])
    return known in ("", "causal-lm") and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _require_labels(batches: Mapping[str, Sequence[Any]], task: Task) -> None:
    """Raise StreamlineError if the batches cannot score a model without a reference."""
    if task.is_causal_lm:
        return
    labeled = [isinstance(batch, Mapping) and "labels" in batch for each in batches.values() for batch in each]
    if not (task.gives_distributions and all(labeled)):
        needed = "labels in every batch" if task.gives_distributions else "a reference, since embeddings have no labels"
        raise StreamlineError(
            f"The suite has {len(labeled)} batches for {task}, {sum(labeled)} of them with labels, and "
            f"reference=None. Expected {needed}. Pass the original as reference."
        )


def _require_runnable(suite: Suite, content: SuiteContent, tokenizer: Any, models: Mapping[str, Any]) -> None:
    """Raise StreamlineError if the models cannot run the suite.

    Each model needs enough positions and the right task, and all models need the same vocabulary.
    """
    for name, model in models.items():
        all_parts = {
            "text": content.text,
            "tasks": content.tasks,
            "problems": content.problems,
            "prompts": content.prompts,
        }
        parts = [part for part, items in all_parts.items() if items]
        if parts and not _is_causal_lm(model):
            raise StreamlineError(
                f"The suite has {' and '.join(parts)}, but {name} is a {type(model).__name__}. Expected a causal "
                "language model for these. Use batches for the model's task: Suite(batches={'test': [...]}), created "
                "by image_parts, text_parts or pair_parts."
            )
        if parts:
            refuse_later_tokens(model, f"A suite with {' and '.join(parts)}")
    prompts = [(f"prompt {k}", prompt, False, suite.new_tokens) for k, prompt in enumerate(content.prompts)]
    for problems, settings in content.problems.values():
        prompts += [(p.where, p.prompt, settings.get("chat", False), settings["new_tokens"]) for p in problems]
    for model in models.values():
        positions = max_positions(getattr(model, "config", None))
        for where, prompt, chat, new_tokens in prompts:
            length = len(tokenize_prompt(tokenizer, prompt, chat))
            if positions is not None and length + new_tokens > positions:
                raise StreamlineError(
                    f"{where} has {length} tokens, and new_tokens={new_tokens}. Expected at most {positions} tokens in "
                    f"total, the positions of this {type(model).__name__}. Shorten the prompt, or reduce new_tokens."
                )
    if content.text:
        window_and_stride(models.values(), suite.window, suite.stride)
        first_tokens(tokenizer, suite.first)
    heads = [getattr(model, "get_output_embeddings", lambda: None)() for model in models.values()]
    sizes = {size for head in heads if (size := getattr(head, "out_features", None)) is not None}
    if content.text and len(sizes) > 1:
        raise StreamlineError(
            f"The models have logits for {' and '.join(map(str, sorted(sizes, reverse=True)))} tokens. Expected the "
            "same vocabulary for a comparison on text. Evaluate the models without a reference."
        )

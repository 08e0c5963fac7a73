"""Run tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model in memory."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.core import Config, StreamlineError, device_of, texts_digest
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood
from streamline_hooks.evaluation.task_files import random_subset, task_config_from_file
from streamline_hooks.modeling import inference, logits_to_keep
from streamline_hooks.surgery import find_prompt_skip

TaskSource = str | Path | Mapping[str, Any]
_YAML = (".yaml", ".yml")
_DATA = (".jsonl", ".json", ".gz", ".bz2", ".xz", ".zst", ".zip")
_SUGGESTIONS = 5


@dataclass(frozen=True)
class TaskSettings(Config):
    """Settings of `run_tasks`.

    Attributes
    ----------
    items : int, optional
        Maximum number of items per task, a random subset. By default all.
    few_shot : int, optional
        Number of few-shot examples. By default the task's number, else 0. A task that fixes 0 keeps 0.
    metric : str
        Metric to compare models by, where the task has it. By default the first metric of each task.
    add_bos : bool, optional
        Whether texts begin with the tokenizer's special tokens. By default the tokenizer decides.
    batch_size : int
        Number of sequences per forward pass.
    seed : int
        Seed of the subset and the few-shot examples.

    Examples
    --------
    >>> TaskSettings(items=100).batch_size
    8
    """

    bounds: ClassVar[Mapping[str, float]] = {"items": 1, "few_shot": 0, "batch_size": 1, "seed": 0}
    items: int | None = None
    few_shot: int | None = None
    metric: str = ""
    add_bos: bool | None = None
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class TaskResult:
    """Results of a task or a group of tasks; returned by `run_tasks`.

    Attributes
    ----------
    metrics : dict of str to dict of str to (float, float or None)
        Value and standard error by name (of the task, or of the group and its subtasks) and metric. A metric with a
        filter is named ``metric,filter``.
    items, few_shot : dict of str to int
        Number of items and of few-shot examples by name.
    versions : dict of str to str
        Task versions by name.
    metric : str
        The metric of `scores`; empty if no metric scores each item between 0 and 1.
    scores : tuple of float
        Scores by item. The scores of a group are concatenated by task.
    chance : float
        Accuracy without knowledge: the mean of 1 / choices. If all items of a task have the same choices, such as yes
        and no: the frequency of the most frequent answer, counted without one item that has it, because the frequency
        is too high for few items; at least 1 / choices. Tasks of a group with the same choices are counted together.
    generates : bool
        Whether the task scores generated or predicted text instead of multiple choice.
    loglikelihoods, tokens : tuple of tuple
        For multiple choice, log-likelihoods in nats and numbers of scored tokens, by item and choice.

    Examples
    --------
    >>> TaskResult({"arc": {"acc": (0.75, 0.25)}}, metric="acc", scores=(1.0, 1.0, 0.0, 1.0)).accuracy
    0.75
    """

    metrics: dict[str, dict[str, tuple[float, float | None]]]
    items: dict[str, int] = field(default_factory=dict)
    few_shot: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    metric: str = ""
    scores: tuple[float, ...] = ()
    chance: float = 0.0
    generates: bool = False
    loglikelihoods: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def accuracy(self) -> float:
        """Mean of the scores; NaN without scores."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy; NaN for fewer than two items."""
        return float(np.std(self.scores, ddof=1)) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else math.nan


def _exclude_own_answers(task: Any) -> None:
    """Name the test split as the source of examples if lm-eval uses it because there is no other.

    lm-eval leaves the question itself out of its examples only if the names of both splits are equal.
    """
    examples: Any = getattr(task, "fewshot_cfg", None)
    is_default = examples is not None and examples.split is None and examples.samples is None
    if is_default and task.has_test_docs() and not (task.has_training_docs() or task.has_validation_docs()):
        task.set_config("fewshot_split", task.config.test_split)
        examples.split = task.config.test_split


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[TaskSource], settings: TaskSettings | None = None
) -> dict[str, TaskResult]:
    """Evaluate a model on lm-eval tasks, with the same results as lm-eval's command line for the same seeds.

    Few-shot examples are chosen by the seed of the settings; the command line's ``--seed`` for them is 1234 by default.
    The model may be inside an open `LayerSurgeon` or `PromptSkip`; the contexts of multiple-choice tasks are then
    prompts that skip blocks. Model, tokenizer and random states are restored.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of the model.
    tasks : sequence of str, Path or mapping
        Names of lm-eval tasks, groups or tags; task files (YAML) or folders of task files; task configs; or data files
        in the layout of a known benchmark (see `task_config_from_file`).
    settings : TaskSettings, optional
        Number of items, few-shot examples and batch size.

    Returns
    -------
    dict of str to TaskResult
        By task or group.

    Raises
    ------
    NotFiniteLikelihood
        If a log-likelihood is not finite.
    StreamlineError
        If lm-eval is not installed, or a task is unknown or invalid.

    Examples
    --------
    >>> result = run_tasks(model, tokenizer, ["arc_easy"], TaskSettings(items=100))  # doctest: +SKIP
    >>> result["arc_easy"].accuracy  # doctest: +SKIP
    0.58
    """
    settings = settings or TaskSettings()
    loaded = load_tasks(tasks, settings)
    return {name: task.run(model, tokenizer) for name, task in loaded.items()}


class LoadedTask:
    """Task or group of lm-eval with its data, as returned by ``TaskManager.load``; it can run on several models."""

    def __init__(self, name: str, loaded: dict[str, Any], settings: TaskSettings) -> None:
        self.name, self.settings, self._loaded = name, settings, loaded
        self.tasks: dict[str, Any] = loaded["tasks"]
        for task in self.tasks.values():
            if settings.few_shot is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", settings.few_shot)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            _exclude_own_answers(task)
        self._chosen = {
            name: random_subset(list(range(len(task.eval_docs))), settings.items, f"{settings.seed} {name}")
            for name, task in self.tasks.items()
        }

    def questions(self) -> list[str]:
        """Return the text, the choices and the answer of each item, without ids and other fields of its document."""
        return [_question(task, doc) for name, task in self.tasks.items() for doc in self._documents(name)]

    def _documents(self, name: str) -> list[Any]:
        docs = self.tasks[name].eval_docs  # each access processes the documents again
        return [docs[k] for k in self._chosen[name]]

    def digest(self) -> str:
        """Return a digest of config, data, settings and the version of lm-eval, for caches."""
        texts = [version("lm_eval"), repr(self.settings)]
        for name, task in self.tasks.items():
            texts += [name, repr({key: value for key, value in task.dump_config().items() if key != "custom_dataset"})]
            texts += map(repr, self._documents(name))
            if task.get_config("num_fewshot"):
                texts += map(repr, task.fewshot_docs() or ())
        return texts_digest(texts)

    def run(self, model: nn.Module, tokenizer: Any) -> TaskResult:
        """Evaluate a model; see `run_tasks`."""
        from lm_eval.evaluator import evaluate
        from transformers import PreTrainedTokenizerBase

        if not hasattr(model, "config") or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise StreamlineError(
                f"run_tasks received a {type(model).__name__} and a {type(tokenizer).__name__}. Expected a model and a "
                "tokenizer of Transformers, which lm-eval requires. Pass these."
            )
        seed, device = self.settings.seed, device_of(model).type
        # HFLM enters torch.autocast itself, and without a dtype disables it.
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with inference(model), _random_states(seed):
            with _quiet(), _restore_parameters(model):  # HFLM ties embeddings, which may have been untied after loading
                lm = _language_model()(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), add_bos_token=self.settings.add_bos,
                    batch_size=self.settings.batch_size, mixed_precision_dtype=autocast,
                )  # fmt: skip
            for task in self.tasks.values():
                task.set_fewshot_seed(seed)
            results = evaluate(lm, self._loaded, samples=None if self.settings.items is None else self._chosen)
        return self._result(results, lm.token_counts)

    def _result(self, results: dict[str, Any], token_counts: Mapping[tuple[str, str], int]) -> TaskResult:
        by_task = {}
        for name, samples in results["samples"].items():  # lm-eval lists an item once per filter
            by_task[name] = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
            _require_valid(name, self.tasks[name], by_task[name])
        items = [sample for samples in by_task.values() for sample in samples]
        chooses = all(task.OUTPUT_TYPE == "multiple_choice" for task in self.tasks.values())
        choices = [_choices(sample) for sample in items] if chooses else []
        return TaskResult(
            {name: metrics_of(values) for name, values in results["results"].items()},
            {name: int(count["effective"]) for name, count in results["n-samples"].items()},
            {name: int(count) for name, count in results["n-shot"].items()},
            {name: str(number) for name, number in results["versions"].items() if number is not None},
            *self._scores(items),
            _chance(by_task) if chooses else 0.0,
            not chooses,
            tuple(tuple(nats) for nats, _ in choices),
            tuple(tuple(token_counts[pair] for pair in pairs) for _, pairs in choices),
        )

    def _scores(self, items: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[float, ...]]:
        """Return the metric for comparisons, and the score of each item."""
        names = list(dict.fromkeys(name for sample in items for name in sample["metrics"]))
        higher = {name for task in self.tasks.values() for name, is_so in task.higher_is_better().items() if is_so}
        for metric in [self.settings.metric] if self.settings.metric in names else names:
            values = [sample.get(metric) for sample in items]
            if metric in higher and all(isinstance(value, Real) and 0 <= float(value) <= 1 for value in values):
                return metric, tuple(map(float, values))  # type: ignore[arg-type]
        return "", ()


def load_tasks(tasks: Sequence[TaskSource], settings: TaskSettings) -> dict[str, LoadedTask]:
    """Load tasks with their data, to run them on several models.

    Parameters
    ----------
    tasks : sequence of str, Path or mapping
        See `run_tasks`.
    settings : TaskSettings
        Number of items, few-shot examples and batch size.

    Returns
    -------
    dict of str to LoadedTask
        By task or group. ``LoadedTask.run(model, tokenizer)`` returns a `TaskResult`.

    Raises
    ------
    StreamlineError
        If lm-eval is not installed, or a task is unknown or invalid.

    Examples
    --------
    >>> task = load_tasks(["arc_easy"], TaskSettings(items=100))["arc_easy"]  # doctest: +SKIP
    >>> task.run(model, tokenizer).accuracy  # doctest: +SKIP
    0.58
    """
    if isinstance(tasks, (str, Mapping)) or not tasks:
        raise StreamlineError(f"tasks={tasks!r} is not a list. Expected a list of at least one task. Pass a list.")
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise StreamlineError(
            f"lm-eval cannot be imported ({error}). Expected the extra `tasks`, which tasks require. Install it: "
            'pip install "streamline_hooks[tasks]"'
        ) from error
    loaded_tasks: dict[str, LoadedTask] = {}
    for source in tasks:
        with _random_states(settings.seed), _quiet():
            loaded = _load(source)
        for name, content in loaded.items():
            if name in loaded_tasks:
                raise StreamlineError(f"Two tasks are named {name!r}. Expected distinct names. Rename a file or task.")
            loaded_tasks[name] = LoadedTask(name, content, settings)
    return loaded_tasks


def _load(source: TaskSource) -> dict[str, dict[str, Any]]:
    """Load the tasks of a source, keyed by task or top-level group."""
    from lm_eval.tasks import TaskManager

    if isinstance(source, Mapping):
        return _load_with(TaskManager(include_defaults=False), dict(source))
    path = Path(source).expanduser()
    if path.suffix in _YAML or path.is_dir():
        return _load_files(path)
    if str(source).startswith("hub:") or path.is_file() or path.suffix in _DATA:
        return _load_with(TaskManager(include_defaults=False), task_config_from_file(str(source)))
    manager = _lm_eval_tasks()
    if source not in manager.task_index:
        similar = ", ".join(difflib.get_close_matches(str(source), manager.all_tasks, _SUGGESTIONS))
        raise StreamlineError(
            f"The task {str(source)!r} is unknown. Expected a task of lm-eval {version('lm_eval')}, a task file (YAML) "
            "or a data file. " + (f"Similar names: {similar}." if similar else "`lm-eval ls tasks` lists all tasks.")
        )
    return _load_with(manager, str(source))


def _load_files(path: Path) -> dict[str, dict[str, Any]]:
    """Load a task file, or all tasks and groups in a folder."""
    from lm_eval.tasks import TaskManager

    folder = path if path.is_dir() else path.parent
    # Reading lm-eval's tasks takes seconds, and is needed only if the files refer to them.
    for include_defaults in (False, True):
        manager = TaskManager(include_path=str(folder), include_defaults=include_defaults)
        own = TaskManager(include_path=str(folder), include_defaults=False) if include_defaults else manager
        names = [*own.all_groups, *own.all_subtasks] if path.is_dir() else [str(path)]
        loaded: dict[str, dict[str, Any]] = {}
        try:
            for name in names:
                if not any(name in [*content["tasks"], *content["groups"]] for content in loaded.values()):
                    loaded |= _load_with(manager, name)
        except KeyError:
            continue
        if loaded:
            return loaded
    raise StreamlineError(
        f"{str(path)!r} contains no task, or refers to an unknown task. Expected task files (YAML). Check the files."
    )


def _load_with(manager: Any, task: str | dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        loaded = manager.load([task])
    except KeyError:
        raise
    except Exception as error:  # lm-eval and datasets raise many types for an invalid config or data
        name = task if isinstance(task, str) else task.get("task")
        raise StreamlineError(
            f"lm-eval cannot load {name} ({type(error).__name__}: {error}). Expected a valid task whose data is on "
            "this machine or on the hub. Check the task and the network."
        ) from error
    if loaded["groups"]:
        inside = {child for children in loaded["group_map"].values() for child in children}
        return {next(name for name in loaded["groups"] if name not in inside): loaded}
    return {name: {"tasks": {name: each}, "groups": {}, "group_map": {}} for name, each in loaded["tasks"].items()}


@functools.cache
def _lm_eval_tasks() -> Any:
    """Index lm-eval's tasks, more than ten thousand, once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@functools.cache
def _language_model() -> type:
    """Return a subclass of HFLM that counts scored tokens, limits the LM head to them, and marks skipped contexts."""
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.token_counts: dict[tuple[str, str], int] = {}
            self._skip = find_prompt_skip(self.model)
            self._unscored: dict[tuple[int, ...], int] = {}  # by tokens of a row, those before the first logits needed

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **settings: Any) -> Any:
            self.token_counts |= {pair: len(continuation) for pair, _, continuation in requests}
            for pair, _, continuation in requests:  # pair is None for a window of a document, which always fits
                if len(continuation) > self.max_length:
                    raise StreamlineError(
                        f"{pair[1][:80]!r}... has {len(continuation)} tokens. Expected no more than the model's "
                        f"{self.max_length} positions. Leave the item out."
                    )
            for _, context, continuation in requests:
                tokens = [*context, *continuation][-(self.max_length + 1) : -1]
                row, unscored = _without_padding(tokens), len(tokens) - len(continuation)
                self._unscored[row] = min(unscored, self._unscored.get(row, unscored))
            return super()._loglikelihood_tokens(requests, *args, **settings)

        def _model_call(self, inps: Tensor, *args: Any, **settings: Any) -> Any:
            if args or settings:  # the attention mask and labels of an encoder-decoder, whose continuation is apart
                return super()._model_call(inps, *args, **settings)
            unscored = [self._unscored[_without_padding(row)] for row in inps.tolist()]
            needed = logits_to_keep(self.model, inps.shape[1] - min(unscored))

            def limit_head(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, kwargs | needed

            with self.model.register_forward_pre_hook(limit_head, with_kwargs=True), ExitStack() as marked:
                if self._skip is not None:  # the last token of the context gives the first logits
                    counts = torch.tensor(unscored, device=inps.device) + 1 - self._skip.last_tokens
                    marks = torch.arange(inps.shape[1], device=inps.device) < counts[:, None]
                    marked.enter_context(self._skip.marked(marks))
                return super()._model_call(inps)

    return CountingLM


def _without_padding(tokens: Sequence[int]) -> tuple[int, ...]:
    """Leave out zeros at the end, with which lm-eval pads on the right."""
    count = len(tokens)
    while count and tokens[count - 1] == 0:
        count -= 1
    return tuple(tokens[:count])


def _question(task: Any, doc: Any) -> str:
    """Return the text, the choices and the answer of an item."""
    chooses = task.OUTPUT_TYPE == "multiple_choice"
    return repr((task.doc_to_text(doc), task.doc_to_choice(doc) if chooses else None, task.doc_to_target(doc)))


def metrics_of(values: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the value and standard error of each metric in the results of a task."""
    metrics = {}
    for key, value in values.items():
        metric, comma, by = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            error = values.get(f"{metric}_stderr,{by}")
            error = float(error) if isinstance(error, Real) else None
            metrics[metric if by == "none" else key] = (float(value), error)
    return metrics


def _choices(sample: Mapping[str, Any]) -> tuple[list[float], list[tuple[str, str]]]:
    """Return the log-likelihoods, and the contexts and continuations, of an item's choices."""
    pairs = [tuple(arguments[:2]) for arguments in sample["arguments"]]
    count = len(pairs) // 2 if "acc_mutual_info" in sample["metrics"] else len(pairs)  # it doubles the requests
    return [response[0] for response in sample["filtered_resps"]][:count], pairs[:count]


def _chance(by_task: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Return the accuracy of multiple choice without knowledge (see `TaskResult`), as a mean over the items."""
    alike: dict[tuple[str, ...], list[str]] = {}  # answers of the tasks whose items have these choices
    expected = []
    for samples in by_task.values():
        texts = [tuple(continuation for _, continuation in _choices(sample)[1]) for sample in samples]
        if len(set(texts)) == 1 and len(set(texts[0])) > 1:
            alike.setdefault(texts[0], []).extend(repr(sample["target"]) for sample in samples)
        else:
            expected += [1 / len(choices) for choices in texts]
    for choices, answers in alike.items():
        most = max(Counter(answers).values()) - 1  # most / len(answers) is too high for few items
        expected += [max(1 / len(choices), most / max(len(answers) - 1, 1))] * len(answers)
    return statistics.fmean(expected)


def _require_valid(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise an error if a log-likelihood is not finite, which lm-eval would score, or a target is not a choice."""
    for sample in samples:
        values = [each[0] if isinstance(each, (tuple, list)) else each for each in sample["filtered_resps"]]
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            raise NotFiniteLikelihood(
                f"{name}: the log-likelihoods of item {sample['doc_id']} are {values}. Expected finite numbers. Check "
                "the model's weights, or run in float32 or bfloat16."
            )
        target = sample["target"]
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or isinstance(target, list):
            continue
        choices = range(len(_choices(sample)[0])) if isinstance(target, int) else task.doc_to_choice(sample["doc"])
        if target not in choices:
            raise StreamlineError(
                f"{name}: the answer of item {sample['doc_id']} is {target!r}. Expected one of its {len(choices)} "
                "choices, counted from 0. Correct the answer, or use a split with public answers."
            )


@contextmanager
def _random_states(seed: int) -> Iterator[None]:
    """Seed the random number generators, and restore them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of lm-eval about default task configs and models in memory."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _restore_parameters(model: nn.Module) -> Iterator[None]:
    """Restore parameters that are replaced in the context."""
    owners = [(owner, name, parameter) for owner in model.modules() for name, parameter in owner._parameters.items()]
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            if owner._parameters.get(name) is not parameter:
                owner._parameters[name] = parameter

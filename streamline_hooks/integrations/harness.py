"""Run tasks of EleutherAI's lm-eval on a model in memory."""

from __future__ import annotations

import copy
import difflib
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference

_PACKAGES = ("streamline_hooks", "lm_eval", "transformers")
_NEAR = 5


@dataclass(frozen=True)
class Measured:
    """A number, and how sure it is.

    Attributes
    ----------
    value : float
    standard_error : float or None
        None where lm-eval gives none, as for perplexities.
    """

    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.4f}")


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval measured.

    Attributes
    ----------
    tasks : dict of str to dict of str to Measured
        By task, or group of tasks, and metric; a metric behind a filter of the task is called ``metric,filter``.
    items : dict of str to int
        How many documents a task was measured on.
    few_shot : dict of str to int
        Examples before each question. A task that fixes its own number keeps it, whatever was asked for.
    task_versions : dict of str to str
    packages : dict of str to str
        The versions of what took part.

    Examples
    --------
    >>> result = HarnessResult({"copa": {"acc": Measured(0.75, 0.0435)}}, {"copa": 100}, {"copa": 0}, {"copa": "1.0"})
    >>> result.tasks["copa"]["acc"].value
    0.75
    >>> print(result.table())
    task  metric            value  items  few-shot  version
    copa  acc     0.7500 ± 0.0435    100         0      1.0
    """

    tasks: dict[str, dict[str, Measured]]
    items: dict[str, int] = field(default_factory=dict)
    few_shot: dict[str, int] = field(default_factory=dict)
    task_versions: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The result for a terminal, a line a metric."""
        rows: list[tuple[str, ...]] = [("task", "metric", "value", "items", "few-shot", "version")]
        for task, metrics in self.tasks.items():
            of_task = [str(known.get(task, "")) for known in (self.items, self.few_shot, self.task_versions)]
            rows += [(task, metric, str(measured), *of_task) for metric, measured in metrics.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_aligned(row, widths) for row in rows)


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    add_bos: bool | None = None,
    seed: int = 0,
) -> HarnessResult:
    """Measure a model by tasks of lm-eval, as its own command line would.

    The model is run as it is, with its splices, and inside an open `LayerSurgeon` as well. It comes back as it was, and
    so do the tokenizer and the states of the random number generators.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : sequence of str
        Names of tasks, groups or tags. lm-eval gets the data of most of its own from the hub.
    task_folder : str or Path, optional
        A folder with task files (YAML) of your own, at any depth; they go before lm-eval's. Relative ``data_files`` in
        them are looked for from the working directory.
    limit : int, optional
        Documents of each task, the first ones; all by default.
    few_shot : int, optional
        Examples before each question; by default what the task says, or none.
    batch_size : int
    add_bos : bool, optional
        Whether texts begin with the tokenizer's special tokens; by default what the tokenizer does. With a tokenizer
        that puts a BOS in front, perplexities of whole documents count it as a token that is predicted; False avoids
        that.
    seed : int
        For everything that is drawn.

    Returns
    -------
    HarnessResult

    Raises
    ------
    StreamlineError
        If lm-eval is not installed, a task is unknown (the text names those nearby) or its data cannot be read, or the
        model is none of Transformers.

    Examples
    --------
    >>> result = run_harness(model, tokenizer, ["arc_easy", "piqa"], limit=100)  # doctest: +SKIP
    >>> print(result.table())  # doctest: +SKIP
    """
    evaluate, language_model, task_manager = _lm_eval()
    _check(model, tokenizer, tasks, limit, few_shot, batch_size)
    manager = _manager_of(tasks, task_folder, task_manager)
    with inference(model), _random_states_kept():
        with _parameters_kept(model):
            given = {"pretrained": model, "tokenizer": copy.deepcopy(tokenizer), "add_bos_token": add_bos}
            wrapped = language_model(**given, batch_size=batch_size)
        try:
            found = evaluate(
                wrapped,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:  # what datasets raises, without the network too
            raise StreamlineError(
                f"lm-eval cannot read the data of {', '.join(tasks)}: {error} Its own tasks take it from the hub; "
                "tasks in task_folder may name data_files that are here."
            ) from error
    return HarnessResult(
        {task: metrics_of(values) for task, values in found["results"].items()},
        {task: int(count["effective"]) for task, count in found["n-samples"].items()},
        {task: int(count) for task, count in found["n-shot"].items()},
        {task: str(known) for task, known in found["versions"].items() if known is not None},
        {**{name: version(name) for name in _PACKAGES}, "torch": torch.__version__},  # which names its CUDA too
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [
        cell.rjust(width) if k > 1 else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _lm_eval() -> tuple[Any, Any, Any]:
    """What is used of lm-eval; its import takes seconds."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise StreamlineError(
            f'Running tasks of lm-eval needs what is not installed: {error}. Install it: pip install "streamline_hooks'
            '[harness]"'
        ) from error
    return simple_evaluate, HFLM, TaskManager


def _check(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None, few_shot: int | None, batch_size: int
) -> None:
    from transformers import PreTrainedTokenizerBase

    if not hasattr(model, "config") or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise StreamlineError(
            f"Got a {type(model).__name__} and a {type(tokenizer).__name__}; lm-eval runs a model and a tokenizer of "
            "Transformers."
        )
    if isinstance(tasks, str) or not tasks:
        raise StreamlineError(f"The tasks are {tasks!r}; expected a list with the name of one at least.")
    if batch_size < 1 or (limit is not None and limit < 1) or (few_shot is not None and few_shot < 0):
        raise StreamlineError(
            f"Got batch_size={batch_size}, limit={limit}, few_shot={few_shot}; expected 1 or more, 1 or more, and 0 or "
            "more."
        )


def _manager_of(tasks: Sequence[str], task_folder: str | Path | None, task_manager: Any) -> Any:
    """What finds the tasks: the folder alone, where it has all of them, since reading lm-eval's own takes seconds."""
    given: dict[str, Any] = {}
    known: set[str] = set()
    if task_folder is not None:
        folder = Path(task_folder).expanduser()
        if not folder.is_dir():
            raise StreamlineError(f"There is no folder {str(task_folder)!r}; give one with task files (YAML).")
        given = {"include_path": str(folder)}
        alone = task_manager(**given, include_defaults=False)
        if set(tasks) <= set(alone.all_subtasks):  # a group may be of tasks that lm-eval brings
            return alone
        known.update(alone.all_tasks)
    own = _own_tasks(task_manager)
    known.update(own.all_tasks)
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, sorted(known), _NEAR)
            said = f"Nearby are {', '.join(near)}." if near else "`lm-eval ls tasks` lists all."
            where = "" if task_folder is None else f" or {str(task_folder)!r}"
            raise StreamlineError(f"There is no task {task!r} in lm-eval {version('lm_eval')}{where}. {said}")
    return task_manager(**given) if given else own


@functools.cache
def _own_tasks(task_manager: Any) -> Any:
    """What finds lm-eval's own tasks, of which there are more than ten thousand."""
    return task_manager()


def metrics_of(values: dict[str, Any]) -> dict[str, Measured]:
    """The metrics among what lm-eval says of a task; it calls them "metric,filter" and "metric_stderr,filter"."""
    found = {}
    for key, value in values.items():
        metric, comma, by = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            error = values.get(f"{metric}_stderr,{by}")
            named = metric if by == "none" else key
            found[named] = Measured(float(value), float(error) if isinstance(error, Real) else None)
    return found


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Give the generators, which lm-eval seeds, back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Undo that lm-eval ties the embeddings of what it is given, which may have been untied since it was loaded."""
    owners = [(owner, name, parameter) for owner in model.modules() for name, parameter in owner._parameters.items()]
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            if owner._parameters.get(name) is not parameter:
                owner._parameters[name] = parameter

"""Compress one model in many ways, and compare loss, size and speed of the results."""

from __future__ import annotations

import copy
import csv
import io
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Bound,
    Config,
    StreamlineError,
    TrainingInterrupted,
    UnsupportedSurgery,
    autocast_dtype,
    batches_digest,
    function_texts,
    get_logger,
    model_digest,
    prepare_inputs,
    table,
    texts_digest,
    tokenizer_digest,
    validate_arguments,
)
from streamline_hooks.data import PackedText, TokenSplit
from streamline_hooks.evaluation import (
    PHASES,
    ResultCache,
    TimedModel,
    max_prompt_tokens,
    measure_speed,
    synchronize,
)
from streamline_hooks.modeling import Task, inference
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.config import CompressionConfig, EvaluationConfig, RunOptions
from streamline_hooks.pipeline.prepare import CompressionData, are_batches, parts_of
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection import Combination, Criterion, Target
from streamline_hooks.statistics import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)

_TIMED_NEW = 16
_WITHOUT_PERPLEXITY = ("distance", "measure", "accuracy", "original_accuracy")  # fields for models without a perplexity
_RATIOS = {"size": "parameters_ratio", "prefill": "prefill_ratio", "decode": "decode_ratio"}


@dataclass(frozen=True)
class SweepPoint:
    """Measurements of one compressed model, relative to the original.

    Attributes
    ----------
    remove, kind : str
        The requested target and replacement.
    blocks_text : str
        The removed blocks.
    removed : int or None
        Difference in the number of blocks.
    perplexity_ratio : float or None
        Perplexity divided by that of the original, on the test text.
    parameters_ratio : float or None
        Parameters divided by those of the original.
    prefill_ratio, decode_ratio : float or None
        Time of a prompt and of a further token, divided by those of the original. For a model that does not generate
        text, `prefill_ratio` is the time ratio of one test batch, and `decode_ratio` is None.
    refused : str
        The reason if the model could not be compressed, else empty.
    distance : float or None
        For a model without a perplexity, the distance of its outputs from the original's on the test data: KL, or one
        minus the cosine for embeddings.
    measure : str
        Name of `distance`, see `Task.distance`.
    accuracy, original_accuracy : float or None
        Accuracies of both models, if the test batches of a classifier have labels.
    """

    remove: str
    kind: str
    blocks_text: str = ""
    removed: int | None = None
    perplexity_ratio: float | None = None
    parameters_ratio: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    refused: str = ""
    distance: float | None = None
    measure: str = ""
    accuracy: float | None = None
    original_accuracy: float | None = None

    @property
    def loss(self) -> float | None:
        """The perplexity ratio, or the distance for a model without a perplexity."""
        return self.distance if self.perplexity_ratio is None else self.perplexity_ratio


@dataclass(frozen=True)
class Sweep:
    """Measurements of several compressed models of one original.

    Attributes
    ----------
    points : tuple of SweepPoint
        One point per combination of target and replacement.

    Examples
    --------
    >>> from streamline_hooks.pipeline.sweep import SweepPoint
    >>> found = Sweep((SweepPoint("2", "none", "1, 2", 2, 1.5, 0.8), SweepPoint("2", "linear", "1, 2", 2, 1.2, 0.9)))
    >>> worse = SweepPoint("3", "none", "1 to 3", 3, 1.6, 0.8)
    >>> [point.kind for point in Sweep((*found.points, worse)).front()]
    ['none', 'linear']
    """

    points: tuple[SweepPoint, ...]

    def front(self, by: str = "size") -> list[SweepPoint]:
        """Return the points on the Pareto front of loss and size, or of loss and time.

        A point is on the front if no other point, and not the original, is at least as good in both and better in one.

        Parameters
        ----------
        by : {"size", "prefill", "decode"}
            Parameters, or the time of a prompt or of a further token.

        Returns
        -------
        list of SweepPoint

        Raises
        ------
        StreamlineError
            If `by` is unknown.
        """
        if by not in _RATIOS:
            raise StreamlineError(f"by={by!r} is unknown. Expected one of {', '.join(_RATIOS)}. Choose one of them.")
        have = [(p, cost, p.loss) for p in self.points if (cost := getattr(p, _RATIOS[by])) is not None]
        known = [(p, cost, loss) for p, cost, loss in have if loss is not None and math.isfinite(loss)]
        original = (1.0, 0.0 if any(p.distance is not None for p in self.points) else 1.0)
        rivals = [original, *((cost, loss) for _, cost, loss in known)]
        return [p for p, cost, loss in known if not any(_dominates(rival, (cost, loss)) for rival in rivals)]

    def report(self) -> dict[str, Any]:
        """Return all points as JSON values, with the fronts they are on."""
        fronts = {by: self.front(by) for by in _RATIOS}
        points = [
            {name: getattr(p, name) for name in self._columns()}
            | {"name": f"{p.kind}, {p.remove}", "front": [by for by, on in fronts.items() if p in on]}
            for p in self.points
        ]
        return {"points": points}

    def _columns(self) -> list[str]:
        """Return the fields to report; `_WITHOUT_PERPLEXITY` only if a point uses them."""
        without = () if any(p.measure for p in self.points) else _WITHOUT_PERPLEXITY
        return [field.name for field in fields(SweepPoint) if field.name not in without]

    def csv(self) -> str:
        """Return the points as CSV, with a header."""
        rows = self.report()["points"]
        out = io.StringIO()
        names = [*self._columns(), "front"]
        writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([row | {"front": " ".join(row["front"])} for row in rows])
        return out.getvalue()

    def table(self) -> str:
        """Return the points as a table for a terminal; a star marks the front by size."""
        front, rows = self.front(), []
        measure = next((p.measure for p in self.points if p.measure), "")
        labeled = any(p.accuracy is not None for p in self.points)
        for p in self.points:
            numbers = [p.loss, *[p.accuracy] * labeled, p.parameters_ratio, p.prefill_ratio]
            numbers += [] if measure else [p.decode_ratio]
            cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
            rows.append((p.kind + (" *" if p in front else ""), p.remove, *cells, p.refused or p.blocks_text))
        loss, times = measure or "perplexity x", ["batch x"] if measure else ["prompt x", "token x"]
        head = [
            "kind",
            "remove",
            loss,
            *["accuracy"] * labeled,
            "parameters x",
            *times,
            "removed, or reason for refusal",
        ]
        return table(rows, head)


@dataclass(frozen=True)
class SpeedConfig(Config):
    """Measurement of the speed of a compressed model, in turn with the original.

    Attributes
    ----------
    prompt_tokens : int
        Tokens of the prompt, at most the positions of the model. 512 by default.
    repeats : int
        Number of repetitions, of which the median ratio is reported. 7 by default.

    Examples
    --------
    >>> from streamline_hooks.pipeline import SpeedConfig
    >>> SpeedConfig(prompt_tokens=64)
    SpeedConfig(prompt_tokens=64, repeats=7)
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"prompt_tokens": 1, "repeats": 1}

    prompt_tokens: int = 512
    repeats: int = 7


@validate_arguments()
def sweep(
    model: PreTrainedModel,
    data: CompressionData,
    config: CompressionConfig | None = None,
    *,
    remove: Sequence[Target | int | float],
    repair: Sequence[ReplacementConfig],
    tokenizer: PreTrainedTokenizerBase | None = None,
    speed: SpeedConfig | None = SpeedConfig(),
    cache_file: str | Path | None = None,
) -> Sweep:
    """Compress copies of a model with every combination of targets and replacements.

    All compressions share one profile. With a `cache_file`, an interrupted sweep resumes, and a larger sweep computes
    only the new points.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, which is not changed. A copy is in memory as well.
    data : sequence of str, datasets.Dataset, TokenSplit, batches, or mapping of parts
        Data as for `compress`. Models without a perplexity are compared by the distance of their outputs from the
        original's and by their accuracy.
    config : CompressionConfig, optional
        The common config of all compressions. Its `remove`, `repair` and `evaluation` are replaced.
    remove : sequence of Target, int or float
        The targets.
    repair : sequence of ReplacementConfig
        The replacements.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizer for documents. Batches need none.
    speed : SpeedConfig, optional
        How to measure speed. None measures no speed.
    cache_file : str or Path, optional
        A JSON file for the results. They are identified by the model, the tokenizer, the data, the config and, with
        `speed`, the device.

    Returns
    -------
    Sweep
        The points, including those whose surgery was refused.

    Raises
    ------
    StreamlineError
        If `remove` or `repair` is empty, or `compress` raises.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import LinearConfig, sweep
    >>> from streamline_hooks.repair import NoneConfig
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> data = {"calibration": batches[:8], "validation": batches[8:10], "test": batches[10:]}
    >>> result = sweep(tiny_model("llama"), data, remove=[2], repair=[NoneConfig(), LinearConfig()], speed=None)
    >>> [(point.kind, point.removed) for point in result.points]
    [('none', 2), ('linear', 2)]
    """
    if not remove or not repair:
        raise StreamlineError(
            f"sweep: got {len(remove)} targets and {len(repair)} replacements. Expected at least one of each. Pass "
            "remove=[0.25] and repair=[LinearConfig()], for example."
        )
    common = replace(config or CompressionConfig(), evaluation=EvaluationConfig(speed=False, generation=False))
    if common.at_most is not None:
        raise StreamlineError(
            f"sweep: the config has at_most={dict(common.at_most)}. Expected none, because every depth is a row. Leave "
            "it out, and compress with at_most."
        )
    configs = [replace(common, remove=target, repair=replacement) for target in remove for replacement in repair]
    parts = parts_of(data)
    if isinstance(parts, Mapping) and not are_batches(parts):
        parts = TokenSplit.of_packed(cast("Mapping[str, PackedText]", parts))
    cache = ResultCache(Path(cache_file) if cache_file is not None else None)
    generates = (common.task or Task.of(model)).is_causal_lm
    tokens = max_prompt_tokens(model, _TIMED_NEW, speed.prompt_tokens) if speed and generates else 0
    timed = (tokens, speed.repeats) if speed else None
    cache_key = (
        [] if cache_file is None else [*_cache_key(model, tokenizer, parts), timed and (*timed, *_device_names(model))]
    )
    compressor = _Compressor(model, tokenizer, parts, timed)
    points = []
    for point_config in configs:
        logger.info(f"{point_config.repair}, {point_config.target}")
        key = [*cache_key, point_config.to_dict(), *_criterion_digests(point_config)]
        points.append(cache.get(SweepPoint, key, partial(compressor.point, point_config))[0])
    return Sweep(tuple(points))


@dataclass
class _Compressor:
    """Compress copies of a model, with one profile for all."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: Any
    timed: tuple[int, int] | None
    profile: Profile | None = None

    def point(self, config: CompressionConfig) -> SweepPoint:
        point, changed = SweepPoint(str(config.target), str(config.repair)), copy.deepcopy(self.model)
        profile = None if config.rounds > 1 else self.profile
        try:
            result = compress(changed, self.data, config, tokenizer=self.tokenizer, options=RunOptions(profile=profile))
            if result.training is not None and result.training.interrupted:
                raise TrainingInterrupted(
                    f"Interrupted at {config.repair}, {config.target}. Earlier points are kept in cache_file, if it is "
                    "set. Run the sweep again to continue."
                )
        except UnsupportedSurgery as refusal:
            return replace(point, refused=str(refusal))
        self.profile = result.profile
        perplexities, (before, after) = result.perplexities, result.parameters
        last = next(name for name in ("trained", "repaired", "removed") if name in (perplexities or result.scores))
        point = replace(
            point,
            blocks_text=result.candidates[0].blocks_text,
            removed=result.plan.old_length - len(result.plan.slots),
            perplexity_ratio=perplexities[last] / perplexities["original"] if perplexities else None,
            parameters_ratio=after / before,
        )
        if result.scores:
            scores = result.scores[last]
            point = replace(
                point,
                distance=scores["kl"] if result.task.gives_distributions else 1.0 - scores["cosine"],
                measure=result.task.distance,
                accuracy=scores.get("accuracy"),
                original_accuracy=result.scores["original"].get("accuracy"),
            )
        if self.timed is None:
            return point
        if not result.task.is_causal_lm:
            return replace(point, prefill_ratio=_time_ratio(self.model, changed, self.data["test"][0], self.timed[1]))
        models: dict[str, TimedModel] = {"original": self.model, "compressed": changed}
        report = measure_speed(models, tokens=self.timed[0], new_tokens=_TIMED_NEW, repeats=self.timed[1])
        prefill, decode = (report.ratio("compressed", phase).median for phase in PHASES)
        return replace(point, prefill_ratio=prefill, decode_ratio=decode)


def _time_ratio(original: nn.Module, changed: nn.Module, batch: Batch | Tensor, repeats: int) -> float:
    """Return the median time ratio of a changed model and its original on a batch, run in turn."""
    ratios = []
    for number in range(repeats + 1):
        durations = []
        for model in (changed, original):
            inputs = prepare_inputs(model, batch)
            with inference(model):
                synchronize(model)
                began = time.perf_counter()
                model(**inputs)
                synchronize(model)
            durations.append(time.perf_counter() - began)
        if number:  # the first run is a warm-up
            ratios.append(durations[0] / durations[1])
    return statistics.median(ratios)


def _cache_key(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
) -> list[Any]:
    """Return digests that identify the results of a sweep together with the config."""
    if isinstance(data, Mapping):
        digests = [batches_digest([data[name] for name in sorted(data)])]
    elif isinstance(data, TokenSplit):
        digests = [tokenizer_digest(tokenizer, ()), batches_digest(data.tensors)]
    else:
        digests = [tokenizer_digest(tokenizer, data), texts_digest(data)]
    return [model_digest(model), autocast_dtype(model), *digests, []]


def _device_names(model: nn.Module) -> list[str]:
    """Return the type and name of each device of a model."""
    cpu = platform.processor() or platform.machine()
    devices = sorted({parameter.device for parameter in model.parameters()}, key=str)
    return [
        f"{device.type} {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}" for device in devices
    ]


def _criterion_digests(config: CompressionConfig) -> list[str]:
    """Return the source and digests of the data of the config's criteria, which are not part of their names."""

    def digests(criterion: Criterion) -> Iterator[str]:
        if isinstance(criterion, Combination):
            for part, _ in criterion.parts:
                yield from digests(part)
        else:
            if criterion.made_of is not None:
                yield criterion.made_of()
            yield from function_texts(criterion.score)

    return list(digests(config.search.resolved_criterion))


def _dominates(point: tuple[float, float], rival: tuple[float, float]) -> bool:
    return point != rival and point[0] <= rival[0] and point[1] <= rival[1]

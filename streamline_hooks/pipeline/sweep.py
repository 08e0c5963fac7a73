"""The same model compressed in many ways: what each keeps, how large and fast it is, and which are worth having."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.arguments import checked
from streamline_hooks.calibration import PackedText, TokenSplit
from streamline_hooks.core.tables import table
from streamline_hooks.digests import autocast_dtype, batches_digest, model_digest, texts_digest, tokenizer_digest
from streamline_hooks.errors import StreamlineError, TrainingInterrupted, UnsupportedSurgery
from streamline_hooks.evaluation import measure_speed
from streamline_hooks.evaluation.result_cache import ResultCache
from streamline_hooks.evaluation.speed import PHASES, Timed, room_for_prompt
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.config import CompressionConfig, EvaluationConfig
from streamline_hooks.preparation import are_batches
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection import Target
from streamline_hooks.selection.criteria import Combination
from streamline_hooks.statistics import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TIMED_NEW = 16
_ORIGINAL = (1.0, 1.0)  # its size or time, and its perplexity, as ratios
_PLACES = {"size": "parameters_ratio", "prefill": "prefill_ratio", "decode": "decode_ratio"}


@dataclass(frozen=True)
class Point:
    """One compressed model beside its original.

    Attributes
    ----------
    remove, kind : str
        What was asked for.
    gone : str
        The blocks that went.
    removed : int or None
        How many fewer blocks there are.
    perplexity_ratio : float or None
        To the original, on text that nothing was chosen or fitted on.
    parameters_ratio : float or None
        What is left of the parameters.
    prefill_ratio, decode_ratio : float or None
        Time of a prompt and of a further token as a fraction of the original's, measured in turn.
    refused : str
        Why there is no such model; empty where there is one.
    """

    remove: str
    kind: str
    gone: str = ""
    removed: int | None = None
    perplexity_ratio: float | None = None
    parameters_ratio: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Sweep:
    """Several compressed models of one original.

    Attributes
    ----------
    points : tuple of Point

    Examples
    --------
    >>> found = Sweep((Point("2", "none", "1, 2", 2, 1.5, 0.8), Point("2", "linear", "1, 2", 2, 1.2, 0.9)))
    >>> worse = Point("3", "none", "1 to 3", 3, 1.6, 0.8)
    >>> [point.kind for point in Sweep((*found.points, worse)).front()]
    ['none', 'linear']
    """

    points: tuple[Point, ...]

    def front(self, by: str = "size") -> list[Point]:
        """Return the points on the Pareto front of perplexity and size, or of perplexity and time.

        A point is on it if neither the original nor another point is at least as good in both and better in one.

        Parameters
        ----------
        by : {"size", "prefill", "decode"}

        Raises
        ------
        StreamlineError
            If `by` is another word.
        """
        if by not in _PLACES:
            raise StreamlineError(f"by={by!r} is not known; expected one of {', '.join(_PLACES)}.")
        have = [(p, cost, p.perplexity_ratio) for p in self.points if (cost := getattr(p, _PLACES[by])) is not None]
        known = [(p, cost, loss) for p, cost, loss in have if loss is not None and math.isfinite(loss)]
        rivals = [_ORIGINAL, *((cost, loss) for _, cost, loss in known)]
        return [p for p, cost, loss in known if not any(_beats(rival, (cost, loss)) for rival in rivals)]

    def report(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        fronts = {by: self.front(by) for by in _PLACES}
        points = [
            asdict(p) | {"name": f"{p.kind}, {p.remove}", "front": [by for by, on in fronts.items() if p in on]}
            for p in self.points
        ]
        return {"points": points}

    def csv(self) -> str:
        """A line a point, under a line of names."""
        rows = self.report()["points"]
        out = io.StringIO()
        names = [*(field.name for field in fields(Point)), "front"]
        writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([row | {"front": " ".join(row["front"])} for row in rows])
        return out.getvalue()

    def table(self) -> str:
        """For a terminal; a star marks the front by size."""
        front, rows = self.front(), []
        for p in self.points:
            numbers = [p.perplexity_ratio, p.parameters_ratio, p.prefill_ratio, p.decode_ratio]
            cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
            rows.append((p.kind + (" *" if p in front else ""), p.remove, *cells, p.refused or p.gone))
        return table(
            rows, ["kind", "remove", "perplexity x", "parameters x", "prompt x", "token x", "removed, or why not"]
        )


@checked(speed_tokens=1, repeats=1)
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText] | Mapping[str, Any],
    config: CompressionConfig | None = None,
    *,
    remove: Sequence[Target | int | float],
    repair: Sequence[ReplacementConfig],
    speed: bool = True,
    speed_tokens: int = 512,
    repeats: int = 7,
    keep_in: str | Path | None = None,
    profile: Profile | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Compress a model in many ways, each time a copy.

    One profile serves all of it. What has been measured is kept in a file, so that a sweep continues where it was
    interrupted, and one with more points makes only those.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is not changed; memory holds it twice.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str, TokenSplit or mapping
        Documents, or text that is divided or packed already, see `compress`.
    config : CompressionConfig, optional
        What all compressions have in common. Its `remove`, `repair` and `evaluation` are replaced.
    remove : sequence of Target, int or float
        How much to remove.
    repair : sequence of ReplacementConfig
        What replaces the blocks. Each is combined with each of `remove`.
    speed : bool
        Measure speed, beside the original and in turn.
    speed_tokens, repeats : int
        Tokens of the prompt (fewer if the model has fewer positions), and repetitions.
    keep_in : str or Path, optional
        A JSON file of what has been measured, by the model, the tokenizer, the text and the config.
    profile : Profile, optional
        Of this model, instead of a pass.
    say : callable
        Receives lines about what is done.

    Returns
    -------
    Sweep
        A refused surgery is a point too, which says why.

    Raises
    ------
    StreamlineError
        If there is nothing to sweep over, or `texts` are batches.
    """
    if not remove or not repair:
        raise StreamlineError(
            f"sweep: got {len(remove)} amounts and {len(repair)} replacements. Expected at least one of each. Give "
            "remove=[0.25] and repair=[LinearConfig()], for example."
        )
    common = replace(config or CompressionConfig(), evaluation=EvaluationConfig(speed=False, generation=False))
    configs = [replace(common, remove=amount, repair=one) for amount in remove for one in repair]  # raises here
    if are_batches(texts):
        raise StreamlineError(
            "A sweep compares perplexities of text and was given batches, which have none. Give documents, a "
            "TokenSplit or the parts of packed_text; call compress for each of another model's compressions."
        )
    if isinstance(texts, Mapping):
        texts = TokenSplit.of_packed(texts)
    cache = ResultCache(Path(keep_in) if keep_in is not None else None)
    timed = (room_for_prompt(model, _TIMED_NEW, speed_tokens), repeats) if speed else None
    known = [] if keep_in is None else [*_known(model, tokenizer, texts, profile), timed]
    compressor = _Compressor(model, tokenizer, texts, timed, say, profile)
    points = []
    for one in configs:
        say(f"{one.repair}, {one.target}")
        points.append(cache.get(Point, [*known, one.to_dict(), *_data_of(one)], partial(compressor.point, one))[0])
    return Sweep(tuple(points))


@dataclass
class _Compressor:
    """Compresses one copy after the other, with one profile for all."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str] | TokenSplit
    timed: tuple[int, int] | None
    say: Callable[[str], None]
    profile: Profile | None

    def point(self, config: CompressionConfig) -> Point:
        asked, changed = Point(str(config.target), str(config.repair)), copy.deepcopy(self.model)
        profile = None if config.rounds > 1 else self.profile
        try:
            result = compress(changed, self.tokenizer, self.texts, config, profile=profile, say=self.say)
            if result.training is not None and result.training.interrupted:
                raise TrainingInterrupted(
                    f"Interrupted at {config.repair}, {config.target}, which is not kept; points before it are. Sweep "
                    "again to continue."
                )
        except UnsupportedSurgery as refusal:
            return replace(asked, refused=str(refusal))
        self.profile = result.profile
        found, (before, after) = result.perplexities, result.parameters
        last = next(name for name in ("trained", "repaired", "removed") if name in found)
        made = replace(
            asked,
            gone=result.candidates[0].gone,
            removed=result.plan.old_length - len(result.plan.slots),
            perplexity_ratio=found[last] / found["original"],
            parameters_ratio=after / before,
        )
        if self.timed is None:
            return made
        models: dict[str, Timed] = {"original": self.model, "compressed": changed}
        report = measure_speed(models, tokens=self.timed[0], new_tokens=_TIMED_NEW, repeats=self.timed[1])
        prefill, decode = (report.ratio("compressed", phase).median for phase in PHASES)
        return replace(made, prefill_ratio=prefill, decode_ratio=decode)


def _known(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | TokenSplit,
    profile: Profile | None,
) -> list[Any]:
    """What points are known by, besides what was swept over."""
    return [
        model_digest(model),
        autocast_dtype(model),
        tokenizer_digest(tokenizer, () if isinstance(texts, TokenSplit) else texts),
        batches_digest(texts.tensors) if isinstance(texts, TokenSplit) else texts_digest(texts),
        [] if profile is None else [texts_digest([repr(profile.cosine.tolist())])],
    ]


def _data_of(config: CompressionConfig) -> list[str]:
    """Return digests of the data that the config's criteria hold, which their names do not tell."""
    criterion = config.search.resolved_criterion
    parts = [part for part, _ in criterion.parts] if isinstance(criterion, Combination) else [criterion]
    return [part.made_of() for part in parts if part.made_of is not None]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]

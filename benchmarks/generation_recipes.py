"""The recipes that `benchmarks.quality_generation` compares, each with one thing changed, and which rows there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.quality import STARTING
from benchmarks.real_text import SEQUENCE
from streamline_hooks import CompressionConfig, DistillationConfig, NoneConfig

SETTINGS = replace(CompressionConfig.preset("best").distillation or DistillationConfig(), validations=4)
BEST = CompressionConfig.preset("best", distillation=SETTINGS)
TWO_WINDOWS = CompressionConfig.preset("two-windows", distillation=SETTINGS)
COMMON = {  # the settings that all have, by the names of the first rows
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "betas",
    "warmup": "warmup_ratio",
    "floor": "min_lr_ratio",
    "clip": "max_grad_norm",
    "epochs": "epochs",
    "accumulation": "gradient_accumulation_steps",
    "validations": "validations",
}
_OF_HEALING = {"method": "how", "learning_rate_ratio": "rate"}  # likewise
SIZES = (8, 4)


@dataclass(frozen=True)
class Recipe:
    """How what is left is repaired; by default as the preset `best` does it.

    Attributes
    ----------
    config : CompressionConfig
        The replacement, the search, `DataConfig.repeated`, the distillation, the healing and the rounds; the run sets
        the rest. With several rounds, `compress` chooses each round's blocks itself, in the weights' precision.
    warm : bool
        Whether the replacement starts where least squares brings it, or as plain removal.
    text : {"documents", "own", "both"}
        Of others, conversations with the original itself, or one half of each.
    """

    config: CompressionConfig = BEST
    warm: bool = True
    text: str = "documents"

    @property
    def what(self) -> dict[str, str]:
        """All of it as strings, by the names of the first rows; a row with other values is of an earlier recipe."""
        config, trained = self.config, self.config.distillation
        healing = config.healing and {_OF_HEALING.get(name, name): v for name, v in asdict(config.healing).items()}
        criterion = config.search.criterion
        what = {
            "kind": str(config.repair),
            "warm": str(self.warm),
            "objective": "" if trained is None else str(trained.objective),
            "healing": str(healing),
            "on_policy": "",
            "text": self.text,
            "rounds": str(config.rounds),
            "search": config.search.kind,
            "criterion": "" if criterion is None else str(criterion),
            "repeated": str(config.data.repeated),
        }
        if trained is not None:
            what |= {name: str(getattr(trained, field)) for name, field in COMMON.items()}
        return what | ({"starting": str(self.starting)} if self.warm else {})

    @property
    def starting(self) -> float:
        """The share of the text that the least-squares start is fitted on: all of it where nothing is trained."""
        return 1.0 if self.config.distillation is None else STARTING


def _plain(config: CompressionConfig) -> CompressionConfig:
    return replace(config, repair=NoneConfig(), distillation=None, healing=None)


def _by(loss: Mapping[str, float]) -> CompressionConfig:
    return replace(BEST, distillation=replace(SETTINGS, loss=loss))


_ON_PROSE = replace(BEST, data=replace(BEST.data, repeated=0.0))
RECIPES: dict[str, Recipe] = {
    "removed": Recipe(_plain(BEST)),
    "removed, chosen on prose": Recipe(_plain(_ON_PROSE)),
    "removed, two windows": Recipe(_plain(TWO_WINDOWS)),
    "warm start alone": Recipe(replace(BEST, distillation=None, healing=None)),
    "best": Recipe(),
    "chosen on prose": Recipe(_ON_PROSE),
    "two windows": Recipe(TWO_WINDOWS),
    "without healing": Recipe(replace(BEST, healing=None)),
    "without the warm start": Recipe(warm=False),
    "KL alone": Recipe(_by({"kl": 1.0})),
    "own text and documents": Recipe(text="both"),
    "in two rounds": Recipe(replace(BEST, rounds=2)),
    "LM alone": Recipe(_by({"lm": 1.0})),
}
TRAINED = [name for name, recipe in RECIPES.items() if recipe.config.distillation is not None]
EARLIER = ["on policy"]  # its rows stay, though the library no longer trains that way
NEARLY = 0.9  # the same time
CURVE = (50_000, 200_000, 1_000_000)


@dataclass(frozen=True)
class Run:
    """One row."""

    recipe: str
    removed: int
    tokens: int
    seed: int = 0
    same_minutes: bool = False

    @property
    def key(self) -> str:
        return f"{self.recipe} | {self.removed} | {self.tokens} | {self.seed}" + " | minutes" * self.same_minutes


def plans(tokens: int, content: dict[str, Any]) -> dict[str, list[Run]]:
    """What there is to run, in parts that are asked for by name."""
    start = [Run(name, removed, tokens) for removed in SIZES for name in RECIPES if name not in TRAINED]
    first = {removed: [Run(name, removed, tokens) for name in TRAINED] for removed in SIZES}
    seeds = [replace(run, seed=seed) for seed in (1, 2) for removed in SIZES for run in first[removed]]
    minutes = [run for removed in SIZES for run in same_minutes(removed, tokens, content) if run.same_minutes]
    minutes = [run for run in minutes if run.recipe in RECIPES]
    curve = [Run("best", 8, count) for count in CURVE]
    best = [run for runs in first.values() for run in runs if run.recipe == "best"]
    others = {removed: [run for run in runs if run.recipe != "best"] for removed, runs in first.items()}
    return {
        "best": best, "start": start, "8": others[8], "4": others[4], "minutes": minutes, "curve": curve, "seeds": seeds
    }  # fmt: skip


def same_minutes(removed: int, tokens: int, content: dict[str, Any]) -> list[Run]:
    """The trained recipes on as many tokens as take the time that `best` took on its own, on a machine of one kind.

    A recipe that took it but for a tenth is there as it is; one whose usual row is not made yet is not there. Its time
    is its pace, see `Bench.measure_paces`, or, where it has none, what its row took, for each minute in which it was
    scored: that is the same work for all, and what else the machine does slows down both.
    """
    rows, found = content["rows"], []
    best = rows.get(Run("best", removed, tokens).key)
    for name in [*TRAINED, *EARLIER]:
        run = Run(name, removed, tokens)
        row = rows.get(run.key)
        if best is None or row is None or row["products"] != best["products"]:
            continue
        paces = content.get("paces", {}).get(row["products"], {}).get(str(removed), {})
        took = trained_in(best), trained_in(row)
        if name in paces:
            more = 1 / paces[name]
        elif took[0] is None or took[1] is None:
            continue
        else:
            more = took[0] / best["minutes"]["score"] / (took[1] / row["minutes"]["score"])
        if not NEARLY < more < 1 / NEARLY:
            run = replace(run, tokens=max(1, round(tokens * more / SEQUENCE)) * SEQUENCE, same_minutes=True)
        found.append(run)
    return found


def trained_in(row: dict[str, Any]) -> float | None:
    """The minutes of writing the text, if the original wrote it, and of training; None where one was interrupted."""
    text, train = row["minutes"].get("text", 0.0), row["minutes"]["train"]
    return None if text is None or train is None else float(text + train)

"""The recipes that `benchmarks.quality_generation` compares, each with one thing changed, and which rows there are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.quality import STARTING
from benchmarks.real_text import SEQUENCE
from streamline_hooks.repair import PRESETS, Healing, Training

BEST = PRESETS["best"]
SETTINGS = replace(BEST.training or Training(), validations=4)
COMMON = ("learning_rate", "weight_decay", "betas", "warmup", "floor", "clip", "epochs", "accumulation", "validations")
SIZES = (8, 4)


@dataclass(frozen=True)
class Recipe:
    """How what is left is repaired; by default as the preset `best` does it.

    Attributes
    ----------
    kind : str
    warm : bool
        Whether the stand-in starts where least squares brings it, or as plain removal.
    objective : str
        Empty where nothing is trained.
    healing : Healing or None
    on_policy : str
        See `OnPolicy.parse`; empty for none.
    text : {"documents", "own", "both"}
        Of others, conversations with the original itself, or one half of each.
    rounds : int
        See `compress_iteratively`, which chooses each round's blocks itself, in the weights' precision.
    search, criterion : str
        How the blocks that go are found, as in `compress`; an empty criterion for what is usual there.
    repeated : float
        The share of the sequences, of the text that the blocks are chosen on, whose second half repeats the first, see
        `with_repeated_passages`.
    """

    kind: str = BEST.kind
    warm: bool = True
    objective: str = str(SETTINGS.objective)
    healing: Healing | None = BEST.healing
    on_policy: str = ""
    text: str = "documents"
    rounds: int = 1
    search: str = BEST.search
    criterion: str = BEST.criterion
    repeated: float = BEST.repeated

    @property
    def what(self) -> dict[str, str]:
        """All of it, with how all are trained, by which a row of an earlier recipe of this name is told."""
        own = {name: str(value) for name, value in asdict(self).items()}
        common = {name: str(getattr(SETTINGS, name)) for name in COMMON}
        return {**own, **(common if self.objective else {}), **({"starting": str(self.starting)} if self.warm else {})}

    @property
    def starting(self) -> float:
        """The share of the text that the least-squares start is fitted on: all of it where nothing is trained."""
        return STARTING if self.objective else 1.0


_TWO = PRESETS["two-windows"]
_TWO_WINDOWS = Recipe(
    _TWO.kind,
    search=_TWO.search,
    criterion=_TWO.criterion,
    repeated=_TWO.repeated,
)
_PLAIN: dict[str, Any] = {"kind": "none", "objective": "", "healing": None}
RECIPES: dict[str, Recipe] = {
    "removed": Recipe(**_PLAIN),
    "removed, chosen on prose": Recipe(**_PLAIN, repeated=0.0),
    "removed, two windows": replace(_TWO_WINDOWS, **_PLAIN),
    "warm start alone": Recipe(objective="", healing=None),
    "best": Recipe(),
    "chosen on prose": Recipe(repeated=0.0),
    "two windows": _TWO_WINDOWS,
    "without healing": Recipe(healing=None),
    "without the warm start": Recipe(warm=False),
    "KL alone": Recipe(objective="kl"),
    "on policy": Recipe(on_policy="kl:begin=0.5,share=0.5"),
    "own text and documents": Recipe(text="both"),
    "in two rounds": Recipe(rounds=2),
    "LM alone": Recipe(objective="lm"),
}
TRAINED = [name for name, recipe in RECIPES.items() if recipe.objective]
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
    for name in TRAINED:
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

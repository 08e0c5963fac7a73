"""What each part of a repair keeps of classification and of generation, 4 and 8 of SmolLM2's 30 blocks gone.

    python -m benchmarks.quality_generation [--data FOLDER] [--plan NAME,...] [--tokens 100000] [--items 100]

One thing is changed at a time: how the blocks are chosen, where the repair starts, by which loss it is trained, on
which text, in how many rounds, and what is healed besides; all on the same number of training tokens, seen once, and
(the plan ``minutes``) on as many as take the processor time that `best` takes. The blocks are chosen once for all
seeds, on training text; the seed decides the text, the order of the batches and what a network starts from.
Classification is scored on the tasks of `benchmarks.quality`, generation as in `benchmarks.generation_scores`. Products
are in bfloat16 where the machine is fast in it and else in float32, and each row is held against the original in its
own precision. Minutes are the processor's own. A row goes to ``benchmarks/results/quality_generation.json`` as soon as
it is done, a training that was interrupted goes on where it was, and the tables go to
``benchmarks/results/quality_generation.md``. Two such commands share the rows between them.
"""

from __future__ import annotations

import copy
import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.generation_numbers import mean_of, summary
from benchmarks.generation_scores import Generation
from benchmarks.quality import CHOOSING, SHORTLIST, STARTING
from benchmarks.quality_scores import Quality, write
from benchmarks.real_text import RESULTS, ROOT, SEQUENCE, arguments
from benchmarks.short_answers import fast_products, products
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import compress_iteratively
from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import TokenSplit, self_generated, with_repeated_passages
from streamline_hooks.evaluation.retained import TaskAnswers, retained
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.repair import (
    PRESETS,
    Healing,
    Objective,
    OnPolicy,
    Student,
    Trained,
    Training,
    kind_named,
    student_of,
    train,
)
from streamline_hooks.selection import SearchProblem, find_selections, usual_criterion, windows
from streamline_hooks.selection.search import Selection, verified
from streamline_hooks.selection.search.selected import runs
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import profile

FILE = RESULTS / "quality_generation.json"
ORIGINAL = {
    "bfloat16": RESULTS / "quality_generation_original.json",
    "float32": RESULTS / "quality_generation_original_float32.json",
}
BEST = PRESETS["best"]
SETTINGS = replace(BEST.training or Training(), validations=4)
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
    learning_rate : float
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
    learning_rate: float = SETTINGS.learning_rate

    @property
    def what(self) -> dict[str, str]:
        """All of it, by which a row of an earlier recipe of this name is told."""
        return {name: str(value) for name, value in asdict(self).items()}


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
    "at a lower rate": Recipe(learning_rate=3e-4),
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
ON_TEXT = ("perplexity_ratio", "mean_perplexity_ratio", "kl", "top1")
CURVE = (50_000, 200_000, 1_000_000)
FAST = {"bfloat16": torch.bfloat16, "float32": None}[products()]


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


def plans(tokens: int, rows: dict[str, Any]) -> dict[str, list[Run]]:
    """What there is to run, in parts that are asked for by name."""
    start = [Run(name, removed, tokens) for removed in SIZES for name in RECIPES if name not in TRAINED]
    first = {removed: [Run(name, removed, tokens) for name in TRAINED] for removed in SIZES}
    seeds = [replace(run, seed=seed) for removed in SIZES for seed in (1, 2) for run in first[removed]]
    minutes = [run for removed in SIZES for run in same_minutes(first[removed], rows)]
    curve = [Run("best", 8, count) for count in CURVE]
    best = [run for runs in first.values() for run in runs if run.recipe == "best"]
    others = {removed: [run for run in runs if run.recipe != "best"] for removed, runs in first.items()}
    return {
        "best": best, "start": start, "8": others[8], "4": others[4], "minutes": minutes, "curve": curve, "seeds": seeds
    }  # fmt: skip


def same_minutes(runs: list[Run], rows: dict[str, Any]) -> list[Run]:
    """The same recipes on as many tokens as take the time that `best` took on its own, on a machine of one kind."""
    found = []
    best = rows.get(next(run.key for run in runs if run.recipe == "best"))
    for run in runs:
        row = rows.get(run.key)
        if best is None or row is None or run.recipe == "best" or row["products"] != best["products"]:
            continue
        tokens = run.tokens * best["minutes"]["train"] / row["minutes"]["train"]
        found.append(replace(run, tokens=max(1, round(tokens / SEQUENCE)) * SEQUENCE, same_minutes=True))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plan", default="best,start,8,4,minutes,curve,seeds", help="which rows, in their order")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=100, help="questions a task, the same for all but BLiMP")
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.plan.split(","):
        for run in plans(options.tokens, bench.rows)[name]:
            bench.row(run)
    print(table(bench.content))


class Bench:
    """The model twice, once to be changed, the questions, and the rows so far."""

    def __init__(self, options: Any) -> None:
        self.options, self.file = options, options.results
        original, self.tokenizer = load_pretrained("smollm2")
        self.original = original
        with fast_products(original):
            self.quality = Quality(
                original, self.tokenizer, options.data, items=options.items, cache=ORIGINAL[products()]
            )
        self.generation = Generation(original, self.tokenizer, options.data)
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.content = self.read()
        command = f"python -m benchmarks.quality_generation --tokens {options.tokens} --items {options.items}"
        about = {"command": command, "tokens": options.tokens, "items": options.items}
        own = {"classification": self.quality.original_row(), "generation": self.generation.original_row()}
        self.change(lambda content: content.update({**about, "originals": {**content["originals"], products(): own}}))

    @property
    def rows(self) -> dict[str, Any]:
        return dict(self.content["rows"])

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}, "blocks": {}, "originals": {}}

    def change(self, make: Any) -> None:
        """Change what is kept, which another process may have changed in between."""
        lock = ROOT / "build" / "quality_generation" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.content = self.read()
            make(self.content)
            write(self.file, self.content)
            self.file.with_suffix(".md").write_text(table(self.content))

    @contextmanager
    def taken(self, run: Run) -> Iterator[bool]:
        """Whether this process is the one to make a row; the other takes another."""
        file = ROOT / "build" / "quality_generation" / f"{run.key.replace(' ', '')}.taken"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            self.content = self.read()
            there = self.content["rows"].get(run.key)
            yield there is None or there["what"] != RECIPES[run.recipe].what

    def windows(self, removed: int, recipe: Recipe) -> tuple[range, ...]:
        """The blocks that go, chosen once for a number of them, a search and a kind of text."""
        by = f" by {recipe.criterion}" if recipe.criterion else ""
        name = f"{recipe.search}{by}" + (f", {recipe.repeated:.0%} repeated" if recipe.repeated else "")
        if f"{removed}, {name}" not in self.content["blocks"]:
            chosen = {f"{count}, {name}": blocks for count, blocks in self.searched(recipe)}
            self.change(lambda content: content["blocks"].update(chosen))
        return runs(self.content["blocks"][f"{removed}, {name}"])

    def searched(self, recipe: Recipe) -> Iterator[tuple[int, list[int]]]:
        """Each number of blocks, with those that go: the best of a shortlist, each repaired in closed form."""
        text = training_text(self.options.data, self.tokenizer, 100_000)
        few = len(text.train) * CHOOSING // text.train.numel()
        asked, length = with_repeats(text, recipe.repeated), len(self.stack)
        ranked = batches_of(asked.train[:few], 4)
        parts = (*held_out_apart(text.train[:few]), asked.validation)
        criterion = recipe.criterion or usual_criterion(recipe.search)
        judged = [batches_of(part, 4) for part in parts]
        with fast_products(self.model):
            measured = profile(self.model, ranked)
            for count in SIZES:
                problem = SearchProblem(windows(length, count), length, criterion, best=SHORTLIST, profile=measured)
                yield count, sorted(verified(self.model, find_selections(recipe.search, problem), *judged)[0].blocks)

    def row(self, run: Run) -> None:
        """Make a row, unless it is there or on its way."""
        with self.taken(run) as mine:
            if not mine:
                return
            made = self.made(run)
            self.change(lambda content: content["rows"].update({run.key: made}))
            print(run.key, made["text"]["mean_perplexity_ratio"], made["minutes"], flush=True)

    def made(self, run: Run) -> dict[str, Any]:
        recipe = RECIPES[run.recipe]
        text = self.text(recipe.text, run)
        if recipe.rounds > 1:
            return self.made_in_rounds(run, recipe, text)
        windows, clock = self.windows(run.removed, recipe), [time.process_time()]
        student = self.started(recipe, run, windows, text)
        clock.append(time.process_time())
        trained = None if not recipe.objective else self.trained(run, recipe, student, text)
        student.merge()
        student.training = False
        clock.append(time.process_time())
        report = None if trained is None else trained.report()
        minutes = {name: (b - a) / 60 for name, a, b in zip(("fit", "train"), clock, clock[1:], strict=False)}
        with student.opened():
            return self.scored(run, recipe, self.model, [k for window in windows for k in window], report, minutes)

    def made_in_rounds(self, run: Run, recipe: Recipe, text: TrainingText) -> dict[str, Any]:
        model, began = copy.deepcopy(self.original), time.process_time()
        result = compress_iteratively(
            model,
            self.tokenizer,
            TokenSplit(text.train, text.validation, text.validation, fingerprint=run.key),
            rounds=recipe.rounds,
            training=self.settings(run, recipe),
            remove=run.removed,
            kind=recipe.kind,
            search=recipe.search,
            criterion=recipe.criterion or None,
            repeated=recipe.repeated,
            healing=recipe.healing,
            fitting_tokens=round(recipe.rounds * STARTING * len(text.train)) * SEQUENCE,
            batch_size=1,
            side_by_side=False,
            seed=run.seed,
            say=print,
        )
        spent, seconds = (time.process_time() - began) / 60, result.seconds
        share = seconds["train"] / (seconds["train"] + seconds["rank"] + seconds["verify"])
        known = {name: seconds.get(name, 0.0) for name in ("rank", "verify", "train")}
        spent *= sum(known.values()) / sum(seconds.values())
        minutes = {"fit": spent * (1.0 - share), "train": spent * share}
        report = {"rounds": result.rounds}
        return self.scored(run, recipe, model, list(result.plan.removed), report, minutes)

    def scored(
        self, run: Run, recipe: Recipe, model: Any, gone: list[int], training: Any, minutes: dict[str, float]
    ) -> dict[str, Any]:
        began = time.process_time()
        with fast_products(self.original), fast_products(model):
            classification = self.quality.row(model, self.quality.counted)
        generation = self.generation.row(model)
        return {
            **asdict(run),
            "what": recipe.what,
            "removed_blocks": gone,
            "products": products(),
            "training": training,
            "minutes": {**minutes, "score": (time.process_time() - began) / 60},
            "text": {
                name: classification[name] for name in ("perplexity_ratio", "mean_perplexity_ratio", "kl", "top1")
            },
            "right": classification["right"],
            "generation": generation,
        }

    def text(self, which: str, run: Run) -> TrainingText:
        """What is trained on; it is always validated on documents."""
        tokens = max(run.tokens, 20 * SEQUENCE)
        found = training_text(self.options.data, self.tokenizer, tokens, run.seed)
        wanted = run.tokens // SEQUENCE
        if which == "documents":
            return replace(found, train=found.train[:wanted])
        own = self.own_text(run.tokens, run.seed)
        rows = own if which == "own" else torch.stack([own[:wanted], found.train[:wanted]], dim=1).flatten(0, 1)
        return replace(found, train=rows[:wanted])

    def own_text(self, tokens: int, seed: int) -> Tensor:
        """What the original writes to the prompts of a seed, in sequences."""
        texts = self_generated(
            self.original,
            self.tokenizer,
            tokens=tokens + 8 * SEQUENCE,
            seed=seed,
            cache=ROOT / "build",
            conversation=True,
        )
        ids = [i for text in texts for i in self.tokenizer(text, add_special_tokens=False).input_ids]
        return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)[: tokens // SEQUENCE]

    def started(self, recipe: Recipe, run: Run, windows: tuple[range, ...], text: TrainingText) -> Student:
        """The student before it is trained."""
        kind = kind_named(recipe.kind)
        torch.manual_seed(run.seed)
        if not recipe.warm or recipe.kind == "none":
            stand_ins = [kind.make(self.stack, window) for window in windows]
        else:
            share = 1.0 if not recipe.objective else STARTING
            rows = text.train[: max(16, round(share * len(text.train)))]
            parts = (batches_of(part, 4) for part in (*held_out_apart(rows), text.validation))
            with fast_products(self.model):
                (fitted,) = verified(self.model, [Selection(windows)], *parts, kind=kind)
            stand_ins = [repair.stand_in for repair in fitted.repairs]
        return student_of(self.stack, list(zip(windows, stand_ins, strict=True)), recipe.healing, seed=run.seed)

    def settings(self, run: Run, recipe: Recipe) -> Training:
        """How a recipe is trained."""
        file = ROOT / "build" / "quality_generation" / f"{run.key.replace(' ', '')}.training"
        own = OnPolicy.parse(recipe.on_policy) if recipe.on_policy else None
        objective = Objective.parse(recipe.objective)
        own_part: dict[str, Any] = {
            "objective": objective,
            "on_policy": own,
            "learning_rate": recipe.learning_rate,
            "seed": run.seed,
        }
        return replace(SETTINGS, **own_part, keep_in=file, memory=2**33, autocast=FAST)

    def trained(self, run: Run, recipe: Recipe, student: Student, text: TrainingText) -> Trained:
        """Train on the text once, and go on where an earlier run was interrupted."""
        settings = self.settings(run, recipe)
        file = cast(Path, settings.keep_in)
        batches, validation = batches_of(text.train, 1), batches_of(text.validation, 2)
        trained = train(student, batches, validation, settings, resume=file.exists(), say=print)
        if trained.stopped:
            raise SystemExit(f"{run.key} was not trained to its end: {trained.stopped}. Run it again to go on.")
        file.unlink()
        return trained


def with_repeats(text: TrainingText, share: float) -> TrainingText:
    """The same with repeated passages."""
    if not share:
        return text
    split = with_repeated_passages(TokenSplit(text.train, text.validation, text.validation, fingerprint=""), share)
    return replace(text, train=split.calibration, validation=split.validation)


def numbers(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one recipe, with as many seeds as there are: what is retained above chance, with its interval."""
    originals = [content["originals"][row["products"]] for row in rows]
    own = [original["classification"] for original in originals]
    answers = []
    for task in own[0]["counted"]:
        scores = [[list(map(float, one["right"][task])) for one in several] for several in (own, rows)]
        answers.append(TaskAnswers(task, *map(mean_of, scores), own[0]["chance"][task]))
    kept = retained(answers, clearly=0.0)["classification"]
    return {
        "seeds": len(rows),
        "classification": None if kept.above_chance is None else asdict(kept.above_chance),
        "ratio": statistics.fmean(row["text"]["mean_perplexity_ratio"] for row in rows),
        "kl": statistics.fmean(row["text"]["kl"] for row in rows),
        "minutes": statistics.fmean(row["minutes"]["fit"] + row["minutes"]["train"] for row in rows),
        "generation": summary([one["generation"] for one in originals], [row["generation"] for row in rows]),
    }


HEAD = (
    "recipe", "seeds", "classification", "generation", "pass@1", "pass@5", "pass@20", "last words",
    "alike, documents", "alike, questions", "repeated", "perplexity", "minutes",
)  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown: for each number of blocks the recipes, then the curve, then texts side by side."""
    rows, tokens = content["rows"], content["tokens"]
    lines = [
        "SmolLM2-135M-Instruct, 4 and 8 of its 30 blocks gone. Classification (as in quality.md) and generation "
        "(problems and last words, greedily) are the share of the accuracy above chance that is retained, with the "
        "95 % interval of drawing the questions; pass@k the share retained of the chance that one of k sampled answers "
        "is right; last words the accuracy; alike how many tokens a greedy continuation of 64 goes along with the "
        "original's; repeated the share of its runs of four tokens that were there before; perplexity the mean ratio "
        "over five held-out domains; minutes of one processor core, for the start and the training, fewer where "
        "products are in bfloat16.",
        *_original(content),
    ]
    for removed in SIZES:
        here = [row for row in rows.values() if row["removed"] == removed]
        for title, chosen in (
            (f"{removed} of 30 blocks, {tokens:,} training tokens for each", _same_tokens(here, tokens)),
            (f"{removed} of 30 blocks, the minutes of `best` for each", _same_time(here, tokens)),
        ):
            if chosen:
                lines += ["", f"## {title}", "", *_rows(content, chosen)]
    counts = sorted({row["tokens"] for row in rows.values()})
    curve = {f"best, {n:,} tokens": [row for row in rows.values() if _is(row, "best", 8, n)] for n in counts}
    if any(its for name, its in curve.items() if name != f"best, {tokens:,} tokens"):
        lines += [
            "",
            "## 8 of 30 blocks, by training tokens",
            "",
            *_rows(content, {n: r for n, r in curve.items() if r}),
        ]
    lines += _texts(content)
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


def _is(row: dict[str, Any], recipe: str, removed: int, tokens: int) -> bool:
    return (row["recipe"], row["removed"], row["tokens"]) == (recipe, removed, tokens) and not row.get("same_minutes")


def _same_tokens(rows: list[dict[str, Any]], tokens: int) -> dict[str, list[dict[str, Any]]]:
    found = {name: [row for row in rows if _is(row, name, row["removed"], tokens)] for name in RECIPES}
    return {name: its for name, its in found.items() if its}


def _same_time(rows: list[dict[str, Any]], tokens: int) -> dict[str, list[dict[str, Any]]]:
    apart = [row for row in rows if row.get("same_minutes")]
    best = [row for row in rows if _is(row, "best", row["removed"], tokens)]
    found = {name: [row for row in apart if row["recipe"] == name] for name in RECIPES} | {"best": best}
    return {name: its for name, its in found.items() if its} if apart else {}


def _rows(content: dict[str, Any], named: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = {name: numbers(content, its) for name, its in named.items()}
    ordered = sorted(found, key=lambda name: -_value(found[name]["generation"]["greedy"]["above_chance"]))
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name in ordered:
        its, written = found[name], found[name]["generation"]
        ends = statistics.fmean(
            row["generation"]["last_words"]["right"].count("1") / len(row["generation"]["last_words"]["right"])
            for row in named[name]
        )
        match = written["match"]
        repeated = statistics.fmean(kind["repetition"] for kind in match.values())
        cells = [
            name, str(its["seeds"]), _shown(its["classification"]), _shown(written["greedy"]["above_chance"]),
            *(_shown(written["pass_at"][k]["above_chance"]) for k in ("1", "5", "20")), f"{ends:.1%}",
            *(f"{kind['length']:.1f}" for kind in match.values()), f"{repeated:.1%}", f"{its['ratio']:.3f}",
            f"{its['minutes']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _value(estimate: dict[str, Any] | None) -> float:
    return -1.0 if estimate is None else float(estimate["value"])


def _shown(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.1%} [{estimate['low']:.0%}, {estimate['high']:.0%}]"


def _original(content: dict[str, Any]) -> list[str]:
    """What the original itself reaches, in the precision of most rows."""
    used = [row["products"] for row in content["rows"].values()]
    row = content["originals"][max(sorted(content["originals"]), key=used.count)]["generation"]
    solved = ", ".join(f"{sort} {bits.count('1') / len(bits):.0%}" for sort, bits in row["probes"].items())
    ends = row["last_words"]["right"]
    repeated = statistics.fmean(kind["original_repetition"] for kind in row["match"].values())
    return [
        "",
        f"The original solves of the problems: {solved}; it says {ends.count('1') / len(ends):.1%} of the last words, "
        f"and repeats {repeated:.1%} of its runs of four tokens.",
    ]


def _texts(content: dict[str, Any]) -> list[str]:
    """Continuations side by side: the original's, after plain removal, and after two repairs, of the most tokens."""
    found: dict[str, list[Any]] = {name: [] for name in ("removed", "best", "two windows")}
    for row in sorted(content["rows"].values(), key=lambda row: (row["tokens"], -row["seed"])):
        if row["recipe"] in found and row["removed"] == 8 and not row.get("same_minutes"):
            found[row["recipe"]].append(row)
    if not (found["removed"] and found["best"]):
        return []
    last = {name: its[-1] for name, its in found.items() if its}
    lines = ["", "## Ten beginnings, chosen by seed, 8 of 30 blocks gone", ""]
    own = content["originals"][last["best"]["products"]]["generation"]
    for k, first in enumerate(own["samples"]):
        lines += [f"**{_inline(first['prompt'])}**", "", f"- original: {_inline(first['text'])}"]
        lines += [f"- {name}: {_inline(row['generation']['samples'][k]['text'])}" for name, row in last.items()] + [""]
    return lines


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    main()

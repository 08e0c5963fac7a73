"""What each part of a repair keeps of classification and of generation, 4 and 8 of SmolLM2's 30 blocks gone.

    python -m benchmarks.quality_generation [--data FOLDER] [--plan NAME,...] [--tokens 50000]

One thing is changed at a time: how the blocks are chosen, where the repair starts, by which loss it is trained, on
which text, in how many rounds, and what is healed besides; all on the same number of training tokens, seen once, and
(the plan ``minutes``) on as many as take the processor time that `best` takes, if those are not nearly as many. The
blocks are chosen once for all seeds, on training text; the seed decides the text, what the start is fitted on, and the
order of the batches, and not the random weights of a stand-in, but where it starts as plain removal. Classification is
scored on the tasks of `benchmarks.quality`, generation as in `benchmarks.generation_scores`. Products are in bfloat16
where the machine is fast in it and else in float32, and each row is held against the original in its own precision.
Minutes are the processor's own. A row goes to ``benchmarks/results/quality_generation.json`` as soon as it is done, a
training that was interrupted goes on where it was, and the tables go to ``benchmarks/results/quality_generation.md``.
Two such commands share the rows between them.
"""

from __future__ import annotations

import copy
import fcntl
import glob
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation_recipes import RECIPES, SIZES, TRAINED, Recipe, Run, plans, same_minutes
from benchmarks.generation_scores import Generation
from benchmarks.generation_table import table
from benchmarks.quality import CHOOSING, SHORTLIST, STARTING
from benchmarks.quality_scores import Quality, write
from benchmarks.real_text import RESULTS, ROOT, SEQUENCE, arguments
from benchmarks.short_answers import fast_products, products
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import (
    DistillationConfig,
    EvaluationConfig,
    HardwareConfig,
    NoneConfig,
    Selection,
    Trained,
    compress,
    profile,
    student_of,
    train,
    verified,
)
from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import TokenSplit, self_generated, with_repeated_passages
from streamline_hooks.pipeline.plan import measure_training
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.repair import Student
from streamline_hooks.selection import windows
from streamline_hooks.selection.search.selected import runs
from streamline_hooks.stack import find_stack

FILE = RESULTS / "quality_generation.json"
ORIGINAL = {
    "bfloat16": RESULTS / "quality_generation_original.json",
    "float32": RESULTS / "quality_generation_original_float32.json",
}
HARDWARE = HardwareConfig(autocast="bfloat16" if products() == "bfloat16" else None, state_memory=2**33)
SCORED: dict[str, int] = {"seed": 1, "first": 6}  # another draw than the recipes were tried on
TIMED, TIMES = 3, 5  # batches, of which the first does not count, and how often each recipe is timed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plan", default="best,start,8,4,minutes,curve,seeds", help="which rows, in their order")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.plan.split(","):
        if name == "minutes":
            bench.measure_paces()
            for removed in SIZES:
                known = {run.recipe for run in same_minutes(removed, options.tokens, bench.content)}
                for left in sorted(set(TRAINED) - known):
                    print(f"{left}, {removed} blocks: no usual row of a known time, and so none of the same minutes")
        for run in plans(options.tokens, bench.content)[name]:
            bench.row(run)
    print(table(bench.content))


class Bench:
    """The model twice, once to be changed, the questions, and the rows so far."""

    def __init__(self, options: Any) -> None:
        self.options, self.file = options, options.results
        original, self.tokenizer = load_pretrained("smollm2")
        self.original = original
        with fast_products(original):
            self.quality = Quality(original, self.tokenizer, options.data, **SCORED, cache=ORIGINAL[products()])
        self.generation = Generation(original, self.tokenizer, options.data)
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.content = self.read()
        self.check()
        command = f"python -m benchmarks.quality_generation --tokens {options.tokens}"
        about = {"command": command, "tokens": options.tokens}
        own = {
            "classification": {**self.quality.original_row(), "key": self.quality.key},
            "generation": self.generation.original_row(),
        }
        self.change(lambda content: content.update({**about, "originals": {**content["originals"], products(): own}}))

    @property
    def rows(self) -> dict[str, Any]:
        return dict(self.content["rows"])

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}, "blocks": {}, "originals": {}}

    def check(self) -> None:
        """Refuse to go on with rows that were asked otherwise, before anything is written."""
        known = self.content["originals"].get(products())
        if not self.content["rows"]:
            return
        if self.content["tokens"] != self.options.tokens:
            raise SystemExit(
                f"{self.file} has rows of {self.content['tokens']:,} training tokens; name another file (--results) "
                f"for {self.options.tokens:,}."
            )
        keys = (self.quality.key, self.generation.original_row()["key"])
        if known and (known["classification"]["key"], known["generation"]["key"]) != keys:
            raise SystemExit(
                f"{self.file} has rows that were asked other questions, or by another version of torch or "
                "transformers; name another file (--results)."
            )

    def change(self, make: Any) -> None:
        """Change what is kept, which another process may have changed in between."""
        with (self.work / "lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.content = self.read()
            make(self.content)
            write(self.file, self.content)
            self.file.with_suffix(".md").write_text(table(self.content))

    @contextmanager
    def taken(self, run: Run) -> Iterator[bool]:
        """Whether this process is the one to make a row; the other takes another."""
        with self.file_of(run, "taken").open("w") as held:
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
        search, repeated = recipe.config.search, recipe.config.data.repeated
        by = f" by {search.criterion}" if search.criterion else ""
        name = f"{search.kind}{by}" + (f", {repeated:.0%} repeated" if repeated else "")
        if f"{removed}, {name}" not in self.content["blocks"]:
            chosen = {f"{count}, {name}": blocks for count, blocks in self.searched(recipe)}
            self.change(lambda content: content["blocks"].update(chosen))
        return runs(self.content["blocks"][f"{removed}, {name}"])

    def searched(self, recipe: Recipe) -> Iterator[tuple[int, list[int]]]:
        """Each number of blocks, with those that go: the best of a shortlist, each repaired in closed form."""
        text = training_text(self.options.data, self.tokenizer, 100_000)
        few = len(text.train) * CHOOSING // text.train.numel()
        asked, length = with_repeats(text, recipe.config.data.repeated), len(self.stack)
        ranked = batches_of(asked.train[:few], 4)
        parts = (*held_out_apart(text.train[:few]), asked.validation)
        search = replace(recipe.config.search, shortlist=SHORTLIST)
        judged = [batches_of(part, 4) for part in parts]
        with fast_products(self.model):
            measured = profile(self.model, ranked)
            for count in SIZES:
                shortlist = search.find(search.problem(windows(length, count), length, profile=measured))
                yield count, sorted(verified(self.model, shortlist, *judged)[0].blocks)

    def measure_paces(self) -> None:
        """How long a recipe trains for each second of `best`: medians of steps, of all recipes in turn, measured once.

        Of those whose steps are all alike and whose text is there: not of one that writes, or begins again.
        """
        with (self.work / "paces").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.content = self.read()
            known = self.content.get("paces", {})
            if products() not in known:
                found = {str(removed): self.paces(removed) for removed in SIZES}
                self.change(lambda content: content.update(paces={**known, products(): found}))

    def paces(self, removed: int) -> dict[str, float]:
        run = Run("best", removed, TIMED * SEQUENCE)
        text, _ = self.text("documents", run)
        batches, apart = batches_of(text.train, 1), batches_of(text.validation, 2)[0]
        settings = {name: self.settings(run, RECIPES[name]) for name in TRAINED}
        alike = [name for name in TRAINED if RECIPES[name].config.rounds == 1]
        alike = [name for name in alike if RECIPES[name].text == "documents"]
        took: dict[str, list[float]] = {name: [] for name in alike}
        for _ in range(TIMES):
            for name in alike:
                recipe = replace(RECIPES[name], warm=False)  # which is as fast, and there at once
                student = self.started(recipe, run, self.windows(removed, recipe), text)
                pace = measure_training(
                    student, batches, apart, settings[name], hardware=HARDWARE, clock=time.process_time
                )
                took[name].append(pace)
        middle = {name: statistics.median(seconds) for name, seconds in took.items()}
        return {name: seconds / middle["best"] for name, seconds in middle.items()}

    def row(self, run: Run) -> None:
        """Make a row, unless it is there or on its way."""
        with self.taken(run) as mine:
            if not mine:
                return
            made = self.made(run)
            self.change(lambda content: content["rows"].update({run.key: made}))
            for kept in self.work.glob(f"{glob.escape(self.file_of(run, 'training').name)}*"):
                kept.unlink()  # of all rounds
            print(run.key, made["text"]["mean_perplexity_ratio"], made["minutes"], flush=True)

    def made(self, run: Run) -> dict[str, Any]:
        recipe = RECIPES[run.recipe]
        text, written = self.text(recipe.text, run)
        if recipe.config.rounds > 1:
            return self.made_in_rounds(run, recipe, text)
        windows, began = self.windows(run.removed, recipe), time.process_time()
        student = self.started(recipe, run, windows, text)
        started = time.process_time()
        resumed = self.file_of(run, "training").exists()
        trained = None if recipe.config.distillation is None else self.trained(run, recipe, student, text)
        student.merge()
        student.training = False
        took = (time.process_time() - started) / 60
        report = None if trained is None else trained.report()
        minutes = {"fit": (started - began) / 60, "train": None if resumed else took, "text": written}
        with student.opened():
            return self.scored(run, recipe, self.model, [k for window in windows for k in window], report, minutes)

    def made_in_rounds(self, run: Run, recipe: Recipe, text: TrainingText) -> dict[str, Any]:
        model, began = copy.deepcopy(self.original), time.process_time()
        resumed = any(self.work.glob(f"{glob.escape(self.file_of(run, 'training').name)}*"))
        config = recipe.config
        fitting_tokens = round(config.rounds * STARTING * len(text.train)) * SEQUENCE
        result = compress(
            model,
            self.tokenizer,
            TokenSplit(text.train, text.validation, text.validation, fingerprint=run.key),
            replace(
                config,
                remove=run.removed,
                repair=config.repair.seeded(0),  # the random weights are the same for all seeds
                data=replace(config.data, fitting_tokens=fitting_tokens),
                distillation=self.settings(run, recipe),
                evaluation=EvaluationConfig(speed=False, generation=False),
                hardware=replace(HARDWARE, batch_size=1),
                seed=run.seed,
            ),
            checkpoint=self.file_of(run, "training"),
            resume=resumed,
            say=print,
        )
        spent, seconds = (time.process_time() - began) / 60, result.seconds
        train = spent * seconds["train"] / sum(seconds.values())  # without choosing, which others do beforehand
        minutes = {"fit": 0.0, "train": None if resumed else train}
        report = {"rounds": result.rounds}
        return self.scored(run, recipe, model, list(result.plan.removed), report, minutes)

    def scored(
        self, run: Run, recipe: Recipe, model: Any, gone: list[int], training: Any, minutes: dict[str, float | None]
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
            "asked": self.quality.key,
            "right": classification["right"],
            "generation": generation,
        }

    def text(self, which: str, run: Run) -> tuple[TrainingText, float | None]:
        """What is trained on, and the minutes that the original wrote it in, if they are known.

        It is always validated on documents.
        """
        tokens = max(run.tokens, 20 * SEQUENCE)
        found = training_text(self.options.data, self.tokenizer, tokens, run.seed)
        wanted = run.tokens // SEQUENCE
        if which == "documents":
            return replace(found, train=found.train[:wanted]), 0.0
        rows, minutes = self.own_text(wanted if which == "own" else (wanted + 1) // 2, run)
        if which == "both":
            rows = torch.stack([rows, found.train[: len(rows)]], dim=1).flatten(0, 1)
        return replace(found, train=rows[:wanted]), minutes

    def own_text(self, sequences: int, run: Run) -> tuple[Tensor, float | None]:
        """What the original writes to the prompts of a seed, and the minutes that it took when it was written.

        It is kept for the rows with another number of blocks gone. None where somebody began to write it before, who
        was interrupted or is at it still.
        """
        folder, began = self.work / f"{sequences}sequences|{run.seed}.text", time.process_time()
        alone = not folder.exists()
        with fast_products(self.original):
            texts = self_generated(
                self.original,
                self.tokenizer,
                tokens=(sequences + 8) * SEQUENCE,
                seed=run.seed,
                cache=folder,
                conversation=True,
            )
        took = folder / "minutes"
        if not took.exists():
            took.write_text(json.dumps((time.process_time() - began) / 60 if alone else None))
        ids = [i for text in texts for i in self.tokenizer(text, add_special_tokens=False).input_ids]
        rows = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)[:sequences]
        return rows, json.loads(took.read_text())

    def file_of(self, run: Run, of: str) -> Path:
        """Where something of a row is kept until it is made."""
        return self.work / f"{run.key.replace(' ', '')}.{of}"

    @property
    def work(self) -> Path:
        """The folder of what is kept until a row is made."""
        folder = ROOT / "build" / "quality_generation"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def started(self, recipe: Recipe, run: Run, windows: tuple[range, ...], text: TrainingText) -> Student:
        """The student before it is trained."""
        repair = recipe.config.repair
        torch.manual_seed(run.seed)
        if not recipe.warm or repair == NoneConfig():
            stand_ins = [repair.make(self.stack, window) for window in windows]
        else:
            rows = text.train[: max(16, round(recipe.starting * len(text.train)))]
            parts = (batches_of(part, 4) for part in (*held_out_apart(rows), text.validation))
            with fast_products(self.model):
                (fitted,) = verified(self.model, [Selection(windows)], *parts, replacement=repair)
            stand_ins = [found.stand_in for found in fitted.repairs]
        return student_of(self.stack, list(zip(windows, stand_ins, strict=True)), recipe.config.healing, seed=run.seed)

    def settings(self, run: Run, recipe: Recipe) -> DistillationConfig:
        """How a recipe is trained."""
        assert recipe.config.distillation is not None
        return replace(recipe.config.distillation, seed=run.seed)

    def trained(self, run: Run, recipe: Recipe, student: Student, text: TrainingText) -> Trained:
        """Train on the text once, and go on where an earlier run was interrupted."""
        settings = self.settings(run, recipe)
        file = self.file_of(run, "training")
        batches, validation = batches_of(text.train, 1), batches_of(text.validation, 2)
        trained = train(
            student,
            batches,
            validation,
            settings,
            hardware=HARDWARE,
            checkpoint=file,
            resume=file.exists(),
            say=print,
        )
        if trained.stopped:
            raise SystemExit(f"{run.key} was not trained to its end: {trained.stopped}. Run it again to go on.")
        return trained


def with_repeats(text: TrainingText, share: float) -> TrainingText:
    """The same with repeated passages."""
    if not share:
        return text
    split = with_repeated_passages(TokenSplit(text.train, text.validation, text.validation, fingerprint=""), share)
    return replace(text, train=split.calibration, validation=split.validation)


if __name__ == "__main__":
    main()

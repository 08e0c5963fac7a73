"""Measure what each part of a repair retains of classification and generation, with 4 and 8 of 30 blocks removed.

    python -m benchmarks.quality_generation [--data FOLDER] [--plan NAME,...] [--tokens 50000]

One setting is varied at a time: the selection of the blocks, the initialization of the repair, the loss, the training
text, the number of rounds, and healing. All recipes train on the same number of tokens for one epoch, and (plan
``minutes``) on the number of tokens that takes the CPU time of `best`, unless that is nearly the same. The blocks are
selected once for all seeds, on training text. The seed determines the training text, the text of the initial fit and
the order of the batches; it determines the random weights of a replacement only if it is initialized as plain removal.
Classification is scored on the tasks of `benchmarks.multiple_choice`, generation as in `benchmarks.generation_scores`.
Matrix products are in bfloat16 if the CPU supports it, otherwise in float32, and each row is compared with the original
in the same precision. Minutes are CPU time. Each row is saved to ``benchmarks/results/quality_generation.json`` when it
is finished, and the tables to ``benchmarks/results/quality_generation.md``. Interrupted training runs are resumed. Two
processes that run this command divide the rows among themselves.
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
from benchmarks.quality_scores import Quality, write
from benchmarks.real_text import RESULTS, ROOT, SEQUENCE, arguments
from benchmarks.retained_quality import CHOOSING, SHORTLIST, STARTING
from benchmarks.short_answers import fast_products, products
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import DistillationConfig, RunOptions, compress, profile, train, verify_shortlist
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig, split_into_batches
from streamline_hooks.data import SelfGenerationConfig, TokenSplit, self_generated, with_repeated_passages
from streamline_hooks.distillation import Student, TrainingResult, student_of
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import EvaluationConfig, measure_training, split_held_out
from streamline_hooks.repair import NoneConfig
from streamline_hooks.selection import Selection, consecutive_runs, windows_of_size

FILE = RESULTS / "quality_generation.json"
ORIGINAL = {
    "bfloat16": RESULTS / "quality_generation_original.json",
    "float32": RESULTS / "quality_generation_original_float32.json",
}
HARDWARE = HardwareConfig(autocast="bfloat16" if products() == "bfloat16" else None, state_memory=2**33)
SCORED: dict[str, int] = {"seed": 1, "first": 6}  # another sample than that on which the recipes were developed
TIMED, TIMES = 3, 5  # batches (the first is not counted), and repetitions per recipe


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--plan", default="best,start,8,4,minutes,curve,seeds", help="plans of rows, in the order of execution"
    )
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
                    print(
                        f"{left}, {removed} blocks: skipped in the plan minutes, which needs a finished row with a time"
                    )
        for run in plans(options.tokens, bench.content)[name]:
            bench.row(run)
    print(table(bench.content))


class Bench:
    """The original, a model to change, the questions and the finished rows."""

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
        """Raise if the stored rows were made with other settings."""
        original = self.content["originals"].get(products())
        if not self.content["rows"]:
            return
        if self.content["tokens"] != self.options.tokens:
            raise SystemExit(
                f"{self.file} has rows of {self.content['tokens']:,} training tokens, and --tokens is "
                f"{self.options.tokens:,}. Choose another name of the file (--results)."
            )
        keys = (self.quality.key, self.generation.original_row()["key"])
        if original and (original["classification"]["key"], original["generation"]["key"]) != keys:
            raise SystemExit(
                f"{self.file} has rows of other questions, or of another version of torch or transformers. Choose "
                "another file (--results)."
            )

    def change(self, make: Any) -> None:
        """Change the stored rows under a lock; another process may have changed them before."""
        with (self.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.content = self.read()
            make(self.content)
            write(self.file, self.content)
            self.file.with_suffix(".md").write_text(table(self.content))

    @contextmanager
    def taken(self, run: Run) -> Iterator[bool]:
        """Lock a row; yield whether this process should make it."""
        with self.file_of(run, "taken").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            self.content = self.read()
            stored = self.content["rows"].get(run.key)
            yield stored is None or stored["what"] != RECIPES[run.recipe].what

    def windows(self, removed: int, recipe: Recipe) -> tuple[range, ...]:
        """Return the windows to remove, selected once per number of blocks, search and kind of text."""
        search, repeated = recipe.config.search, recipe.config.data.repeated_context
        by = f" by {search.criterion}" if search.criterion else ""
        name = f"{search.kind}{by}" + (f", {repeated:.0%} repeated" if repeated else "")
        if f"{removed}, {name}" not in self.content["blocks"]:
            chosen = {f"{count}, {name}": blocks for count, blocks in self.searched(recipe)}
            self.change(lambda content: content["blocks"].update(chosen))
        return consecutive_runs(self.content["blocks"][f"{removed}, {name}"])

    def searched(self, recipe: Recipe) -> Iterator[tuple[int, list[int]]]:
        """Yield each number of blocks and the selected blocks: the best of a shortlist repaired in closed form."""
        text = training_text(self.options.data, self.tokenizer, 100_000)
        few = len(text.train) * CHOOSING // text.train.numel()
        ranking_text, length = with_repeats(text, recipe.config.data.repeated_context), len(self.stack)
        ranked = split_into_batches(ranking_text.train[:few], 4)
        parts = (*split_held_out(text.train[:few]), ranking_text.validation)
        search = replace(recipe.config.search, shortlist=SHORTLIST)
        verification_batches = [split_into_batches(part, 4) for part in parts]
        with fast_products(self.model):
            measured = profile(self.model, ranked)
            for count in SIZES:
                shortlist = search.find(search.problem(windows_of_size(length, count), length, profile=measured))
                yield count, sorted(verify_shortlist(self.model, shortlist, *verification_batches)[0].blocks)

    def measure_paces(self) -> None:
        """Measure once how long each recipe trains relative to `best`: medians of alternating steps.

        Recipes with generated text or several rounds are left out, because their steps differ.
        """
        with (self.work / "paces").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.content = self.read()
            known = self.content.get("paces", {})
            if products() not in known:
                paces = {str(removed): self.paces(removed) for removed in SIZES}
                self.change(lambda content: content.update(paces={**known, products(): paces}))

    def paces(self, removed: int) -> dict[str, float]:
        run = Run("best", removed, TIMED * SEQUENCE)
        text, _ = self.text("documents", run)
        batches, validation = split_into_batches(text.train, 1), split_into_batches(text.validation, 2)[0]
        settings = {name: self.settings(run, RECIPES[name]) for name in TRAINED}
        recipes = [name for name in TRAINED if RECIPES[name].config.rounds == 1]
        recipes = [name for name in recipes if RECIPES[name].text == "documents"]
        seconds_by_recipe: dict[str, list[float]] = {name: [] for name in recipes}
        for _ in range(TIMES):
            for name in recipes:
                recipe = replace(RECIPES[name], warm=False)  # as fast, and needs no fit
                student = self.started(recipe, run, self.windows(removed, recipe), text)
                pace = measure_training(
                    student, batches, validation, settings[name], hardware=HARDWARE, clock=time.process_time
                )
                seconds_by_recipe[name].append(pace)
        medians = {name: statistics.median(seconds) for name, seconds in seconds_by_recipe.items()}
        return {name: seconds / medians["best"] for name, seconds in medians.items()}

    def row(self, run: Run) -> None:
        """Make a row, unless it is finished or another process makes it."""
        with self.taken(run) as locked:
            if not locked:
                return
            row = self.make(run)
            self.change(lambda content: content["rows"].update({run.key: row}))
            for file in self.work.glob(f"{glob.escape(self.file_of(run, 'training').name)}*"):
                file.unlink()  # checkpoints of all rounds
            print(run.key, row["text"]["mean_perplexity_ratio"], row["minutes"], flush=True)

    def make(self, run: Run) -> dict[str, Any]:
        recipe = RECIPES[run.recipe]
        text, written = self.text(recipe.text, run)
        if recipe.config.rounds > 1:
            return self.make_in_rounds(run, recipe, text)
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
        with student.applied():
            return self.scored(run, recipe, self.model, [k for window in windows for k in window], report, minutes)

    def make_in_rounds(self, run: Run, recipe: Recipe, text: TrainingText) -> dict[str, Any]:
        model, began = copy.deepcopy(self.original), time.process_time()
        resumed = any(self.work.glob(f"{glob.escape(self.file_of(run, 'training').name)}*"))
        config = recipe.config
        fitting_tokens = round(config.rounds * STARTING * len(text.train)) * SEQUENCE
        result = compress(
            model,
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
            tokenizer=self.tokenizer,
            options=RunOptions(checkpoint_file=self.file_of(run, "training"), resume=resumed),
        )
        spent, seconds = (time.process_time() - began) / 60, result.seconds
        train = (
            spent * seconds["train"] / sum(seconds.values())
        )  # without the selection, which other recipes do not count
        minutes = {"fit": 0.0, "train": None if resumed else train}
        report = {"rounds": result.rounds}
        return self.scored(run, recipe, model, list(result.plan.removed), report, minutes)

    def scored(
        self,
        run: Run,
        recipe: Recipe,
        model: Any,
        removed_blocks: list[int],
        training: Any,
        minutes: dict[str, float | None],
    ) -> dict[str, Any]:
        began = time.process_time()
        with fast_products(self.original), fast_products(model):
            classification = self.quality.row(model, self.quality.counted)
        generation = self.generation.row(model)
        return {
            **asdict(run),
            "what": recipe.what,
            "removed_blocks": removed_blocks,
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
        """Return the training text, and the minutes of its generation if they are known.

        The validation text is always from documents.
        """
        tokens = max(run.tokens, 20 * SEQUENCE)
        text = training_text(self.options.data, self.tokenizer, tokens, run.seed)
        sequences = run.tokens // SEQUENCE
        if which == "documents":
            return replace(text, train=text.train[:sequences]), 0.0
        rows, minutes = self.own_text(sequences if which == "own" else (sequences + 1) // 2, run)
        if which == "both":
            rows = torch.stack([rows, text.train[: len(rows)]], dim=1).flatten(0, 1)
        return replace(text, train=rows[:sequences]), minutes

    def own_text(self, sequences: int, run: Run) -> tuple[Tensor, float | None]:
        """Return the text that the original generates for a seed, and the minutes of its generation.

        The text is stored for the rows with another number of removed blocks. The minutes are None if another process
        began the generation.
        """
        folder, began = self.work / f"{sequences}sequences|{run.seed}.text", time.process_time()
        is_first = not folder.exists()
        with fast_products(self.original):
            texts = self_generated(
                self.original,
                self.tokenizer,
                SelfGenerationConfig(seed=run.seed, conversation=True),
                tokens=(sequences + 8) * SEQUENCE,
                cache=folder,
            )
        minutes_file = folder / "minutes"
        if not minutes_file.exists():
            minutes_file.write_text(json.dumps((time.process_time() - began) / 60 if is_first else None))
        ids = [i for text in texts for i in self.tokenizer(text, add_special_tokens=False).input_ids]
        rows = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)[:sequences]
        return rows, json.loads(minutes_file.read_text())

    def file_of(self, run: Run, of: str) -> Path:
        """Return the path of a temporary file of a row."""
        return self.work / f"{run.key.replace(' ', '')}.{of}"

    @property
    def work(self) -> Path:
        """The folder of temporary files of unfinished rows."""
        folder = ROOT / "build" / "quality_generation"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def started(self, recipe: Recipe, run: Run, windows: tuple[range, ...], text: TrainingText) -> Student:
        """Return the student before training."""
        repair = recipe.config.repair
        torch.manual_seed(run.seed)
        if not recipe.warm or repair == NoneConfig():
            replacement_modules = [repair.make(self.stack, window) for window in windows]
        else:
            rows = text.train[: max(16, round(recipe.starting * len(text.train)))]
            parts = (split_into_batches(part, 4) for part in (*split_held_out(rows), text.validation))
            with fast_products(self.model):
                (fitted,) = verify_shortlist(self.model, [Selection(windows)], *parts, replacement=repair)
            replacement_modules = [repair_result.replacement_module for repair_result in fitted.repairs]
        return student_of(
            self.stack, list(zip(windows, replacement_modules, strict=True)), recipe.config.healing, seed=run.seed
        )

    def settings(self, run: Run, recipe: Recipe) -> DistillationConfig:
        """Return the distillation settings of a recipe."""
        assert recipe.config.distillation is not None
        return replace(recipe.config.distillation, seed=run.seed)

    def trained(self, run: Run, recipe: Recipe, student: Student, text: TrainingText) -> TrainingResult:
        """Train for one epoch, and resume an interrupted training run."""
        settings = self.settings(run, recipe)
        file = self.file_of(run, "training")
        batches, validation = split_into_batches(text.train, 1), split_into_batches(text.validation, 2)
        trained = train(
            student,
            batches,
            validation,
            settings,
            hardware=HARDWARE,
            checkpoint_file=file,
            resume=file.exists(),
        )
        if trained.stopped:
            raise SystemExit(f"{run.key}: training stopped early: {trained.stopped}. Run the command again to resume.")
        return trained


def with_repeats(text: TrainingText, share: float) -> TrainingText:
    """Return the text with a fraction of repeated passages."""
    if not share:
        return text
    split = with_repeated_passages(TokenSplit(text.train, text.validation, text.validation, fingerprint=""), share)
    return replace(text, train=split.calibration, validation=split.validation)


if __name__ == "__main__":
    main()

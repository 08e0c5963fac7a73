"""Compare the recipes for SmolLM2-135M-Instruct with 8 of 30 blocks removed.

    python -m benchmarks.quality [--data FOLDER] [--tokens 500000] [--recipes NAME;...] [--items N]

All recipes use the same training text of five domains for one epoch, and the same window; block replacements remove one
more block. Closed forms are fitted on all of the text. Trained replacements are initialized on the first fifth and see
the same batches. Matrix products of fits and training runs are in bfloat16, sums in float64. Scores are on held-out
text and multiple-choice tasks, which are used neither to choose nor to fit (`benchmarks.quality_scores`). Each row is
saved to ``benchmarks/results/quality.json`` when it is finished, and the table to ``benchmarks/results/quality.md``.
Interrupted training runs are resumed. All rows take about four hours on two cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import benchmarks.baselines  # noqa: F401 - adds the presets of other methods
from benchmarks.quality_scores import SEQUENCES, Quality, write
from benchmarks.real_text import RESULTS, ROOT, arguments
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import (
    CompressionConfig,
    DistillationConfig,
    HealingConfig,
    LinearConfig,
    SwiGLUConfig,
    fit_windows,
    profile,
    train,
    verify_shortlist,
)
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig, split_into_batches
from streamline_hooks.distillation import (
    Student,
    TeacherCache,
    TeacherStates,
    TrainingResult,
    cache_teacher_states,
    student_of,
)
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import PRESETS, split_held_out
from streamline_hooks.repair import BlockConfig, FoldedConfig, MergedConfig, NoneConfig, ReplacementConfig
from streamline_hooks.selection import WindowSearch, windows_of_size

FILE = RESULTS / "quality.json"
REMOVED, BATCH, SHORTLIST = 8, 1, 8
CHOOSING = 40_960  # tokens for the choice of the window
STARTING = 0.2  # fraction of the text for the initial fit of trained replacements


@dataclass(frozen=True)
class Recipe:
    """The replacement, its distillation, and the healing of other blocks."""

    repair: ReplacementConfig
    distillation: DistillationConfig | None = None
    healing: HealingConfig | None = None


OURS = replace(CompressionConfig.preset("best").distillation or DistillationConfig(), loss={"kl": 1.0})
RECIPES: dict[str, Recipe] = {
    **{
        name: Recipe(preset.config.repair, preset.config.distillation, preset.config.healing)
        for name, preset in PRESETS.items()
        if isinstance(preset.config.search, WindowSearch) and preset.config.rounds == 1
    },
    "linear": Recipe(LinearConfig()),
    "folded": Recipe(FoldedConfig()),
    "merged, mean": Recipe(MergedConfig(weight=0.1111)),
    "swiglu, started": Recipe(SwiGLUConfig()),
    "swiglu, KL": Recipe(SwiGLUConfig(), OURS),
    "block, KL": Recipe(BlockConfig(), OURS),
    "swiglu, KL + LM": Recipe(SwiGLUConfig(), replace(OURS, loss={"kl": 1.0, "lm": 1.0})),
}
LABELS = {"swiglu, started": "swiglu", "merged, mean": "merged"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names of recipes, separated by semicolons")
    parser.add_argument("--items", type=int, help="questions per task, except for BLiMP")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    bench = Bench(options)
    for name in filter(None, options.recipes.split(";")):
        bench.row(name.strip())
    print(table(bench.content))


class Bench:
    """The original, a model to change, the text and the finished rows."""

    def __init__(self, options: Any) -> None:
        self.options, self.file = options, options.results
        original, tokenizer = load_pretrained("smollm2")
        self.quality = Quality(original, tokenizer, options.data, items=options.items, sequences=options.sequences)
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.text = training_text(options.data, tokenizer, options.tokens)
        self.batches = split_into_batches(self.text.train, BATCH)
        self.validation = split_into_batches(self.text.validation, BATCH)
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}}
        command = f"python -m benchmarks.quality --tokens {options.tokens}"
        command += "" if options.items is None else f" --items {options.items}"
        self.content |= {
            "command": command,
            "tokens": self.text.train.numel(),
            "shares": self.text.shares,
            "original": self.quality.original_row(),
        }
        self._teacher: tuple[tuple[range, ...], list[TeacherStates]] | None = None
        self._exits = ExitStack()

    def window(self, slots: int) -> range:
        """Return the window for a number of slots, chosen once by the verified shortlist."""
        known = self.content.setdefault("windows", {})
        if str(slots) not in known:
            known[str(slots)] = choose(self.model, self.text, REMOVED + slots).start
            write(self.file, self.content)
        return range(known[str(slots)], known[str(slots)] + REMOVED + slots)

    def row(self, name: str) -> None:
        """Make a row, unless it is finished."""
        if name in self.content["rows"]:
            return
        recipe, started = RECIPES[name], time.time()
        window = self.window(recipe.repair.slots)
        share = 1.0 if recipe.distillation is None and recipe.repair != NoneConfig() else STARTING
        rows = self.text.train[: round(share * len(self.text.train))]
        fit, held_out = (split_into_batches(part, 4) for part in split_held_out(rows))
        with torch.autocast("cpu", torch.bfloat16):
            (repair,) = fit_windows(self.model, [window], recipe.repair, fit, held_out)
        fitted = time.time()
        student = student_of(self.stack, [(window, repair.replacement_module)], recipe.healing)
        trained = None if recipe.distillation is None else self.trained(name, student, recipe.distillation)
        student.merge()
        student.training = False
        done = time.time()
        with student.applied():
            scores = self.quality.row(self.model)
        parameters = {id(p): p.numel() for p in self.model.parameters()}
        removed_parameters = sum(self.stack.parameters_per_block[k] for k in window)
        added = recipe.repair.size(self.stack, window).parameters
        self.content["rows"][name] = {
            "kind": str(recipe.repair),
            "objective": None if recipe.distillation is None else str(recipe.distillation.objective),
            "healing": None if recipe.healing is None else repr(recipe.healing),
            "window": [window.start, window.stop],
            "parameters": sum(parameters.values()) - removed_parameters + added,
            "added": added,
            "removal_error": repair.removal_error,
            "repaired_error": repair.repaired_error,
            "training": None if trained is None else trained.report(),
            "minutes": {"fit": (fitted - started) / 60, "train": (done - fitted) / 60},
            **scores,
        }
        write(self.file, self.content)
        self.file.with_suffix(".md").write_text(table(self.content))
        print(name, self.content["rows"][name]["mean_perplexity_ratio"], flush=True)

    def trained(self, name: str, student: Student, settings: DistillationConfig) -> TrainingResult:
        """Train for one epoch in bfloat16 autocast, and resume an interrupted training run."""
        file = ROOT / "build" / "quality" / f"{name.replace(' ', '-')}.training"
        with self.cached_teacher(student, settings) as student.teacher_cache:
            trained = train(
                student,
                self.batches,
                self.validation,
                settings,
                resume=file.exists(),
                checkpoint_file=file,
                hardware=HardwareConfig(autocast="bfloat16", state_memory=2**34),
            )
        if trained.stopped:
            raise SystemExit(f"{name}: training stopped early: {trained.stopped}. Run the command again to resume.")
        file.unlink()
        return trained

    @contextmanager
    def cached_teacher(self, student: Student, settings: DistillationConfig) -> Iterator[TeacherCache | None]:
        """Yield the teacher's states on the text, shared by recipes whose windows have the same start."""
        starts = {self.window(slots).start for slots in (0, 1)}
        if len(starts) > 1 or student.start not in starts:
            yield None
            return
        every = tuple(self.window(slots) for slots in (0, 1))
        if self._teacher is None:
            with torch.autocast("cpu", torch.bfloat16):
                states = self._exits.enter_context(
                    cache_teacher_states(
                        self.model,
                        self.batches,
                        student.start,
                        after=every,
                        hardware=HardwareConfig(state_memory=2**34),
                    )
                )
            self._teacher = every, states.batches
        compared = tuple(student.windows) if settings.objective.needs_states else ()
        indices = [every.index(window) for window in compared]
        cached_batches = [replace(b, after=tuple(b.after[k] for k in indices)) for b in self._teacher[1]]
        yield TeacherCache(student.start, compared, True, cached_batches)


def choose(model: Any, text: TrainingText, size: int) -> range:
    """Return the window with the lowest KL on validation text after closed-form repair."""
    few = text.train[: CHOOSING // text.train.shape[1]]
    length = len(find_stack(model))
    measured = profile(model, split_into_batches(few, 4))
    search = WindowSearch(shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows_of_size(length, size), length, profile=measured))
    fit, held_out = split_held_out(few)
    parts = (split_into_batches(part, 4) for part in (fit, held_out, text.validation))
    return verify_shortlist(model, shortlist, *parts)[0].windows[0]


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown, sorted by mean perplexity ratio."""
    original, rows = content["original"], content["rows"]
    domains, tasks = list(original["perplexity"]), list(original["accuracy"])
    ordered = sorted(rows, key=lambda name: rows[name]["mean_perplexity_ratio"])
    head = ["recipe", "perplexity ratio, mean", *domains, "KL", "top-1", "retained", "parameters", "minutes"]
    lines = [
        f"SmolLM2-135M-Instruct, {REMOVED} of 30 blocks removed (one more by block replacements), "
        f"{content['tokens']:,} tokens of training text, one epoch, seed 0. Perplexity ratios, KL (nats per token) and "
        "top-1 agreement with the original are on held-out text. 'Retained' is the mean retained fraction of the "
        f"accuracy above chance over {', '.join(original['counted'])}, with its standard error. Minutes: fit and "
        "training on a CPU, on a machine with other load.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for name in ordered:
        row = rows[name]
        ratios = [f"{row['perplexity_ratio'][domain]:.2f}" for domain in domains]
        kept = row["mean_retained"]
        retained = "" if kept is None else f"{kept:.1%} ± {row['mean_retained_standard_error']:.1%}"
        minutes = sum(row["minutes"].values())
        cells = [
            LABELS.get(name, name),
            f"**{row['mean_perplexity_ratio']:.3f}**",
            *ratios,
            f"{row['kl']:.3f}",
            f"{row['top1']:.1%}",
        ]
        lines.append("| " + " | ".join([*cells, retained, f"{row['parameters'] / 1e6:.1f} M", f"{minutes:.0f}"]) + " |")
    lines += ["", "Accuracy by task:", "", "| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines.append("| chance | " + " | ".join(f"{original['chance'][task]:.1%}" for task in tasks) + " |")
    for name, row in [("original", original), *((name, rows[name]) for name in ordered)]:
        lines.append(
            f"| {LABELS.get(name, name)} | " + " | ".join(f"{row['accuracy'][task]:.1%}" for task in tasks) + " |"
        )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

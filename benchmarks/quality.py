"""What each recipe makes of SmolLM2-135M-Instruct with 8 of its 30 blocks' worth gone.

    python -m benchmarks.quality [--data FOLDER] [--tokens 500000] [--recipes NAME;...] [--items N]

Every recipe is given the same training text of five domains, seen once, and the same window; one whose stand-in is
itself a block gives up one block more. A closed form is fitted on all of the text; what is trained is started on the
first fifth, and makes the same steps of the same batches. Matrix products that fit or train are in bfloat16, sums in
float64. Scores are on held-out text and on multiple-choice tasks that nothing was chosen or fitted on
(`benchmarks.quality_scores`). A row goes to ``benchmarks/results/quality.json`` as soon as it is done, a training that
was interrupted goes on where it was, and the table goes to ``benchmarks/results/quality.md``. All rows take about four
hours on two cores.
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
    PRESETS,
    BlockConfig,
    CompressionConfig,
    DistillationConfig,
    FoldedConfig,
    HardwareConfig,
    HealingConfig,
    LinearConfig,
    MergedConfig,
    NoneConfig,
    ReplacementConfig,
    SwiGLUConfig,
    Trained,
    WindowSearch,
    fit_windows,
    profile,
    student_of,
    train,
    verified,
)
from streamline_hooks.batch import batches_of
from streamline_hooks.preparation import held_out_apart
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.repair import Student
from streamline_hooks.repair.teacher import Taught, TaughtStates, taught_states
from streamline_hooks.selection import windows
from streamline_hooks.stack import find_stack

FILE = RESULTS / "quality.json"
REMOVED, BATCH, SHORTLIST = 8, 1, 8
CHOOSING = 40_960  # tokens that the window is chosen on
STARTING = 0.2  # share of the text that what is trained afterwards is started on


@dataclass(frozen=True)
class Recipe:
    """What stands in the window's place, how it is trained, and what is healed besides."""

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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names, with a semicolon between two")
    parser.add_argument("--items", type=int, help="questions a task, the same for all but BLiMP")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    bench = Bench(options)
    for name in filter(None, options.recipes.split(";")):
        bench.row(name.strip())
    print(table(bench.content))


class Bench:
    """The model twice, once to be changed, the text, and the rows so far."""

    def __init__(self, options: Any) -> None:
        self.options, self.file = options, options.results
        original, tokenizer = load_pretrained("smollm2")
        self.quality = Quality(original, tokenizer, options.data, items=options.items, sequences=options.sequences)
        self.model = load_pretrained("smollm2")[0]
        self.stack = find_stack(self.model)
        self.text = training_text(options.data, tokenizer, options.tokens)
        self.batches = batches_of(self.text.train, BATCH)
        self.validation = batches_of(self.text.validation, BATCH)
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"rows": {}}
        command = f"python -m benchmarks.quality --tokens {options.tokens}"
        command += "" if options.items is None else f" --items {options.items}"
        self.content |= {
            "command": command,
            "tokens": self.text.train.numel(),
            "shares": self.text.shares,
            "original": self.quality.original_row(),
        }
        self._taught: tuple[tuple[range, ...], list[Taught]] | None = None
        self._exits = ExitStack()

    def window(self, slots: int) -> range:
        """The window of as many blocks, chosen once by the verified shortlist."""
        known = self.content.setdefault("windows", {})
        if str(slots) not in known:
            known[str(slots)] = choose(self.model, self.text, REMOVED + slots).start
            write(self.file, self.content)
        return range(known[str(slots)], known[str(slots)] + REMOVED + slots)

    def row(self, name: str) -> None:
        """Make a row, unless it is there."""
        if name in self.content["rows"]:
            return
        recipe, started = RECIPES[name], time.time()
        window = self.window(recipe.repair.slots)
        share = 1.0 if recipe.distillation is None and recipe.repair != NoneConfig() else STARTING
        rows = self.text.train[: round(share * len(self.text.train))]
        fit, held_out = (batches_of(part, 4) for part in held_out_apart(rows))
        with torch.autocast("cpu", torch.bfloat16):
            (repair,) = fit_windows(self.model, [window], recipe.repair, fit, held_out)
        fitted = time.time()
        student = student_of(self.stack, [(window, repair.stand_in)], recipe.healing)
        trained = None if recipe.distillation is None else self.trained(name, student, recipe.distillation)
        student.merge()
        student.training = False
        done = time.time()
        with student.opened():
            scores = self.quality.row(self.model)
        parameters = {id(p): p.numel() for p in self.model.parameters()}
        gone = sum(self.stack.parameters_per_block[k] for k in window)
        added = recipe.repair.size(self.stack, window).parameters
        self.content["rows"][name] = {
            "kind": str(recipe.repair),
            "objective": None if recipe.distillation is None else str(recipe.distillation.objective),
            "healing": None if recipe.healing is None else repr(recipe.healing),
            "window": [window.start, window.stop],
            "parameters": sum(parameters.values()) - gone + added,
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

    def trained(self, name: str, student: Student, settings: DistillationConfig) -> Trained:
        """Train on the whole text once, in products of bfloat16, and go on where an earlier run was interrupted."""
        file = ROOT / "build" / "quality" / f"{name.replace(' ', '-')}.training"
        with self.taught(student, settings) as taught:
            trained = train(
                student,
                self.batches,
                self.validation,
                settings,
                taught=taught,
                resume=file.exists(),
                say=print,
                checkpoint=file,
                hardware=HardwareConfig(autocast="bfloat16", state_memory=2**34),
            )
        if trained.stopped:
            raise SystemExit(f"{name} was not trained to its end: {trained.stopped}. Run it again to go on.")
        file.unlink()
        return trained

    @contextmanager
    def taught(self, student: Student, settings: DistillationConfig) -> Iterator[TaughtStates | None]:
        """The original's states on the text, which recipes for windows of one start share."""
        starts = {self.window(slots).start for slots in (0, 1)}
        if len(starts) > 1 or student.start not in starts:
            yield None
            return
        every = tuple(self.window(slots) for slots in (0, 1))
        if self._taught is None:
            with torch.autocast("cpu", torch.bfloat16):
                states = self._exits.enter_context(
                    taught_states(self.model, self.batches, student.start, after=every, memory=2**34)
                )
            self._taught = every, states.batches
        compared = tuple(student.windows) if settings.objective.needs_states else ()
        places = [every.index(window) for window in compared]
        found = [replace(b, after=tuple(b.after[k] for k in places)) for b in self._taught[1]]
        yield TaughtStates(student.start, compared, True, found)


def choose(model: Any, text: TrainingText, size: int) -> range:
    """The window that is repaired best in closed form, by KL on the validation text."""
    few = text.train[: CHOOSING // text.train.shape[1]]
    length = len(find_stack(model))
    measured = profile(model, batches_of(few, 4))
    search = WindowSearch(shortlist=SHORTLIST)
    shortlist = search.find(search.problem(windows(length, size), length, profile=measured))
    fit, held_out = held_out_apart(few)
    parts = (batches_of(part, 4) for part in (fit, held_out, text.validation))
    return verified(model, shortlist, *parts)[0].windows[0]


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown, the lowest mean ratio first."""
    original, rows = content["original"], content["rows"]
    domains, tasks = list(original["perplexity"]), list(original["accuracy"])
    ordered = sorted(rows, key=lambda name: rows[name]["mean_perplexity_ratio"])
    head = ["recipe", "perplexity ratio, mean", *domains, "KL", "top-1", "retained", "parameters", "minutes"]
    lines = [
        f"SmolLM2-135M-Instruct, {REMOVED} of 30 blocks' worth gone, {content['tokens']:,} tokens of training text "
        "seen once. Perplexity ratios, KL (nats a token) and top-1 agreement with the original are on held-out text; "
        "'retained' is the mean share of the accuracy above chance that is kept, over "
        f"{', '.join(original['counted'])}, with its standard error. Minutes: fitting and training, beside whatever "
        "else the machine did.",
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
        cells = [name, f"**{row['mean_perplexity_ratio']:.3f}**", *ratios, f"{row['kl']:.3f}", f"{row['top1']:.1%}"]
        lines.append("| " + " | ".join([*cells, retained, f"{row['parameters'] / 1e6:.1f} M", f"{minutes:.0f}"]) + " |")
    lines += ["", "Accuracy by task:", "", "| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines.append("| chance | " + " | ".join(f"{original['chance'][task]:.1%}" for task in tasks) + " |")
    for name, row in [("original", original), *((name, rows[name]) for name in ordered)]:
        lines.append(f"| {name} | " + " | ".join(f"{row['accuracy'][task]:.1%}" for task in tasks) + " |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

"""Measure on one scale what repairs retain of SmolLM2-135M-Instruct or another model.

    python -m benchmarks.retained_quality [--data FOLDER] [--model MODEL] [--recipes best,block,...] [--removed 8]
        [--tokens 200704] [--seeds 0] [--final]

A recipe is a setting of the preset `best`, or the repair and training of another preset, by its name. It trains for one
epoch on equal parts of all training domains but one, which the seed determines (`LEFT_OUT`), so that each row has
scores on known and on unknown text. The blocks are chosen on the same text by a verified shortlist, so that recipes are
compared in the same window; recipes *in the cosine window* remove the window of highest cosine similarity, as
LLM-Streamline does. For the choice between recipes, a row has the KL divergence from the original on validation
documents and on documents of the left-out domain, both from the training text, and synthetic problems of the
development draw. With ``--final`` it also has the KL divergence and perplexity on the held-out text of each domain, and
problems, last words and multiple-choice questions of another draw, from which no choice may be made. Short problems
occur in both draws (up to a quarter of the arithmetic), but never in the training text. The recipe `control` trains the
blocks from the cut on in the original without removing any. A row without final scores is trained again for them, so
pass ``--final`` at once to rows that need both.

Minutes are CPU time on one thread, without the choice of the blocks. Each row is saved to
``benchmarks/results/retained_quality.json`` (of another model: ``retained_quality_NAME``) when it is finished, and the
table to the same name with ``.md``. Several processes may make different rows of one file at the same time. Interrupted
training runs are resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import benchmarks.losses  # noqa: F401 (registers the losses of recipes)
from benchmarks.baselines import BASELINES
from benchmarks.generation_numbers import mean_of, pass_of
from benchmarks.muon import muon_instead_of_adamw
from benchmarks.quality_scores import CLEARLY, write
from benchmarks.real_text import RESULTS, ROOT, SEQUENCE, arguments, heldout
from benchmarks.scored_tasks import LAST_WORD, SAMPLED, SAMPLES, ScoredTasks
from benchmarks.short_answers import fast_products, products, sets_of
from benchmarks.timing import machine
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import (
    CompressionConfig,
    DistillationConfig,
    HealingConfig,
    LayerSurgeon,
    fit_windows,
    profile,
    train,
    verify_shortlist,
)
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig, split_into_batches, texts_digest, weights_digest
from streamline_hooks.data import TokenSplit, with_repeated_passages
from streamline_hooks.distillation import Student, TeacherCache, cache_teacher_states, student_of
from streamline_hooks.evaluation import (
    Agreement,
    Estimate,
    PairedScores,
    Perplexity,
    compare_logits,
    paired_bootstrap,
    perplexity,
    relative_accuracy,
    run_paired,
    score_tokens,
)
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.pipeline import split_held_out
from streamline_hooks.repair import (
    BlockConfig,
    FoldedConfig,
    LinearConfig,
    MergedConfig,
    NoneConfig,
    ReplacementConfig,
    SilencedConfig,
    insert_replacement,
    replace_branches,
)
from streamline_hooks.selection import AttentionSearch, MLPSearch, WindowSearch, windows_of_size

FILE = RESULTS / "retained_quality.json"
LEFT_OUT = ("peps", "fiction_austen_doyle", "blog_18f")  # by seed
QUESTIONS = ("arc_easy", "commonsense_qa", "copa", "hellaswag", "piqa", "winograd_wsc", "blimp")
DEVELOPMENT, FINAL = "development", "0"  # draws
DEVELOPMENT_ITEMS, FINAL_ITEMS = 60, 300
PASS_AT = (1, SAMPLES)
HELDOUT_SEQUENCES, UNSEEN_SEQUENCES = 6, 16
CHOOSING, SHORTLIST = 40_960, 8  # tokens and windows for the choice of the blocks
STARTING = 0.2  # fraction of the text for the initial fit
SEARCHES = {"attention": AttentionSearch, "mlp": MLPSearch}
HARDWARE = HardwareConfig(autocast="bfloat16" if products() == "bfloat16" else None, state_memory=2**33)
BEST = CompressionConfig.preset("best")
SETTINGS = replace(BEST.distillation or DistillationConfig(), validations=4)


PUBLISHED = ("llm-streamline-ffn", "llm-streamline-layer", *BASELINES, "none")  # presets
COSINE = "in the cosine window"


@dataclass(frozen=True)
class Recipe:
    """A repair; the defaults are those of the preset `best`.

    Attributes
    ----------
    repair, distillation, healing : optional
    removes : bool
        False for the control, which trains the blocks from the cut on without removing any.
    muon : bool
        Whether matrices are trained by `benchmarks.muon` instead of AdamW.
    sequence : int, optional
        Tokens of each training sequence, into which the same training text is divided; by default those of all other
        sequences.
    repeated : float
        Fraction of the training sequences whose second half is replaced by their first half.
    branches : mapping of str to int
        Numbers of attention and MLP branches to zero instead of removing blocks. Each is replaced by a linear map, and
        all blocks from the first one on are healed.
    quantized : bool
        Whether teacher and student have weights of 4 bits (NF4). The adapters are added to the original weights.
    window : {"verified", "cosine"}
        Whether the window is the best of a verified shortlist or the one of highest cosine similarity.
    """

    repair: ReplacementConfig = BEST.repair
    distillation: DistillationConfig | None = SETTINGS
    healing: HealingConfig | None = BEST.healing
    removes: bool = True
    muon: bool = False
    sequence: int | None = None
    repeated: float = 0.0
    branches: Mapping[str, int] = field(default_factory=dict)
    quantized: bool = False
    window: Literal["verified", "cosine"] = "verified"

    @classmethod
    def of_preset(cls, name: str) -> Recipe:
        """Return the repair, training and healing of a preset."""
        config = CompressionConfig.preset(name)
        training = None if config.distillation is None else replace(config.distillation, validations=4)
        return cls(config.repair, training, config.healing)


RECIPES: dict[str, Recipe] = {
    "control": Recipe(removes=False),
    "best": Recipe(),
    "block": Recipe(BlockConfig()),
    "silenced": Recipe(SilencedConfig()),
    "folded": Recipe(FoldedConfig()),
    "linear": Recipe(LinearConfig()),
    "closed form": Recipe(LinearConfig(), None, None),
    "KL alone": Recipe(distillation=replace(SETTINGS, loss={"kl": 1.0})),
    "a quarter of the LM loss": Recipe(distillation=replace(SETTINGS, loss={"kl": 1.0, "lm": 0.25})),
    "KL alone without healing": Recipe(distillation=replace(SETTINGS, loss={"kl": 1.0}), healing=None),
    "without healing": Recipe(healing=None),
    "all blocks healed": Recipe(healing=replace(BEST.healing or HealingConfig(), where="all")),
    "all blocks healed by LoRA": Recipe(healing=HealingConfig("lora", learning_rate_ratio=0.2)),
    "all blocks healed by LoRA on 4-bit weights": Recipe(
        healing=HealingConfig("lora", learning_rate_ratio=0.2), quantized=True
    ),
    "absolute rates": Recipe(distillation=replace(SETTINGS, scale_parameter=False)),
    "lower learning rate": Recipe(distillation=replace(SETTINGS, learning_rate=5e-4)),
    "learning rate 2e-4": Recipe(distillation=replace(SETTINGS, learning_rate=2e-4)),
    "learning rate 1e-4": Recipe(distillation=replace(SETTINGS, learning_rate=1e-4)),
    "with the state after the window": Recipe(
        distillation=replace(SETTINGS, loss={"kl": 1.0, "lm": 1.0, "relative": 1.0})
    ),
    "Muon": Recipe(muon=True),
    "KL of top tokens": Recipe(distillation=replace(SETTINGS, loss={"top_tokens": 1.0, "lm": 1.0})),
    "KL of damaged tokens": Recipe(distillation=replace(SETTINGS, loss={"damaged_tokens": 1.0, "lm": 1.0})),
    "a quarter repeats passages": Recipe(repeated=0.25),
    "half repeats passages": Recipe(repeated=0.5),
    "attention and MLP of 8 blocks each": Recipe(branches={"attention": 8, "mlp": 8}),
    "MLP of 11 blocks": Recipe(branches={"mlp": 11}),
    "attention of 16 blocks": Recipe(branches={"attention": 16}),
    "sequences of 256": Recipe(sequence=256),
    "sequences of 1024": Recipe(sequence=1024),
    "merged": Recipe(MergedConfig(weight=1 / 9), None, None),
    **{name: Recipe.of_preset(name) for name in PUBLISHED},
}
RECIPES |= {
    f"{name} {COSINE}": replace(RECIPES[name], window="cosine") for name in ("closed form", "merged", *PUBLISHED)
}
COMPARED = ("best", "block", "closed form", *(f"{name} {COSINE}" for name in PUBLISHED))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="another model: a folder or a GGUF file")
    parser.add_argument("--recipes", default=",".join(COMPARED), help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--removed", default="8", help="numbers of removed blocks")
    parser.add_argument("--tokens", default="200704", help="numbers of training tokens")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--final", action="store_true", help="score the rows on held-out text and questions too")
    options = parser.parse_args()
    if unknown := set(options.recipes.split(",")) - RECIPES.keys():
        parser.error(f"unknown recipes: {', '.join(sorted(unknown))}; expected one or more of {', '.join(RECIPES)}")
    bench = Bench(options)
    for removed, tokens, seed, name in (
        (removed, tokens, seed, name)
        for removed in map(int, options.removed.split(","))
        for tokens in map(int, options.tokens.split(","))
        for seed in map(int, options.seeds.split(","))
        for name in options.recipes.split(",")
    ):
        removed = 0 if RECIPES[name].branches else removed
        bench.row(Run(name, removed, tokens, seed), options.final)
    print(table(bench.content))


@dataclass(frozen=True)
class Run:
    """Identity of a row."""

    recipe: str
    removed: int
    tokens: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.recipe} | {self.removed} | {self.tokens} | {self.seed}"

    @property
    def left_out(self) -> str:
        """The domain that the training text does not have."""
        return LEFT_OUT[self.seed % len(LEFT_OUT)]


class Bench:
    """The original, a model to change, and the finished rows."""

    def __init__(self, options: Any) -> None:
        self.data, self.source = options.data, options.model
        is_default = options.model == "smollm2"
        name = Path(options.model).name.removesuffix(".gguf")
        self.file = FILE if is_default else FILE.with_name(f"{FILE.stem}_{name}.json")
        self.original, self.tokenizer = load_pretrained(options.model, torch.float32)
        self.model = load_pretrained(options.model, torch.float32)[0]
        self.stack = find_stack(self.model)
        self.content: dict[str, Any] = {"blocks": {}, "originals": {}, "rows": {}}
        self.content |= {"machine": machine(), "model": name, "length": len(self.stack)}
        self.content["source"] = texts_digest([weights_digest(self.original), *map(_digest, _files(self.data))])
        self.tasks: dict[str, ScoredTasks] = {}
        self.shared = SharedStates()

    def read(self) -> None:
        """Add what other processes have stored in the file since."""
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            if stored.get("source", self.content["source"]) != self.content["source"]:
                raise SystemExit(
                    f"{self.file} has rows of another model or of other texts. Expected those of {self.source} and "
                    f"{self.data}. Rename the model or the file."
                )
            for part in ("blocks", "originals", "rows"):
                self.content[part] |= stored[part]

    def store(self, part: str, name: str, value: Any) -> None:
        """Add a value to a part of the file, and write the table, while no other process does."""
        with (self.work_folder() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            self.content[part][name] = value
            write(self.file, self.content)
            if self.content["rows"]:
                self.file.with_suffix(".md").write_text(table(self.content))

    def row(self, run: Run, final: bool) -> None:
        """Make a row, unless it is finished."""
        self.read()
        row = self.content["rows"].get(run.key)
        if row is None or (final and "final" not in row):
            self.store("rows", run.key, self.make(run, final))
            self.training_file(run).unlink(missing_ok=True)

    def make(self, run: Run, final: bool) -> dict[str, Any]:
        """Repair the model and score it."""
        recipe = RECIPES[run.recipe]
        text = training_text(self.data, self.tokenizer, max(run.tokens, 20 * SEQUENCE), run.seed, left_out=run.left_out)
        count = run.tokens // SEQUENCE
        text = replace(text, train=text.train[:count], domains=text.domains[:count])
        window = self.window(run, text)
        if recipe.sequence is not None:
            text = replace(text, train=divided(text, recipe.sequence))
        if recipe.repeated:
            split = TokenSplit(text.train, text.validation, text.validation, fingerprint="")
            text = replace(text, train=with_repeated_passages(split, recipe.repeated).calibration)
        began, is_resumed = time.process_time(), self.training_file(run).exists()
        student, choosing = self.student(recipe, run, window, text)
        report, saved = None, -choosing
        if recipe.distillation is not None:
            if not (recipe.distillation.objective.needs_states or recipe.branches or recipe.quantized):
                key = (run.seed, run.tokens, recipe.sequence, recipe.repeated, student.start)
                saved += self.shared.give(student, split_into_batches(text.train, 1), key)
            with muon_instead_of_adamw() if recipe.muon else nullcontext():
                trained = train(
                    student,
                    split_into_batches(text.train, 1),
                    split_into_batches(text.validation, 2),
                    recipe.distillation.seeded(run.seed),
                    hardware=HARDWARE,
                    checkpoint_file=self.training_file(run),
                    resume=is_resumed,
                )
            if trained.stopped:
                raise SystemExit(f"{run.key}: training stopped early: {trained.stopped}. Run the command to resume.")
            report = trained.report()
        minutes = None if is_resumed else (time.process_time() - began + saved) / 60
        with self.changed_model(recipe, student) as model:
            weights = sum(p.numel() for p in find_stack(model).container.parameters())
            weights -= unused_weights(model) if recipe.branches else 0
            row = {
                "recipe": run.recipe,
                "removed": run.removed if recipe.removes and not recipe.branches else 0,
                "tokens": run.tokens,
                "seed": run.seed,
                "left_out": run.left_out,
                "window": None if recipe.branches else [window.start, window.stop],
                "kept": weights / sum(p.numel() for p in find_stack(self.original).container.parameters()),
                "training": report,
                "minutes": minutes,
                "products": products(),
                "development": self.score_development(model, run, text),
            }
            return row | ({"final": self.score_final(model)} if final else {})

    @contextmanager
    def changed_model(self, recipe: Recipe, student: Student) -> Iterator[Any]:
        """Yield the model with the changes of a trained student, for the duration of the context.

        A student that was trained on weights of 4 bits changes the model in full precision.
        """
        if not recipe.quantized:
            student.merge()
            student.training = False
            with student.applied():
                yield student.model
            return
        model = load_pretrained(self.source, torch.float32)[0]
        student.add_adapters_to(model)
        with LayerSurgeon(model) as surgeon:
            for window, module in student.replacement_modules:
                insert_replacement(surgeon, window, module)
            surgeon.commit()
        yield model

    def window(self, run: Run, text: TrainingText) -> range:
        """Return the window to remove, chosen once for each seed, number of blocks, text and way to choose."""
        recipe = RECIPES[run.recipe]
        size = run.removed + recipe.repair.slots
        key = f"{size} blocks, {run.tokens} tokens, seed {run.seed}"
        key += ", cosine" if recipe.window == "cosine" else ""
        if key not in self.content["blocks"]:
            choose = cosine_window if recipe.window == "cosine" else choose_window
            chosen = choose(self.model, text, size)
            self.store("blocks", key, [chosen.start, chosen.stop])
        return range(*self.content["blocks"][key])

    def student(self, recipe: Recipe, run: Run, window: range, text: TrainingText) -> tuple[Student, float]:
        """Return the student before training and the CPU seconds that the choice of branches took.

        For the control it is the original with the same trained blocks.
        """
        if recipe.branches:
            assert recipe.healing is not None
            model = load_pretrained(self.source, torch.float32)[0]
            began = time.process_time()
            first = zero_branches(model, recipe.branches, text)
            healing = replace(recipe.healing, where="last", count=len(self.stack) - first)
            student = student_of(find_stack(model), [], healing, seed=run.seed, teacher=self.original)
            return student, time.process_time() - began
        if not recipe.removes:
            assert recipe.healing is not None
            healing = replace(recipe.healing, where="last", count=len(self.stack) - window.start)
            return student_of(self.stack, [], healing, seed=run.seed), 0.0
        model = quantized(self.original) if recipe.quantized else self.model
        stack = find_stack(model)
        is_fitted_only = recipe.distillation is None and recipe.repair != NoneConfig()
        share = 1.0 if is_fitted_only else STARTING
        rows = text.train[: max(16, round(share * len(text.train)))]
        fit, held_out = (split_into_batches(part, 4) for part in split_held_out(rows))
        with fast_products(model):
            (repair,) = fit_windows(model, [window], recipe.repair, fit, held_out)
        return student_of(stack, [(window, repair.replacement_module)], recipe.healing, seed=run.seed), 0.0

    def score_development(self, model: nn.Module, run: Run, text: TrainingText) -> dict[str, Any]:
        """Score a model on what may be used for choices."""
        unseen = training_text(self.data, self.tokenizer, UNSEEN_SEQUENCES * SEQUENCE, only=run.left_out).train
        kl = {
            name: agreement(model, self.original, split_into_batches(rows, 4))[0].kl
            for name, rows in (("seen", text.validation), ("unseen", unseen))
        }
        tasks = self.tasks_of(DEVELOPMENT, DEVELOPMENT_ITEMS)
        return {"kl": kl, "right": tasks.score(model), "chance": tasks.chance, "original": self.answers_of(tasks)}

    def score_final(self, model: nn.Module) -> dict[str, Any]:
        """Score a model on held-out text and on the questions of another draw."""
        text: dict[str, Any] = {}
        for name, batches in heldout(self.data, self.tokenizer, HELDOUT_SEQUENCES).items():
            compared, own = agreement(model, self.original, batches)
            ratio = own.value / self.perplexity_of_original(name, batches)
            text[name] = {"kl": compared.kl, "top1": compared.top1, "perplexity_ratio": ratio}
        tasks = self.tasks_of(FINAL, FINAL_ITEMS)
        return {
            "text": text,
            "right": tasks.score(model),
            "chance": tasks.chance,
            "original": self.answers_of(tasks),
            "sampled": tasks.sample(model),
            "chance_of_pass": {str(k): tasks.chance_of_pass(k) for k in PASS_AT},
            "original_sampled": self.samples_of(tasks),
        }

    def tasks_of(self, draw: str, items: int) -> ScoredTasks:
        if draw not in self.tasks:
            self.tasks[draw] = ScoredTasks(self.data, self.tokenizer, items, draw, questions=QUESTIONS)
        return self.tasks[draw]

    def answers_of(self, tasks: ScoredTasks) -> str:
        """Return the name under which the answers of the original are stored; the original answers once.

        Rows and answers whose name does not end with the precision of the questions answered them in float32.
        """
        precision = f", questions in {products()}" if tasks.questions else ""
        return self._of_original(f"{self._draw(tasks)}, {products()}{precision}", tasks.score)

    def samples_of(self, tasks: ScoredTasks) -> str:
        """Return the name under which the sampled answers of the original are stored."""
        return self._of_original(f"{self._draw(tasks)}, sampled, {products()}", tasks.sample)

    def _draw(self, tasks: ScoredTasks) -> str:
        return next(draw for draw, own in self.tasks.items() if own is tasks)

    def _of_original(self, name: str, score: Callable[[nn.Module], Any]) -> str:
        self.read()
        if name not in self.content["originals"]:
            self.store("originals", name, score(self.original))
        return name

    def perplexity_of_original(self, domain: str, batches: Sequence[Any]) -> float:
        """Return the perplexity of the original on a domain, measured once."""
        name = f"perplexity, {products()}"
        known = self.content["originals"].get(name, {})
        if domain not in known:
            with fast_products(self.original):
                known = known | {domain: perplexity(self.original, batches, domain).value}
            self.store("originals", name, known)
        return float(known[domain])

    def work_folder(self) -> Path:
        folder = ROOT / "build" / self.file.stem
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def training_file(self, run: Run) -> Path:
        return self.work_folder() / f"{run.key.replace(' ', '')}.training"


def _files(data: Path) -> list[Path]:
    """Return the files of training text, held-out text and questions."""
    return [path for part in ("text", "bench") for path in sorted((data / part).rglob("*")) if path.is_file()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quantized(model: Any) -> Any:
    """Return a copy of a model with weights of 4 bits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).eval()


def divided(text: TrainingText, sequence: int) -> Tensor:
    """Return the training text in sequences of another length; several sequences are joined within their domain.

    The sequences of a domain follow each other in `TrainingText.train` in the order of the domain's text.
    """
    rows, length = text.train, text.train.shape[1]
    if sequence <= length:
        return rows.reshape(-1, sequence)
    joined = []
    for domain in text.domains.unique():
        own = rows[text.domains == domain]
        joined.append(own[: len(own) // (sequence // length) * (sequence // length)].reshape(-1, sequence))
    positions = torch.cat([torch.linspace(0, 1, len(own) + 2)[1:-1] for own in joined])
    return torch.cat(joined)[positions.argsort(stable=True)]


def unused_weights(model: nn.Module) -> int:
    """Return the number of weights in the children of blocks whose outputs a zeroed projection removes."""
    children = (child for block in find_stack(model) for child in block.children())
    return sum(
        sum(p.numel() for p in child.parameters())
        for child in children
        if any(p.ndim > 1 and not p.any() for p in child.parameters())
    )


def zero_branches(model: nn.Module, counts: Mapping[str, int], text: TrainingText) -> int:
    """Zero attention and MLP branches of a model in place, with a linear map for each; return the first changed block.

    For each of the two the best of a shortlist is taken, in the order of `counts`, as in `choose_window`.
    """
    first = len(find_stack(model))
    few = text.train[: len(text.train) * CHOOSING // text.train.numel()]
    split = TokenSplit(few, text.validation, text.validation, fingerprint="")
    repeated = with_repeated_passages(split, BEST.data.repeated_context)
    for branch, count in counts.items():
        stack = find_stack(model)
        search = SEARCHES[branch](shortlist=SHORTLIST)
        batches = split_into_batches(repeated.calibration, 4)
        with fast_products(model):
            problem = search.problem(windows_of_size(len(stack), count), len(stack), model=model, batches=batches)
            parts = (*split_held_out(few), repeated.validation)
            best = verify_shortlist(model, search.find(problem), *(split_into_batches(part, 4) for part in parts))[0]
        with LayerSurgeon(model) as surgeon:
            replace_branches(surgeon, best.maps)
            for block, zeroed in best.zeroed:
                surgeon.zero_branch(block, zeroed)
            surgeon.commit()
        first = min(first, *(block for block, _ in best.zeroed))
    return first


class SharedStates:
    """States of the original on the training text, which the runs on the same text from the same block share."""

    def __init__(self) -> None:
        self.opened, self.key, self.seconds = ExitStack(), (), 0.0
        self.cache: TeacherCache | None = None

    def give(self, student: Student, batches: Sequence[Any], key: tuple[Any, ...]) -> float:
        """Give the states to a student; return the CPU seconds that an earlier run spent on them."""
        spent = self.seconds
        if key != self.key:
            self.opened.close()
            began = time.process_time()
            with fast_products(student.model):
                cached = cache_teacher_states(student.model, batches, student.start, hardware=HARDWARE)
                self.cache = self.opened.enter_context(cached)
            self.key, self.seconds, spent = key, time.process_time() - began, 0.0
        student.teacher_cache = self.cache
        return spent


def choose_window(model: nn.Module, text: TrainingText, size: int) -> range:
    """Return the best window of a shortlist, ranked on repeated passages and repaired in closed form."""
    few = len(text.train) * CHOOSING // text.train.numel()
    split = TokenSplit(text.train[:few], text.validation, text.validation, fingerprint="")
    repeated = with_repeated_passages(split, BEST.data.repeated_context)
    length, search = len(find_stack(model)), WindowSearch(shortlist=SHORTLIST)
    with fast_products(model):
        measured = profile(model, split_into_batches(repeated.calibration, 4))
        shortlist = search.find(search.problem(windows_of_size(length, size), length, profile=measured))
        parts = (*split_held_out(text.train[:few]), repeated.validation)
        return verify_shortlist(model, shortlist, *(split_into_batches(part, 4) for part in parts))[0].windows[0]


def cosine_window(model: nn.Module, text: TrainingText, size: int) -> range:
    """Return the window of highest cosine similarity between the hidden states before and after it (LLM-Streamline)."""
    few = len(text.train) * CHOOSING // text.train.numel()
    length, search = len(find_stack(model)), WindowSearch("cosine")
    with fast_products(model):
        measured = profile(model, split_into_batches(text.train[:few], 4))
    return search.find(search.problem(windows_of_size(length, size), length, profile=measured))[0].windows[0]


def agreement(model: nn.Module, original: nn.Module, batches: Sequence[Any]) -> tuple[Agreement, Perplexity]:
    """Return the agreement of two models on text, and the perplexity of the first."""
    compared, own = Agreement(), Perplexity()
    with (
        fast_products(model),
        fast_products(original),
        run_paired(model, original, batches, "text", Task("causal-lm")) as answers,
    ):
        for batch, output, *pair in answers:
            own += score_tokens(output.logits, batch["input_ids"], batch["attention_mask"])
            compared += compare_logits(*pair)
    return compared, own


def table(content: Mapping[str, Any]) -> str:
    """Return the rows as Markdown, by number of removed blocks and of training tokens."""
    groups: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}
    for run, row in sorted(
        ((_run_of(key), row) for key, row in content["rows"].items()), key=lambda pair: pair[0].seed
    ):
        groups.setdefault((run.removed, run.tokens), {}).setdefault(run.recipe, []).append(row)
    lines = [
        f"{content['model']}. Each recipe is trained without one domain per seed; *known* and *unknown* are the "
        "domains with and without training text. KL is in nats per token from the original. Classification "
        f"({', '.join(QUESTIONS)}) and generation (synthetic problems and last words) are the retained fraction of the "
        "accuracy above chance, over tasks on which the original is clearly above chance; *accuracy* is the ratio of "
        f"mean accuracies in classification. pass@k is the retained fraction, above guessing, of the probability that "
        f"one of k sampled answers to a problem is right, from {SAMPLES} answers to each of {SAMPLED} problems per "
        "kind. Columns of perplexity are ratios to that of the original. Intervals are 95 % bootstrap intervals over "
        "questions, passages and sets of problems with the same examples; they do not include the variance over seeds, "
        "each of which also leaves out another domain. Columns with *against best* are differences over the seeds that "
        "both rows have. Recipes *in the cosine window* remove the window of highest cosine similarity instead of "
        "the best of a verified shortlist. Rows with * were trained with the same rate for all matrices "
        "(`scale_parameter=False`), which makes no difference to `best` on SmolLM2 (*absolute rates* and *best* with "
        "50,176 tokens). In these rows, the unknown development text of seed 2 was drawn from a domain of which 12 % "
        "occurs in another one. *Kept weights* are those of the blocks with replacements, as a fraction of the "
        "original's blocks. Known text includes WikiText, which is tokenized in the training text and raw in the "
        "held-out text. Minutes are CPU time of one thread for fit and training, without the choice of the blocks. "
        "Matrix products of the answers are in bfloat16 where the CPU supports it; questions of earlier rows, by "
        "both models, in float32.",
    ]
    for (removed, tokens), rows in sorted(groups.items(), reverse=True):
        what = f"{removed} of {content['length']} blocks" if removed else "Branches instead of blocks"
        title = f"{what}, {tokens:,} training tokens"
        finals = {name: [row for row in own if "final" in row] for name, own in rows.items()}
        finals = {name: own for name, own in finals.items() if own}
        if finals:
            lines += ["", f"## {title}: held-out text and tasks", "", *_final_lines(content, finals)]
        lines += ["", f"## {title}: development", "", *_development_lines(content, rows)]
    command = "python -m benchmarks.retained_quality --recipes RECIPES --removed BLOCKS --tokens TOKENS [--final]"
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def _development_lines(content: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| recipe | seeds | KL, known | KL, unknown | by seed | against best | problems | validation KL | minutes |",
        f"|{'---|' * 9}",
    ]
    kl = {name: statistics.fmean(row["development"]["kl"]["unseen"] for row in own) for name, own in rows.items()}
    for name in sorted(rows, key=kl.__getitem__):
        own = rows[name]
        known, unknown = ([row["development"]["kl"][kind] for row in own] for kind in ("seen", "unseen"))
        problems = relative_accuracy(paired_scores(content, own, "development"), clearly=CLEARLY)["generation"]
        losses = [v["distance"] for row in own if row["training"] for v in [_best_validation(row)]]
        cells = [_name(name, own), _seeds(own), f"{statistics.fmean(known):.3f}", f"{kl[name]:.3f}"]
        cells.append(", ".join(f"{nats:.3f}" for nats in unknown))
        mine, best = _with_same_seeds(name, rows)
        by_row = [[row["development"]["kl"]["unseen"] for row in side] for side in (mine, best)]
        cells += [_difference(*by_row, ".3f") if best else "", _estimate(problems.above_chance)]
        cells += [f"{statistics.fmean(losses):.3f}" if losses else "", _minutes(own)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _final_lines(content: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| recipe | seeds | kept weights | KL, known | KL, unknown | against best | perplexity, known | perplexity, "
        "unknown | classification | accuracy | generation | against best | by seed "
        f"| {' | '.join(f'pass@{k}' for k in PASS_AT)} | minutes |",
        f"|{'---|' * (14 + len(PASS_AT))}",
    ]
    for name, own in rows.items():
        mine, best = _with_same_seeds(name, rows)
        kept = [row["kept"] for row in own if "kept" in row]
        cells = [_name(name, own), _seeds(own), f"{statistics.fmean(kept):.1%}" if kept else ""]
        for column, digits in (("kl", 3), ("perplexity_ratio", 2)):
            cells += [f"{statistics.fmean(_by_domain(own, column, unknown)):.{digits}f}" for unknown in (False, True)]
            if column == "kl":
                cells.append(
                    _difference(*(_by_domain(side, "kl", True) for side in (mine, best)), ".3f") if best else ""
                )
        scores = relative_accuracy(paired_scores(content, own, "final"), clearly=CLEARLY)
        classification, generation = scores["classification"], scores["generation"]
        by_seed = [
            relative_accuracy(paired_scores(content, [row], "final"), clearly=CLEARLY, draws=100)["generation"]
            for row in own
        ]
        cells += [_estimate(classification.above_chance), _estimate(classification.ratio)]
        cells.append(_estimate(generation.above_chance))
        cells.append("")
        if best:
            pair = (  # the precision of the questions may differ
                [task for task in paired_scores(content, side, "final") if task.group == "generation"]
                for side in (mine, best)
            )
            cells[-1] = _estimate(paired_bootstrap(*pair, clearly=CLEARLY)["generation"].above_chance)
        cells.append(", ".join("-" if s.above_chance is None else f"{s.above_chance.value:.0%}" for s in by_seed))
        cells += [
            _estimate(relative_accuracy(paired_samples(content, own, k), clearly=CLEARLY)["generation"].above_chance)
            for k in PASS_AT
        ]
        lines.append(f"| {' | '.join([*cells, _minutes(own)])} |")
    return lines


def _with_same_seeds(
    name: str, rows: Mapping[str, list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of a recipe and those of `best` with the same seeds; none if it is `best` or shares no seed."""
    seeds = {row["seed"] for row in rows.get("best", []) if name != "best"} & {row["seed"] for row in rows[name]}
    mine, best = ([row for row in rows[key] if row["seed"] in seeds] if seeds else [] for key in (name, "best"))
    return mine, best


def _name(recipe: str, rows: Sequence[dict[str, Any]]) -> str:
    """Mark a recipe that was trained before `DistillationConfig.scale_parameter`."""
    return f"{recipe} *" if any(row.get("absolute_rates", False) for row in rows) else recipe


def _by_domain(rows: Sequence[dict[str, Any]], column: str, unknown: bool) -> list[float]:
    """Return the scores on the held-out text of the domains without (`unknown`) or with training text."""
    return [
        score[column]
        for row in rows
        for domain, score in row["final"]["text"].items()
        if (domain == row["left_out"]) == unknown
    ]


def _difference(values: Sequence[float], other: Sequence[float], digits: str) -> str:
    return f"{statistics.fmean(values) - statistics.fmean(other):+{digits}}"


def _best_validation(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation with the lowest loss, whose weights were kept."""
    return min(row["training"]["history"], key=lambda validation: validation["validated"])


def paired_scores(content: Mapping[str, Any], rows: Sequence[dict[str, Any]], draw: str) -> list[PairedScores]:
    """Pair the scores of the original and of a recipe on each item, averaged over seeds."""
    paired = []
    for task in rows[0][draw]["right"]:
        sides = [
            [content["originals"][row[draw]["original"]][task] for row in rows],
            [row[draw]["right"][task] for row in rows],
        ]
        scores = [mean_of([list(map(float, bits)) for bits in side]) for side in sides]
        is_question = task in QUESTIONS
        sets = 0 if is_question or task == LAST_WORD else sets_of(len(scores[0]))  # problems with the same examples
        clusters = [k % sets for k in range(len(scores[0]))] if sets else []
        group = "classification" if is_question else "generation"
        paired.append(PairedScores(task, *scores, rows[0][draw]["chance"].get(task, 0.0), group, clusters))
    return paired


def paired_samples(content: Mapping[str, Any], rows: Sequence[dict[str, Any]], k: int) -> list[PairedScores]:
    """Pair the pass@k of the original and of a recipe on each problem, averaged over seeds."""
    paired, first = [], rows[0]["final"]
    for kind in first["sampled"]:
        sides = [
            [content["originals"][row["final"]["original_sampled"]][kind] for row in rows],
            [row["final"]["sampled"][kind] for row in rows],
        ]
        scores = [mean_of([[pass_of(right, SAMPLES, k) for right in counts] for counts in side]) for side in sides]
        clusters = [problem % sets_of(FINAL_ITEMS) for problem in range(len(scores[0]))]
        paired.append(PairedScores(kind, *scores, first["chance_of_pass"][str(k)][kind], "generation", clusters))
    return paired


def _run_of(key: str) -> Run:
    name, removed, tokens, seed = key.rsplit(" | ", 3)
    return Run(name, int(removed), int(tokens), int(seed))


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in sorted(rows, key=lambda row: row["seed"]))


def _estimate(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.1%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _minutes(rows: Sequence[dict[str, Any]]) -> str:
    minutes = [row["minutes"] for row in rows if row["minutes"] is not None]
    return f"{statistics.fmean(minutes):.0f}" if minutes else "-"


if __name__ == "__main__":
    main()

"""Measure tasks that need their prompt, with blocks skipped for prompts, on SmolLM2-135M-Instruct or another model.

    python -m benchmarks.prompt_skip [--data FOLDER] [--model MODEL] [--windows 20-29,22-29] [--items 60]
        [--draw development] [--variants trained,fitted,skipped,mapped,removed,best,streamline]
        [--shots 4] [--last-tokens 16] [--train-tokens 200704] [--learning-rate 0.0001] [--seed 0]

For each window the variants are scored greedily on synthetic problems and on the last words of held-out passages, and
on multiple-choice questions, whose context is the prompt: prompts skip the window with trained maps, with fitted maps
or without maps, or the window is removed with a fitted map or without one. For comparison the presets `best` and
`llm-streamline-layer` remove as many blocks, which they choose, and train on as many tokens. A row has the accuracy of
each task relative to the original, and the KL divergence by which `fit_prompt_skip` chooses windows;
`benchmarks.prompt_skip_cost` measures the time. Windows and settings are chosen on the draw ``development``, which has
problems only, because held-out text and questions must not be used for choices; the draws ``0``, ``1`` and ``2`` have
other problems, passages and questions and are combined in one table. With ``--draw 0,1,2`` a model is trained once and
scored on all three. Problems with more examples (``--shots``) have longer prompts, of which more tokens skip; they are
scored alone. The rows are saved to ``benchmarks/results/prompt_skip.json`` and ``.md`` (of another model:
``prompt_skip_NAME``), and those that exist are not measured again.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.quality_scores import write
from benchmarks.real_text import BATCH, RESULTS, arguments, split_of
from benchmarks.scored_tasks import SEEDS, ScoredTasks, share_right
from benchmarks.short_answers import SHOTS
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, DataConfig, DistillationConfig, LayerSurgeon, Target, compress
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.pipeline import EvaluationConfig, FittedPromptSkip, fit_prompt_skip
from streamline_hooks.repair import LinearConfig, fit_windows, insert_replacement
from streamline_hooks.surgery import LAST_TOKENS

FILE = RESULTS / "prompt_skip.json"
TOKENS = {"calibration_tokens": 32_768, "validation_tokens": 4_096, "test_tokens": 4_096}
QUESTIONS = ("arc_easy", "copa", "piqa")
UNMEASURED = EvaluationConfig(speed=False, generation=False)
VARIANTS = {
    "trained": "skipped, with trained maps",
    "fitted": "skipped, with maps",
    "skipped": "skipped",
    "mapped": "removed, with a map",
    "removed": "removed",
    "best": "removed by `best`",
    "streamline": "removed by LLM-Streamline",
}
PRESETS = {"best": "best", "streamline": "llm-streamline-layer"}  # they choose the blocks
TRAINED = {"trained", *PRESETS}
SKIPPING = {"trained", "fitted", "skipped"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="another model: a folder or a GGUF file")
    parser.add_argument("--windows", default="20-29,22-29", help="first and last skipped block of each window")
    parser.add_argument("--items", type=int, default=60, help="items per task")
    parser.add_argument("--draw", default="development", help=f"one or more of {', '.join(SEEDS)}")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of each window; all: {', '.join(VARIANTS)}")
    parser.add_argument("--shots", type=int, default=SHOTS, help="examples before each problem")
    parser.add_argument("--last-tokens", type=int, default=LAST_TOKENS, help="of a prompt that run every block")
    parser.add_argument("--train-tokens", type=int, default=200_704)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the maps")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    options = parser.parse_args()
    if unknown := set(options.draw.split(",")) - SEEDS.keys():
        parser.error(f"unknown draws: {', '.join(sorted(unknown))}; expected one or more of {', '.join(SEEDS)}")
    file = FILE if options.model == "smollm2" else FILE.with_name(f"{FILE.stem}_{Path(options.model).stem}.json")
    content = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    content["machine"] = machine()
    model, tokenizer = load_pretrained(options.model)
    split = split_of(options.data, tokenizer, **TOKENS)
    more = split_of(options.data, tokenizer, **TOKENS | {"calibration_tokens": options.train_tokens})
    training = DistillationConfig(learning_rate=options.learning_rate, validations=4, seed=options.seed)
    rate = "" if options.learning_rate == parser.get_default("learning_rate") else f", rate {options.learning_rate:g}"
    seed_label = f", seed {options.seed}" if options.seed else ""
    last_tokens_label = "" if options.last_tokens == LAST_TOKENS else f", last tokens in full: {options.last_tokens}"

    @cache
    def fitted(window: range) -> FittedPromptSkip:
        return fit_prompt_skip(model, split, window, tokenizer=tokenizer, last_tokens=options.last_tokens)

    fitting = min(TOKENS["calibration_tokens"], more.calibration.numel())  # of all variants

    @cache
    def trained(window: range) -> FittedPromptSkip:
        config = CompressionConfig(data=DataConfig(fitting_tokens=fitting), distillation=training)
        return fit_prompt_skip(model, more, window, config, tokenizer=tokenizer, last_tokens=options.last_tokens)

    def without_maps(window: range) -> FittedPromptSkip:
        return replace(fitted(window), maps=(None,) * len(window), kl={})

    @cache
    def compressed(preset: str, blocks: int) -> tuple[Any, list[int]]:
        changed = copy.deepcopy(model)
        config = CompressionConfig.preset(
            preset, remove=Target(blocks=blocks), seed=options.seed, evaluation=UNMEASURED
        )
        config = config.updated({"data.fitting_tokens": fitting})
        return changed, list(compress(changed, more, config, tokenizer=tokenizer).plan.removed)

    def score_original(tasks: ScoredTasks) -> dict[str, Any]:
        return {"tasks": tasks.score(model), "prompt_tokens": tasks.prompt_tokens()}

    def measure(tasks: ScoredTasks, variant: str, window: range) -> dict[str, Any]:
        if variant in SKIPPING:
            done = {"trained": trained, "fitted": fitted, "skipped": without_maps}[variant](window)
            with done.open(model):
                row: dict[str, Any] = {"tasks": tasks.score(model), "kl": dict(done.kl)}
            return row | ({"training": done.training.report()} if done.training else {})
        if variant in PRESETS:
            changed, blocks = compressed(PRESETS[variant], len(window))
            return {"tasks": tasks.score(changed), "removed": blocks}
        with removed(model, window, split, repair=variant == "mapped") as changed:
            return {"tasks": tasks.score(changed)}

    for draw in options.draw.split(","):
        tasks = ScoredTasks(options.data, tokenizer, options.items, draw, options.shots, QUESTIONS)

        def add(name: str, measured: Callable[[], dict[str, Any]], draw: str = draw) -> None:
            shots = "" if options.shots == SHOTS else f" with {options.shots} examples"
            key = f"{draw}, {options.items} items{shots}, {name}"
            if key not in content["rows"]:
                row = {"draw": draw, "items": options.items, "shots": options.shots, "name": name}
                content["rows"][key] = row | measured()
                write(file, content)
                file.with_suffix(".md").write_text(table(content["rows"]))

        add("original", partial(score_original, tasks))
        for text in options.windows.split(","):
            first, last = map(int, text.split("-"))
            for variant in options.variants.split(","):
                label = last_tokens_label if variant in SKIPPING else ""
                if variant in TRAINED:
                    label += f" ({options.train_tokens:,} tokens{rate if variant == 'trained' else ''}{seed_label})"
                blocks = f"{last - first + 1} blocks" if variant in PRESETS else text
                add(
                    f"{blocks}, {VARIANTS[variant]}{label}",
                    partial(measure, tasks, variant, range(first, last + 1)),
                )
    print(table(content["rows"]))


@contextmanager
def removed(model: Any, window: range, split: Any, repair: bool) -> Iterator[Any]:
    """Yield a copy of the model without a window, or with a linear map in its place."""
    changed = copy.deepcopy(model)
    with LayerSurgeon(changed) as surgeon:
        if repair:
            batches = (split_into_batches(part, BATCH) for part in (split.calibration, split.validation))
            (fit,) = fit_windows(changed, [window], LinearConfig(), *batches)
            insert_replacement(surgeon, window, fit.replacement_module)
        else:
            surgeon.remove(window)
        yield changed


def table(rows: dict[str, Any]) -> str:
    """Return the rows as Markdown: those of the development draw, and the mean over the other draws."""
    groups: dict[tuple[bool, int, int], list[dict[str, Any]]] = {}
    for row in rows.values():
        shots = row.get("shots", SHOTS)
        groups.setdefault((row["draw"] == "development", row["items"], shots), []).append(row)
    options = "--draw DRAW --items ITEMS --windows WINDOW --variants VARIANTS [--shots SHOTS] [--last-tokens TOKENS]"
    made = f"Made by `python -m benchmarks.prompt_skip {options}`."
    return "\n".join(
        [line for (_, items, shots), own in groups.items() for line in _section(own, items, shots)] + [made, ""]
    )


def _section(rows: list[dict[str, Any]], items: int, shots: int) -> list[str]:
    """Return the lines of the rows of one or several draws with the same number of items."""
    originals = {row["draw"]: row["tasks"] for row in rows if row["name"] == "original"}
    kinds = list(next(iter(originals.values())))
    accuracy = {kind: statistics.fmean(share_right(tasks[kind]) for tasks in originals.values()) for kind in kinds}
    lengths = [row["prompt_tokens"] for row in rows if "prompt_tokens" in row]
    tokens = {kind: statistics.fmean(row[kind] for row in lengths) for kind in (lengths[0] if lengths else ())}
    draws = f"Draw{'s' if len(originals) > 1 else ''} {', '.join(originals)}"
    lines = [
        f"## {draws}, {items} items per task{' and draw' if len(originals) > 1 else ''}, {shots} examples per problem",
        "",
        "Accuracy of the original: "
        + ", ".join(f"{kind} {accuracy[kind]:.1%}" for kind in kinds)
        + "."
        + " Mean number of tokens of a prompt: "
        + ", ".join(f"{kind} {count:.0f}" for kind, count in tokens.items())
        + ".",
        "",
        f"| blocks | draws | {' | '.join(kinds)} | generation | by draw | classification | by draw | KL text "
        "| KL repeated |",
        f"|{'---|' * (len(kinds) + 8)}",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name and row["draw"] in originals]
        own.sort(key=lambda row: str(row["draw"]))
        if name == "original" or not own:
            continue
        cells = [", ".join(row["draw"] for row in own) if len(originals) > 1 else own[0]["draw"]]
        kept = _retained(own, originals)
        cells += [f"{kept[kind]:.0%}" if kind in kept else "" for kind in kinds]
        for chooses in (False, True):
            means = [_mean(_retained([row], originals), chooses) for row in own]
            whole = _mean(kept, chooses)
            cells += ["" if whole is None else f"{whole:.0%}", ", ".join(f"{m:.0%}" for m in means if m is not None)]
        for kind in ("text", "repeated"):
            nats = [row["kl"][kind] for row in own if row.get("kl")]
            cells.append(f"{statistics.fmean(nats):.3f}" if nats else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if QUESTIONS[0] in kinds:
        lines += [
            "",
            "The contexts of the questions have few tokens besides those at their end that run every block.",
        ]
    return [*lines, ""]


def _retained(rows: Sequence[dict[str, Any]], originals: Mapping[str, dict[str, str]]) -> dict[str, float]:
    """Return the accuracy of each task relative to the original, over the items of all rows.

    Tasks of which the original solves nothing are left out.
    """
    kept = {}
    for kind in rows[0]["tasks"]:
        before = sum(share_right(originals[row["draw"]][kind]) for row in rows)
        if before:
            kept[kind] = sum(share_right(row["tasks"][kind]) for row in rows) / before
    return kept


def _mean(kept: Mapping[str, float], chooses: bool) -> float | None:
    """Return the mean over the tasks that are questions, or over the others."""
    values = [value for kind, value in kept.items() if (kind in QUESTIONS) == chooses]
    return statistics.fmean(values) if values else None


if __name__ == "__main__":
    main()

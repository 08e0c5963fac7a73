"""Repeat the evaluation of LLM-Streamline (arXiv 2403.19135) on a model: its replacements, amount of text and tasks.

    python -m benchmarks.paper MODEL --text FILE [--removed 0.25] [--tokens 61440000] [--sequence-length 2048]
        [--presets llm-streamline-ffn,llm-streamline-layer,none] [--batch-size 4] [--accumulate 32]
        [--tasks arc_challenge,arc_easy,...] [--items N] [--bench FOLDER] [--device auto] [--dtype bfloat16]

The paper trains on 30,000 sequences of 2,048 tokens of SlimPajama, 128 of them per step. `--text` is a file or folder
with at least as much text, see `read_documents`. The default tasks are those for which the authors publish scores of
lm-eval (the model card of XiaodongChen/Llama-2-4.7B on the hub); lm-eval downloads them. With `--bench`, tasks of
`benchmarks.multiple_choice` are read from that folder instead. Scores are ``acc``, as in the model card. Each row is
saved to ``benchmarks/results/paper_NAME.json`` when it is finished, and those that exist are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.multiple_choice import TASKS, task_of
from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, show_log
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, Target, compress
from streamline_hooks.checkpoint import LoadingConfig, load_pretrained
from streamline_hooks.core import HardwareConfig
from streamline_hooks.data import read_documents, split_documents
from streamline_hooks.evaluation import TaskSettings, run_tasks
from streamline_hooks.pipeline import EvaluationConfig

PUBLISHED = {
    "Llama-2-7B": {
        "arc_challenge": 0.433, "arc_easy": 0.764, "boolq": 0.777, "hellaswag": 0.572, "openbookqa": 0.314,
        "rte": 0.628, "winogrande": 0.691,
    },
    "Llama-2-4.7B, by LLM-Streamline": {
        "arc_challenge": 0.340, "arc_easy": 0.646, "boolq": 0.747, "hellaswag": 0.498, "openbookqa": 0.274,
        "rte": 0.617, "winogrande": 0.664,
    },
}  # fmt: skip
"""Scores of lm-eval in the model card of XiaodongChen/Llama-2-4.7B."""
ORIGINAL = "original"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, the name of a model on the hub, a GGUF file, or smollm2")
    parser.add_argument("--text", required=True, nargs="+", help="files or folders with the training text")
    parser.add_argument("--removed", type=float, default=0.25, help="fraction of the blocks")
    parser.add_argument("--presets", default="llm-streamline-ffn,llm-streamline-layer,none")
    parser.add_argument("--tokens", type=int, default=30_000 * 2_048, help="of training text")
    parser.add_argument("--fitting-tokens", type=int, default=300 * 2_048, help="for the choice of the blocks")
    parser.add_argument("--sequence-length", type=int, default=2_048)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--accumulate", type=int, default=32, help="forward passes per training step")
    parser.add_argument("--tasks", default=",".join(PUBLISHED["Llama-2-7B"]))
    parser.add_argument("--items", type=int, help="of each task; by default all")
    parser.add_argument("--bench", type=Path, help="a folder with the files of benchmarks.multiple_choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    show_log()
    file = RESULTS / f"paper_{Path(options.model).name.removesuffix('.gguf')}.json"
    scored = {name: getattr(options, name) for name in ("tasks", "items", "seed", "dtype")}
    content = json.loads(file.read_text()) if file.exists() else {"rows": {}, "scored": scored}
    if content["scored"] != scored:
        parser.error(f"{file} has rows with {content['scored']}, not {scored}; pass the same values or remove it")
    content["machine"] = machine()
    loading = LoadingConfig(device=options.device, dtype=options.dtype)
    model, tokenizer = load_pretrained(options.model, loading=loading)
    tasks = [
        task_of(name, options.bench, options.items, options.seed) if options.bench and name in TASKS else name
        for name in options.tasks.split(",")
    ]
    settings = TaskSettings(items=options.items, metric="acc")

    def add(name: str, scored: Any) -> None:
        results = run_tasks(scored, tokenizer, tasks, settings)
        content["rows"][name] = {task: statistics.fmean(result.scores) for task, result in results.items()}
        write(file, content)
        file.with_suffix(".md").write_text(table(options.model, content["rows"]))

    if ORIGINAL not in content["rows"]:
        add(ORIGINAL, model)
    for preset in options.presets.split(","):
        length = options.sequence_length
        name = f"{preset}, {options.removed:.0%} removed, {options.tokens:,} tokens in sequences of {length:,}"
        if name in content["rows"]:
            continue
        text = split_documents(
            read_documents(options.text),
            tokenizer,
            sequence_length=options.sequence_length,
            calibration_tokens=options.tokens,
            validation_tokens=8 * options.sequence_length,
            test_tokens=8 * options.sequence_length,
            seed=options.seed,
        )
        config = CompressionConfig.preset(
            preset,
            remove=Target(fraction=options.removed),
            seed=options.seed,
            evaluation=EvaluationConfig(speed=False, generation=False),
            hardware=HardwareConfig(batch_size=options.batch_size),
        )
        if config.distillation is not None:
            fitting = min(options.fitting_tokens, options.tokens)
            steps = {"distillation.gradient_accumulation_steps": options.accumulate}
            config = config.updated({"data.fitting_tokens": fitting, **steps})
        changed = copy.deepcopy(model)
        compress(changed, text, config, tokenizer=tokenizer)
        add(name, changed)
        del changed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(table(options.model, content["rows"]))


def table(model: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the rows as Markdown, followed by the published scores on the same tasks."""
    tasks = list(next(iter(rows.values())))
    lines = [
        f"| {model} | {' | '.join(tasks)} | mean | retained |",
        f"|{'---|' * (len(tasks) + 3)}",
        *(_line(name, row, rows[ORIGINAL], tasks) for name, row in rows.items()),
    ]
    original, compressed = PUBLISHED
    common = [task for task in tasks if task in PUBLISHED[original]]
    if common:
        lines += [
            "",
            "Published scores on these tasks (lm-eval, 0.06 billion training tokens):",
            "",
            f"| model | {' | '.join(common)} | mean | retained |",
            f"|{'---|' * (len(common) + 3)}",
            *(_line(name, PUBLISHED[name], PUBLISHED[original], common) for name in (original, compressed)),
        ]
    lines += [
        "",
        "*retained* is the ratio of the mean accuracies. The paper reports 92 % over twelve classification tasks and "
        "68 % over three generation tasks for Llama-2-7B without a quarter of its parameters.",
        "",
    ]
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, float], original: Mapping[str, float], tasks: list[str]) -> str:
    mean, before = (statistics.fmean(scores[task] for task in tasks) for scores in (row, original))
    return f"| {name} | {' | '.join(f'{row[task]:.1%}' for task in tasks)} | {mean:.1%} | {mean / before:.1%} |"


if __name__ == "__main__":
    main()

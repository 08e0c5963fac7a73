"""Everything that an evaluation measures, of SmolLM2-135M-Instruct and of the same with eight blocks repaired linearly.

    python -m benchmarks.evaluate_smollm2 [--data FOLDER] [--items 100] [--text-tokens 4000]

The model is compressed on ``text/train``; text and tasks are of ``text/heldout`` and ``bench``, on which nothing is
chosen or fitted, a seeded subset of each. What has been measured is kept in ``build/evaluate_smollm2``, beside the
page; the rows go to ``benchmarks/results/evaluate_smollm2.json`` and ``.md``. About 25 minutes on two cores.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, ROOT, arguments
from benchmarks.timing import machine
from streamline_hooks import (
    CompressionConfig,
    DataConfig,
    Evaluation,
    Suite,
    compress,
    evaluate,
)
from streamline_hooks.calibration import read_documents
from streamline_hooks.pretrained import load_pretrained
from streamline_hooks.report import write_report

FILE = RESULTS / "evaluate_smollm2.json"
KEPT = ROOT / "build" / "evaluate_smollm2"
TASKS = (
    "arc_easy.jsonl", "blimp.zip", "boolq.jsonl", "commonsense_qa.jsonl", "copa.jsonl", "hellaswag_val.jsonl.gz",
    "piqa.jsonl", "winograd_wsc.jsonl",
)  # fmt: skip
CALIBRATION = 20_480  # tokens


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--text-tokens", type=int, default=4_000)
    options = parser.parse_args()
    command = f"python -m benchmarks.evaluate_smollm2 --items {options.items} --text-tokens {options.text_tokens}"
    original, tokenizer = load_pretrained("smollm2")
    bench = options.data / "bench"
    suite = Suite(
        text=[str(path) for path in sorted((options.data / "text" / "heldout").glob("*.txt"))],
        tasks=[str(bench / name) for name in TASKS],
        problems=[str(bench / "gsm8k.jsonl")],
        probes=25,
        prompts=5,
        items=options.items,
        text_tokens=options.text_tokens,
        timed=(256, 16, 5),
    )
    texts = read_documents(options.data / "text" / "train")
    config = CompressionConfig(data=DataConfig(calibration_tokens=CALIBRATION))
    result = compress(copy.deepcopy(original), tokenizer, texts, config, say=print)
    found = evaluate(
        result.model,
        tokenizer,
        suite,
        original,
        keep_in=KEPT / "measured.json",
        name="8 blocks repaired linearly",
        reference_name="SmolLM2-135M-Instruct",
    )
    print(found.table())
    report = {
        "command": command,
        "machine": machine() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "gone": result.candidates[0].gone,
        **found.report(),
    }
    write(FILE, report)
    FILE.with_suffix(".md").write_text(table(found, suite, command, result.candidates[0].gone))
    write_report(KEPT, compression=result.report(), evaluation=report, command=command, title="SmolLM2, 8 blocks fewer")


def table(found: Evaluation, suite: Suite, command: str, gone: str) -> str:
    """The rows as Markdown: each task with its standard error and the seconds that it took."""
    assert found.original is not None
    said, before = found.report(), found.report()["original"]
    lines = [
        f"SmolLM2-135M-Instruct, and the same with blocks {gone} given up and repaired by a linear map that was fitted "
        f"on {CALIBRATION:,} tokens: on held-out text and seeded subsets of the tasks. Standard errors are those of "
        "drawing the questions; seconds are those of each model, beside whatever else the machine did.",
        "",
        "| task | questions | chance | original | repaired | seconds | seconds, repaired |",
        "|---" * 7 + "|",
    ]
    for name, row in said["accuracy"].items():
        cells = [_share(before["accuracy"][name]), _share(row)]
        chance = f"{row['chance']:.1%}" if row["chance"] else ""
        seconds = [f"{part['seconds'][name]:.0f}" for part in (before, said)]
        lines.append(f"| {name} ({row['metric']}) | {row['items']} | {chance} | {' | '.join([*cells, *seconds])} |")
    lines += ["", "| perplexity | tokens | original | repaired | ratio | bits a byte | repaired |", "|---" * 7 + "|"]
    for name, row in said["perplexity"].items():
        theirs = before["perplexity"][name]
        lines.append(
            f"| {name} | {row['tokens']:,} | {theirs['value']:.2f} | {row['value']:.2f} | "
            f"{row['value'] / theirs['value']:.2f} | {theirs['bits_per_byte']:.3f} | {row['bits_per_byte']:.3f} |"
        )
    agreed: dict[str, Any] = said["agreement"]
    quantiles = ", ".join(f"{float(q):.0%} below {value:.2f}" for q, value in agreed["quantiles"].items())
    lines += [
        "",
        f"Agreement: KL {agreed['kl']:.3f} nats a token ({quantiles}), the same first choice for {agreed['top1']:.1%}; "
        f"{agreed['match_length']:.1f} of {suite.new_tokens} tokens written alike. Repeated runs of four tokens: "
        f"{before['writing']['repetition']:.1%} and {said['writing']['repetition']:.1%}.",
        "",
        *(f"Retained, {group}: {one}." for group, one in found.retained.items()),
        "",
        *(
            f"Stability, {name}: {one['value']:.1%}, {one['share']:.1%} with equal weights."
            for name, one in found.stability.items()
        ),
        "",
        "```",
        *([] if found.speed is None else found.speed.table().splitlines()),
        "```",
    ]
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def _share(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['value']:.1%}" + ("" if error is None else f" ± {error:.1%}")


if __name__ == "__main__":
    main()

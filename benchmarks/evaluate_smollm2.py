"""Run a complete evaluation of SmolLM2-135M-Instruct with eight blocks removed and repaired linearly.

    python -m benchmarks.evaluate_smollm2 [--data FOLDER] [--items 100] [--text-tokens 4000]

The model is compressed on ``text/train``. It is evaluated on seeded subsets of ``text/heldout`` and ``bench``, which
are used neither to choose nor to fit. Finished measurements and the report page are stored in
``build/evaluate_smollm2``, the results in ``benchmarks/results/evaluate_smollm2.json`` and ``.md``. It takes about 25
minutes on two cores.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, ROOT, arguments
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, DataConfig, compress, evaluate
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.data import read_documents
from streamline_hooks.evaluation import Evaluation, Suite
from streamline_hooks.pipeline import write_report

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
    result = compress(copy.deepcopy(original), texts, config, tokenizer=tokenizer)
    evaluation = evaluate(
        result.model,
        tokenizer,
        suite,
        original,
        cache_file=KEPT / "measured.json",
        name="8 blocks repaired linearly",
        reference_name="SmolLM2-135M-Instruct",
    )
    print(evaluation.table())
    report = {
        "command": command,
        "machine": machine() | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "gone": result.candidates[0].blocks_text,
        **evaluation.report(),
    }
    write(FILE, report)
    FILE.with_suffix(".md").write_text(table(evaluation, suite, command, result.candidates[0].blocks_text))
    write_report(KEPT, compression=result.report(), evaluation=report, command=command, title="SmolLM2, 8 blocks fewer")


def table(evaluation: Evaluation, suite: Suite, command: str, removed: str) -> str:
    """Return the results as Markdown, with standard errors and run times."""
    assert evaluation.original is not None
    report, original = evaluation.report(), evaluation.report()["original"]
    lines = [
        f"SmolLM2-135M-Instruct, and the same model with blocks {removed} removed and repaired by a linear map fitted "
        f"on {CALIBRATION:,} tokens, seed 0: held-out text and seeded subsets of the tasks. Standard errors are over "
        "questions. Seconds are measured on a CPU, on a machine with other load.",
        "",
        "| task | questions | chance | original | repaired | seconds | seconds, repaired |",
        "|---" * 7 + "|",
    ]
    for name, row in report["accuracy"].items():
        cells = [_share(original["accuracy"][name]), _share(row)]
        chance = f"{row['chance']:.1%}" if row["chance"] else ""
        seconds = [f"{part['seconds'][name]:.0f}" for part in (original, report)]
        lines.append(f"| {name} ({row['metric']}) | {row['items']} | {chance} | {' | '.join([*cells, *seconds])} |")
    lines += [
        "",
        "| domain | tokens | perplexity | perplexity, repaired | ratio | bits per byte | bits per byte, repaired |",
        "|---" * 7 + "|",
    ]
    for name, row in report["perplexity"].items():
        original_row = original["perplexity"][name]
        lines.append(
            f"| {name} | {row['tokens']:,} | {original_row['value']:.2f} | {row['value']:.2f} | "
            f"{row['value'] / original_row['value']:.2f} | {original_row['bits_per_byte']:.3f} | "
            f"{row['bits_per_byte']:.3f} |"
        )
    agreement: dict[str, Any] = report["agreement"]
    quantiles = ", ".join(f"{float(q):.0%} below {value:.2f}" for q, value in agreement["quantiles"].items())
    lines += [
        "",
        f"Agreement: KL {agreement['kl']:.3f} nats per token ({quantiles}), same top-1 token for "
        f"{agreement['top1']:.1%}; length of the common prefix {agreement['match_length']:.1f} of "
        f"{suite.new_tokens} tokens. Repeated 4-grams: {original['writing']['repetition']:.1%} and "
        f"{report['writing']['repetition']:.1%}.",
        "",
        *(f"Retained accuracy, {group}: {result}." for group, result in evaluation.retained.items()),
        "",
        *(
            f"Stability, {name}: {result['value']:.1%}, {result['share']:.1%} with equal weights."
            for name, result in evaluation.stability.items()
        ),
        "",
        "```",
        *([] if evaluation.speed is None else evaluation.speed.table().splitlines()),
        "```",
    ]
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def _share(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['value']:.1%}" + ("" if error is None else f" ± {error:.1%}")


if __name__ == "__main__":
    main()

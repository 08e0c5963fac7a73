"""Remove two of eight blocks of a small OPT and repair them with each kind of replacement.

    python -m benchmarks.small_opt_repaired [--data FOLDER] [--tokens 200000] [--kinds NAME;...]

This needs the model of `benchmarks.small_opt`. Each kind is fitted on the same training text, which also determines its
window; kinds with weights are also trained for one epoch by KL to the original. Perplexity is measured after the model
was saved and loaded. Each row is saved to ``benchmarks/results/small_opt_repaired.json`` when it is finished, and the
table to ``benchmarks/results/small_opt_repaired.md``. It takes about ten minutes on two cores.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import benchmarks.baselines  # noqa: F401 - registers the replacements of other methods
from benchmarks.quality_scores import write
from benchmarks.real_text import BATCH, RESULTS, arguments, heldout
from benchmarks.small_opt import SCORED, load_small_opt
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, DataConfig, DistillationConfig, compress
from streamline_hooks.checkpoint import load
from streamline_hooks.cli import parse_replacement
from streamline_hooks.core import HardwareConfig, StreamlineError, weights_digest
from streamline_hooks.data import read_documents
from streamline_hooks.evaluation import Perplexity, agreement, perplexity
from streamline_hooks.repair import REPLACEMENTS, ReplacementConfig

FILE = RESULTS / "small_opt_repaired.json"
REMOVED = 2
TRAINED = ("linear", "linear:rank=48", "mlp", "swiglu", "block", "silenced", "feed_forward")
"""Kinds that are measured with and without training."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument(
        "--kinds", default=";".join([*REPLACEMENTS, "linear:rank=48"]), help="kinds, separated by semicolons"
    )
    options = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    bench = Bench(options.data, options.tokens, content)
    for repair in map(parse_replacement, options.kinds.split(";")):
        bench.row(repair, None)
        if str(repair) in TRAINED:
            bench.row(repair, DistillationConfig(learning_rate=2e-3, warmup_ratio=0.05))
    print(table(content))


class Bench:
    """The text, the scores of the original and the finished rows."""

    def __init__(self, data: Path, tokens: int, content: dict[str, Any]) -> None:
        self.content, self.tokens = content, tokens
        self.original, tokenizer = load_small_opt()
        self.documents = read_documents(data / "text" / "train")
        self.domains = heldout(data, tokenizer, SCORED)
        self.scored = [batch for batches in self.domains.values() for batch in batches]
        digest = weights_digest(self.original)
        if content.get("model") != digest:
            content |= {"model": digest, "rows": {}}  # rows of another model
        content |= {
            "command": f"python -m benchmarks.small_opt_repaired --tokens {tokens}",
            "machine": machine(),
            "transformers": transformers.__version__,
            "original": self.perplexities(self.original),
            "parameters": self.original.num_parameters(),
            "scored": sum(batch["input_ids"].numel() for batch in self.scored),
        }

    def row(self, repair: ReplacementConfig, distillation: DistillationConfig | None) -> None:
        """Compress a copy with one kind, save and load it, and score it."""
        name = str(repair) if distillation is None else f"{repair}, trained"
        if name in self.content["rows"]:
            return
        model, tokenizer = load_small_opt()
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = compress(
                    model,
                    self.documents,
                    CompressionConfig(
                        remove=REMOVED,
                        repair=repair,
                        distillation=distillation,
                        data=DataConfig(calibration_tokens=self.tokens),
                        hardware=HardwareConfig(batch_size=BATCH),
                    ),
                    tokenizer=tokenizer,
                    output=Path(folder) / "model",
                )
            except StreamlineError as refused:
                self.content["rows"][name] = {"refused": str(refused)}
            else:
                self.content["rows"][name] = self.scores(result, load(Path(folder) / "model").eval())
        write(FILE, self.content)
        FILE.with_suffix(".md").write_text(table(self.content))
        print(name, self.content["rows"][name], flush=True)

    def scores(self, result: Any, reloaded: Any) -> dict[str, Any]:
        """Return the scores of the loaded model and its largest logit difference from the saved model."""
        batch = self.scored[0]
        with torch.no_grad():
            difference = (reloaded(**batch).logits - result.model(**batch).logits).abs().max()
        perplexities, agreement_with_original = (
            self.perplexities(reloaded),
            agreement(reloaded, self.original, self.scored),
        )
        return {
            "gone": result.candidates[0].blocks_text,
            "parameters": reloaded.num_parameters(),
            "perplexity": perplexities,
            "perplexity_ratio": perplexities["all"] / self.content["original"]["all"],
            "kl": agreement_with_original.kl,
            "top1": agreement_with_original.top1,
            "reloaded_apart": float(difference),
        }

    def perplexities(self, model: Any) -> dict[str, float]:
        """Return the perplexities by domain and over all domains."""
        perplexities = {name: perplexity(model, batches, name) for name, batches in self.domains.items()}
        return {
            **{name: result.value for name, result in perplexities.items()},
            "all": sum(perplexities.values(), Perplexity()).value,
        }


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown, sorted by perplexity, and the refusals."""
    finished = {name: row for name, row in content["rows"].items() if "refused" not in row}
    lines = [
        f"A small OPT ({content['parameters'] / 1e6:.2f} M parameters, 8 blocks, perplexity "
        f"{content['original']['all']:.1f} on {content['scored']:,} held-out tokens) with {REMOVED} blocks removed "
        "(one more by `block` and `silenced`), repaired, saved and loaded; seed 0, CPU. The last column is the largest "
        "absolute difference of a logit before and after saving.",
        "",
        "| replacement | blocks removed | perplexity | ratio | KL | top-1 | parameters | difference after reload |",
        "|---" * 8 + "|",
    ]
    for name, row in sorted(finished.items(), key=lambda item: item[1]["perplexity_ratio"]):
        lines.append(
            f"| {name} | {row['gone']} | {row['perplexity']['all']:.1f} | {row['perplexity_ratio']:.3f} | "
            f"{row['kl']:.3f} | {row['top1']:.1%} | {row['parameters'] / 1e6:.2f} M | {row['reloaded_apart']:.0e} |"
        )
    refused = {name: row["refused"] for name, row in content["rows"].items() if "refused" in row}
    lines += ["", *(f"{name}: refused: {why}" for name, why in refused.items())]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

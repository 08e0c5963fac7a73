"""A small OPT the whole way: ranked, two of its eight blocks removed, repaired by each kind, trained, saved, reloaded.

    python -m benchmarks.small_opt_repaired [--data FOLDER] [--tokens 200000] [--kinds NAME;...]

Needs the model that `benchmarks.small_opt` trains. Each kind is fitted on the same training text and chooses its own
window by it; those with weights of their own are trained on it once more, by KL to the original. Perplexity is that of
the model as it is read back from its folder. A row goes to ``benchmarks/results/small_opt_repaired.json`` when it is
done, the table to ``benchmarks/results/small_opt_repaired.md``: about ten minutes on two cores.
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
from streamline_hooks import (
    REPLACEMENTS,
    CompressionConfig,
    DataConfig,
    DistillationConfig,
    HardwareConfig,
    ReplacementConfig,
    compress,
)
from streamline_hooks.calibration import read_documents
from streamline_hooks.checkpoint import load
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.digests import weights_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Perplexity, agreement, perplexity

FILE = RESULTS / "small_opt_repaired.json"
REMOVED = 2
TRAINED = ("linear", "linear:rank=48", "mlp", "swiglu", "block", "silenced", "feed_forward")
"""The kinds that are trained after their start, as well as not."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--kinds", default=";".join([*REPLACEMENTS, "linear:rank=48"]), help="with ; between two")
    options = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    bench = Bench(options.data, options.tokens, content)
    for repair in map(parse_replacement, options.kinds.split(";")):
        bench.row(repair, None)
        if str(repair) in TRAINED:
            bench.row(repair, DistillationConfig(learning_rate=2e-3, warmup_ratio=0.05))
    print(table(content))


class Bench:
    """The text, the original's scores, and the rows so far."""

    def __init__(self, data: Path, tokens: int, content: dict[str, Any]) -> None:
        self.content, self.tokens = content, tokens
        self.original, tokenizer = load_small_opt()
        self.documents = read_documents(data / "text" / "train")
        self.domains = heldout(data, tokenizer, SCORED)
        self.scored = [batch for batches in self.domains.values() for batch in batches]
        digest = weights_digest(self.original)
        if content.get("model") != digest:
            content |= {"model": digest, "rows": {}}  # those of another training say nothing of this one
        content |= {
            "command": f"python -m benchmarks.small_opt_repaired --tokens {tokens}",
            "machine": machine(),
            "transformers": transformers.__version__,
            "original": self.perplexities(self.original),
            "parameters": self.original.num_parameters(),
            "scored": sum(batch["input_ids"].numel() for batch in self.scored),
        }

    def row(self, repair: ReplacementConfig, distillation: DistillationConfig | None) -> None:
        """Compress a fresh copy with one kind, read it back, and score that."""
        name = str(repair) if distillation is None else f"{repair}, trained"
        if name in self.content["rows"]:
            return
        model, tokenizer = load_small_opt()
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = compress(
                    model,
                    tokenizer,
                    self.documents,
                    CompressionConfig(
                        remove=REMOVED,
                        repair=repair,
                        distillation=distillation,
                        data=DataConfig(calibration_tokens=self.tokens),
                        hardware=HardwareConfig(batch_size=BATCH),
                    ),
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
        """What is left of the original, and how far what was read back is from what was written."""
        batch = self.scored[0]
        with torch.no_grad():
            apart = (reloaded(**batch).logits - result.model(**batch).logits).abs().max()
        found, agreed = self.perplexities(reloaded), agreement(reloaded, self.original, self.scored)
        return {
            "gone": result.candidates[0].gone,
            "parameters": reloaded.num_parameters(),
            "perplexity": found,
            "perplexity_ratio": found["all"] / self.content["original"]["all"],
            "kl": agreed.kl,
            "top1": agreed.top1,
            "reloaded_apart": float(apart),
        }

    def perplexities(self, model: Any) -> dict[str, float]:
        """By held-out domain, and over all of them."""
        found = {name: perplexity(model, batches, name) for name, batches in self.domains.items()}
        return {**{name: one.value for name, one in found.items()}, "all": sum(found.values(), Perplexity()).value}


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown, the best first, and what was refused."""
    made = {name: row for name, row in content["rows"].items() if "refused" not in row}
    lines = [
        f"A small OPT ({content['parameters'] / 1e6:.2f} M parameters, 8 blocks, perplexity "
        f"{content['original']['all']:.1f} on {content['scored']:,} held-out tokens) with {REMOVED} blocks removed: "
        "chosen, repaired, saved and read back. 'Apart' is the greatest difference of a logit between what was written "
        "and what was read.",
        "",
        "| in their place | blocks gone | perplexity | ratio | KL | top-1 | parameters | apart |",
        "|---" * 8 + "|",
    ]
    for name, row in sorted(made.items(), key=lambda item: item[1]["perplexity_ratio"]):
        lines.append(
            f"| {name} | {row['gone']} | {row['perplexity']['all']:.1f} | {row['perplexity_ratio']:.3f} | "
            f"{row['kl']:.3f} | {row['top1']:.1%} | {row['parameters'] / 1e6:.2f} M | {row['reloaded_apart']:.0e} |"
        )
    refused = {name: row["refused"] for name, row in content["rows"].items() if "refused" in row}
    lines += ["", *(f"{name} was refused: {why}" for name, why in refused.items())]
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

"""Compare removing blocks, skipping blocks for prompts, and quantized weights, alone and combined, on SmolLM2-135M.

    python -m benchmarks.depth_sweep [--data FOLDER] [--removed 0,4,8] [--skipped 0,5,10]
        [--weights float32,int8,int4] [--items 60] [--rounds 5]

Removed windows get a linear map, and skipped windows of the shortened model get maps in closed form. Weights of linear
layers are then quantized, except those of the LM head. A row has the bytes of the saved weights, the times of a prompt
of 512 tokens and of a further token relative to the original in alternating runs, the KL divergence of continuations
from those of the original, and the accuracy on synthetic problems of the development draw relative to the original. A
star marks rows that no other row beats or equals in accuracy, both times and bytes. The rows are saved to
``benchmarks/results/depth_sweep.json`` and ``.md``, those that exist are not measured again, and accuracy against each
cost is drawn in ``docs/images/depth_sweep.svg``.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.prompt_skip import TOKENS
from benchmarks.quality_scores import write
from benchmarks.real_text import BATCH, RESULTS, ROOT, arguments, split_of
from benchmarks.scored_tasks import ScoredTasks, share_right
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, Target, compress
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.modeling import inference, kl_by_token
from streamline_hooks.pipeline import EvaluationConfig, FittedPromptSkip, fit_prompt_skip

FILE, PICTURE = RESULTS / "depth_sweep.json", ROOT / "docs" / "images" / "depth_sweep.svg"
TIMED_TOKENS, TIMED_IDS, NEW_TOKENS = 512, (3, 40_000), 17
COSTS = ("bytes", "prefill", "decode")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--removed", default="0,4,8", help="numbers of removed blocks")
    parser.add_argument("--skipped", default="0,5,10", help="numbers of blocks that prompts skip")
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--items", type=int, default=60, help="problems of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timed runs")
    options = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    content["machine"] = machine()
    original, tokenizer = load_pretrained("smollm2")
    split = split_of(options.data, tokenizer, **TOKENS)
    batches = split_into_batches(split.test, BATCH)
    tasks = ScoredTasks(options.data, tokenizer, options.items, "development")
    originals = content.setdefault("originals", {})
    if (items := str(options.items)) not in originals:
        originals[items] = _accuracy(tasks.score(original))
    measure = Measure(original, batches, tasks, originals[items])
    for removed in map(int, options.removed.split(",")):
        shortened = None
        for skipped in map(int, options.skipped.split(",")):
            fitted = None
            for weights in options.weights.split(","):
                key = f"{removed} removed, {skipped} skipped, {weights}, {options.items} items"
                if key in content["rows"]:
                    continue
                if shortened is None:
                    shortened = without_blocks(original, removed, split, tokenizer)
                if skipped and fitted is None:
                    fitted = fit_prompt_skip(shortened, split, skipped, tokenizer=tokenizer)
                row = measure.row(WEIGHTS[weights](copy.deepcopy(shortened)), fitted, options.rounds)
                content["rows"][key] = {"removed": removed, "skipped": skipped, "weights": weights, **row}
                write(FILE, content)
                FILE.with_suffix(".md").write_text(table(content["rows"]))
    draw(list(content["rows"].values()))
    print(table(content["rows"]))


def without_blocks(original: Any, removed: int, split: Any, tokenizer: Any) -> Any:
    """Return a copy of the model in which a linear map replaces the least important window."""
    model = copy.deepcopy(original)
    if removed:
        evaluation = EvaluationConfig(speed=False, generation=False)
        config = CompressionConfig(remove=Target(blocks=removed), evaluation=evaluation)
        compress(model, split, config, tokenizer=tokenizer)
    return model


def _quantized(model: nn.Module, bits: int) -> nn.Module:
    """Quantize the weights; activations are not, since their scale would depend on the other tokens of a call."""
    from optimum.quanto import freeze, qint4, qint8, quantize  # type: ignore[import-untyped]

    quantize(model, weights={8: qint8, 4: qint4}[bits], include=_quantized_layers(model))
    freeze(model)
    return model


def _quantized_layers(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


WEIGHTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda model: model,
    "int8": partial(_quantized, bits=8),
    "int4": partial(_quantized, bits=4),
}


class Measure:
    """The original, and the text and problems on which variants are compared with it."""

    def __init__(self, original: Any, batches: Any, tasks: ScoredTasks, accuracy: float) -> None:
        self.original, self.batches, self.tasks, self.accuracy = original, batches, tasks, accuracy

    def row(self, model: Any, fitted: FittedPromptSkip | None, rounds: int) -> dict[str, Any]:
        """Measure a variant."""
        skip = None if fitted is None else fitted.open(model)
        opened: AbstractContextManager[Any] = nullcontext() if skip is None else skip
        with opened:
            accuracy = _accuracy(self.tasks.score(model))
            kl = {kind: self.divergence(model, skip, kind == "repeated") for kind in ("text", "repeated")}
            prefill, decode = self.times(model, rounds)
        maps = [] if fitted is None else [module for module in fitted.maps if module is not None]
        return {
            "window": None if fitted is None else [fitted.window.start, fitted.window.stop],
            "bytes": saved_bytes(model) + (saved_bytes(nn.ModuleList(maps)) if maps else 0),
            "prefill": prefill,
            "decode": decode,
            "kl": kl,
            "accuracy": accuracy / self.accuracy,
        }

    def divergence(self, model: Any, skip: Any, repeated: bool) -> float:
        """Return the mean KL divergence of the second half of each sequence, whose first half is the prompt."""
        nats: list[Tensor] = []
        with inference(self.original), inference(model):
            for batch in self.batches:
                ids = batch["input_ids"]
                half = ids.shape[1] // 2
                if repeated:
                    ids = ids[:, :half].repeat(1, 2)
                last_tokens = 1 if skip is None else skip.last_tokens
                prompt = (torch.arange(ids.shape[1]) < half - last_tokens).expand(ids.shape)
                reference = self.original(ids).logits[:, half - 1 :].float().log_softmax(dim=-1)
                with nullcontext() if skip is None else skip.marked(prompt):
                    nats.append(kl_by_token(reference, model(ids).logits[:, half - 1 :]).flatten())
        return float(torch.cat(nats).mean())

    def times(self, model: Any, rounds: int) -> tuple[float, float]:
        """Return the times of a prompt and of a further token, as medians of the ratios to the original."""
        ids = torch.randint(*TIMED_IDS, (1, TIMED_TOKENS), generator=torch.Generator().manual_seed(0))
        ratios = []
        for _ in range(rounds + 1):  # the first run is a warm-up
            (first, both), (own_first, own_both) = (_seconds(m, ids) for m in (model, self.original))
            ratios.append((first / own_first, (both - first) / (own_both - own_first)))
        prefill, decode = zip(*ratios[1:], strict=True)
        return statistics.median(prefill), statistics.median(decode)


def _seconds(model: Any, ids: Tensor) -> tuple[float, float]:
    """Return the seconds of one new token, and of several."""
    seconds = []
    for count in (1, NEW_TOKENS):
        started = time.perf_counter()
        model.generate(ids, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def saved_bytes(module: nn.Module) -> int:
    """Return the size of the saved weights."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getbuffer().nbytes


def _accuracy(bits: dict[str, str]) -> float:
    """Return the mean accuracy of the tasks."""
    return statistics.mean(map(share_right, bits.values()))


def is_on_front(row: dict[str, Any], rows: list[dict[str, Any]], costs: Sequence[str] = COSTS) -> bool:
    """Whether no other row is at least as good in accuracy and all costs, and better in one."""
    own = (-row["accuracy"], *(row[cost] for cost in costs))
    others = [(-other["accuracy"], *(other[cost] for cost in costs)) for other in rows]
    return not any(o != own and all(a <= b for a, b in zip(o, own, strict=True)) for o in others)


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against each cost, with a line through the rows that are best for this cost alone."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(COSTS), figsize=(10, 4), sharey=True, layout="constrained")
    labels = {"bytes": "size of the weights (MB)", "prefill": "time of a prompt (ratio)", "decode": "time per token"}
    colors = {removed: f"C{n}" for n, removed in enumerate(dict.fromkeys(row["removed"] for row in rows))}
    shapes = dict(zip(WEIGHTS, "os^", strict=True))
    for axes, cost in zip(panels, COSTS, strict=True):
        scale = 1e-6 if cost == "bytes" else 1
        best = sorted((row[cost] * scale, row["accuracy"]) for row in rows if is_on_front(row, rows, [cost]))
        axes.plot(*zip(*best, strict=True), color="0.8", zorder=0)
        for row in rows:
            point = row[cost] * scale, row["accuracy"]
            axes.plot(*point, shapes[row["weights"]], color=colors[row["removed"]])
            axes.annotate(str(row["skipped"]), point, (5, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel(labels[cost])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (ratio)")
    for removed, color in colors.items():
        panels[0].plot([], [], "o", color=color, label=f"{removed} blocks removed")
    for weights, shape in shapes.items():
        panels[0].plot([], [], shape, color="0.4", label=weights)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, title="numbers: blocks that prompts skip")
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "SmolLM2-135M, times and accuracy relative to the original. Accuracy is that of synthetic problems of the "
        "development draw; guessing reaches about 13%. A star marks rows that no other row beats or equals in "
        "accuracy, both times and size. The rows with 4 removed or 5 skipped blocks were timed while another core was "
        "busy; the same weights differ by up to a third in the time of a token, so small differences mean nothing.",
        "",
        "| removed | skipped | weights | MB | prompt time | token time | KL text | KL repeated | accuracy |",
        f"|{'---|' * 9}",
    ]
    for row in sorted(rows.values(), key=lambda row: (row["removed"], row["skipped"])):
        star = " *" if is_on_front(row, list(rows.values())) else ""
        cells = [row["removed"], row["skipped"], row["weights"], f"{row['bytes'] / 1e6:.0f}"]
        cells += [f"{row['prefill']:.2f}", f"{row['decode']:.2f}"]
        cells += [f"{row['kl'][kind]:.3f}" for kind in ("text", "repeated")]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['accuracy']:.0%}{star} |")
    made = "Made by `python -m benchmarks.depth_sweep --removed REMOVED --skipped SKIPPED` on one thread."
    return "\n".join([*lines, "", made, ""])


if __name__ == "__main__":
    main()

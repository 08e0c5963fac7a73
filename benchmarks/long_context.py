"""Measure what SmolLM2-135M retrieves from long contexts, and the memory of training on long sequences.

    python -m benchmarks.long_context [--data FOLDER] [--variants original,skipped,linear-4,linear-8]
        [--lengths 512,1024,2048,4096,8000] [--depths 0,0.25,0.5,0.75,1] [--items 8]
    python -m benchmarks.long_context --memory 512,4096,16384

A sentence with a number of five digits stands at a depth of held-out text, and the prompt ends with the same sentence
without the number. An item is right if every digit is the most likely next token after the right ones before it. The
variants are the original, the original with blocks 20 to 29 skipped for prompts, and models without 4 or 8 blocks with
a linear map, in closed form. Each length of a variant is a row, and rows that exist are not measured again.

With ``--memory`` a linear map of a random model (8 blocks of width 256, vocabulary of 49,152) is trained for two steps
on one sequence of each length. A row has the seconds per step, the peak memory in addition to the model and the
batches, and that of the formula (`compression_bytes`). The results are saved to
``benchmarks/results/long_context.json`` and ``.md``, the figure to ``docs/images/long_context.svg``.
"""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.depth_sweep import without_blocks
from benchmarks.prompt_skip import TOKENS
from benchmarks.quality_scores import write
from benchmarks.ranking_memory import give_back, reset_peak, resident
from benchmarks.real_text import RESULTS, ROOT, arguments, split_of
from benchmarks.timing import machine
from streamline_hooks import DistillationConfig, train
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.distillation import Student
from streamline_hooks.modeling import find_stack, inference
from streamline_hooks.pipeline import fit_prompt_skip
from streamline_hooks.pipeline.cost import compression_bytes
from streamline_hooks.replacements import LinearReplacement

FILE, PICTURE = RESULTS / "long_context.json", ROOT / "docs" / "images" / "long_context.svg"
SENTENCE, DIGITS = "\n\nThe secret number of the library is", 5
SKIPPED = range(20, 30)
LABELS = {
    "original": "original",
    "skipped": "blocks 20 to 29 skipped for prompts",
    "linear-4": "4 blocks removed, linear map",
    "linear-8": "8 blocks removed, linear map",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", default=",".join(LABELS))
    parser.add_argument("--lengths", default="512,1024,2048,4096,8000", help="tokens of the prompts")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="fraction of the text before the number")
    parser.add_argument("--items", type=int, default=8, help="prompts per length and depth")
    parser.add_argument("--memory", help="lengths of training sequences to measure instead")
    options = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}, "memory": {}}
    content["machine"] = machine()

    def save() -> None:
        write(FILE, content)
        FILE.with_suffix(".md").write_text(table(content))

    if options.memory:
        for length in map(int, options.memory.split(",")):
            content["memory"][str(length)] = memory(length)
            save()
    else:
        bench = Bench(options)
        for name in options.variants.split(","):
            for length in map(int, options.lengths.split(",")):
                key = f"{name}, {length} tokens, {options.items} items"
                if key not in content["rows"]:
                    content["rows"][key] = {"variant": name, "length": length, **bench.row(name, length)}
                    save()
        draw(content)
    print(table(content))


class Bench:
    """The original, the text around the numbers, and the variants."""

    def __init__(self, options: Any) -> None:
        self.depths, self.items = list(map(float, options.depths.split(","))), options.items
        self.model, self.tokenizer = load_pretrained("smollm2")
        self.split = split_of(options.data, self.tokenizer, **TOKENS)
        texts = [path.read_text("utf-8") for path in sorted((options.data / "text" / "heldout").glob("*.txt"))]
        self.text = torch.cat([self.encode(text) for text in texts])
        self.variants: dict[str, Any] = {}

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def row(self, name: str, length: int) -> dict[str, Any]:
        """Return by depth which items are right, and the mean negative log-likelihood of a digit in nats."""
        right: dict[str, str] = {}
        nats: dict[str, float] = {}
        with self.variant(name) as (model, skip):
            for depth in self.depths:
                results = [self.item(model, skip, length, depth, number) for number in range(self.items)]
                right[str(depth)] = "".join("1" if is_right else "0" for is_right, _ in results)
                nats[str(depth)] = statistics.fmean(value for _, value in results)
                print(name, length, depth, right[str(depth)], f"{nats[str(depth)]:.2f}", flush=True)
        return {"right": right, "nats": nats}

    @contextmanager
    def variant(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Yield the model of a variant, and the open `PromptSkip` or None."""
        if name not in self.variants:
            if name == "skipped":
                self.variants[name] = fit_prompt_skip(self.model, self.split, SKIPPED, tokenizer=self.tokenizer)
            elif name == "original":
                self.variants[name] = self.model
            else:
                removed = int(name.rpartition("-")[2])
                self.variants[name] = without_blocks(self.model, removed, self.split, self.tokenizer)
        if name != "skipped":
            yield self.variants[name], None
            return
        with self.variants[name].open(self.model) as skip:
            yield self.model, skip

    def item(self, model: Any, skip: Any, length: int, depth: float, number: int) -> tuple[bool, float]:
        """Return whether a number is retrieved, and the mean negative log-likelihood of its digits."""
        chosen = random.Random(f"{length} {depth} {number}")
        answer = self.encode(" " + "".join(chosen.choices("0123456789", k=DIGITS)))
        question = self.encode(SENTENCE)
        fact = torch.cat([question, answer, self.encode(".\n\n")])
        count = length - len(fact) - len(question) - len(answer)
        start = chosen.randrange(len(self.text) - count)
        before = round(depth * count)
        text = self.text[start : start + count]
        ids = torch.cat([text[:before], fact, text[before:], question, answer])[None]
        with inference(model):
            if skip is None:
                logits = model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits
            else:
                prompt = torch.arange(ids.shape[1]) < ids.shape[1] - len(answer) - skip.last_tokens
                with skip.marked(prompt.expand(ids.shape)):
                    logits = model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits
        log_probabilities = logits[0, :-1].float().log_softmax(dim=-1)
        is_right = bool((log_probabilities.argmax(dim=-1) == answer).all())
        return is_right, -float(log_probabilities.gather(1, answer[:, None]).mean())


def memory(length: int) -> dict[str, float]:
    """Train a linear map for two steps on sequences of a length; return time and memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(3, config.vocab_size, (1, length))} for _ in range(3)]
    student = Student(model, [(range(3, 5), LinearReplacement(256))])
    formula = compression_bytes(find_stack(model), batch=length, text=3 * length, trained=256**2)
    gc.collect()
    give_back()
    reset_peak()
    before, started = resident(), time.perf_counter()
    trained = train(student, batches[:2], batches[2:], DistillationConfig(validations=1))
    seconds = (time.perf_counter() - started) / trained.steps
    return {
        "seconds": seconds,
        "peak": resident("VmHWM") - before,
        "formula": formula["train"],
        "loss": trained.distance,
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = []
    rows = list(content["rows"].values())
    if rows:
        depths = list(rows[0]["right"])
        items = len(next(iter(rows[0]["right"].values())))
        lines += [
            f"SmolLM2-135M: numbers of {DIGITS} digits retrieved from held-out text, {items} prompts per length and "
            "depth: the fraction that is right, and in brackets the mean negative log-likelihood of a digit in nats "
            f"(guessing: {math.log(10):.1f}). The depth is the fraction of the text before the number.",
            "",
            f"| variant | tokens | {' | '.join(f'depth {depth}' for depth in depths)} | mean |",
            f"|{'---|' * (len(depths) + 3)}",
        ]
        for row in rows:
            shares = [_share(row["right"][depth]) for depth in depths]
            cells = [f"{s:.0%} ({row['nats'][depth]:.2f})" for s, depth in zip(shares, depths, strict=True)]
            mean = statistics.fmean(shares)
            lines.append(f"| {LABELS[row['variant']]} | {row['length']:,} | {' | '.join(cells)} | {mean:.0%} |")
        lines.append("")
    if content["memory"]:
        lines += [
            "Two training steps of a linear map on one sequence, random Llama with 8 blocks of width 256 and a "
            "vocabulary of 49,152, float32; a step includes its share of the teacher and of two validations.",
            "",
            "| tokens of a sequence | seconds per step | peak, MB | formula, MB | logits of a sequence, MB |",
            f"|{'---:|' * 5}",
        ]
        for length, row in sorted(content["memory"].items(), key=lambda pair: int(pair[0])):
            cells = [f"{int(length):,}", f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:,.0f}"]
            cells += [f"{row['formula'] / 1e6:,.0f}", f"{4 * 49_152 * int(length) / 1e6:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "Made by `python -m benchmarks.long_context [--memory LENGTHS]`.", ""])


def _share(bits: str) -> float:
    return bits.count("1") / len(bits)


def draw(content: dict[str, Any]) -> None:
    """Draw the fraction of retrieved numbers by length and depth, a panel for each variant."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    rows = list(content["rows"].values())
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names, strict=True):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["length"])
        depths = list(own[0]["right"])
        image = [[_share(row["right"][depth]) for row in own] for depth in depths]
        shown = panel.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_xticks(range(len(own)), [f"{row['length']:,}" for row in own], rotation=45)
        panel.set_yticks(range(len(depths)), depths)
        panel.set(title=LABELS[name], xlabel="tokens", ylabel="depth of the number")
        panel.title.set_fontsize(8)
    figure.colorbar(shown, ax=panels, label="retrieved")
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

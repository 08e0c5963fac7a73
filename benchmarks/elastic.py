"""Measure one checkpoint with several depths against a separate compression for each depth, on SmolLM2-135M.

    python -m benchmarks.elastic [--data FOLDER] [--depths 28,26,22] [--sequences 4] [--switches 9]

Nested depths are fitted on the training text and saved in one folder. For each depth, the perplexity on held-out text
is compared with that of a compression of its own with the same replacement, which may leave out any window. The size of
the folder, the time of a switch, and whether full depth is the original bit for bit are measured too. The results are
saved to ``benchmarks/results/elastic.json`` and ``.md``.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_scores import write
from benchmarks.real_text import BATCH, RESULTS, arguments, scored_text, split_of
from benchmarks.timing import machine
from streamline_hooks import CompressionConfig, Target, at_depth, compress, fit_depths, load, perplexity, save_elastic
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import HardwareConfig
from streamline_hooks.modeling import find_stack
from streamline_hooks.pipeline import EvaluationConfig

FILE = RESULTS / "elastic.json"
TOKENS = {"calibration_tokens": 32_768, "validation_tokens": 4_096, "test_tokens": 4_096}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--depths", default="28,26,22")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of 512 tokens per held-out domain")
    parser.add_argument("--switches", type=int, default=9)
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")]
    content = measure(options, depths)
    content["command"] = (
        f"python -m benchmarks.elastic --depths {options.depths} --sequences {options.sequences} "
        f"--switches {options.switches}"
    )
    write(FILE, content)
    FILE.with_suffix(".md").write_text(table(content))
    print(table(content))


def measure(options: Any, depths: list[int]) -> dict[str, Any]:
    """Fit, save and load the depths, and compress a copy of the model for each."""
    model, tokenizer = load_pretrained("smollm2")
    split = split_of(options.data, tokenizer, **TOKENS)
    text = scored_text(options.data, tokenizer, options.sequences)
    config = CompressionConfig(
        hardware=HardwareConfig(batch_size=BATCH), evaluation=EvaluationConfig(speed=False, generation=False)
    )
    ids = text[0]["input_ids"][:1, :64]
    with torch.no_grad():
        logits = model(ids).logits
    fitted = fit_depths(model, split, depths, config, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        save_elastic(model, Path(folder, "elastic"), tokenizer=tokenizer)
        model.save_pretrained(Path(folder, "plain"))
        tokenizer.save_pretrained(Path(folder, "plain"))
        sizes = {name: bytes_of(Path(folder, name)) for name in ("elastic", "plain")}
        loaded = load(Path(folder, "elastic"))
    rows = []
    original = perplexity(loaded, text).value
    for chosen in fitted:
        with at_depth(loaded, chosen.depth):
            nested = perplexity(loaded, text).value
        alone = copy.deepcopy(load_pretrained("smollm2")[0])
        count = len(find_stack(alone)) - chosen.depth
        result = compress(alone, split, config, tokenizer=tokenizer, remove=Target(blocks=count))
        separate = perplexity(alone, text).value
        rows.append(
            {
                "depth": chosen.depth,
                "window": [chosen.window.start, chosen.window.stop],
                "separate_window": list(result.plan.removed),
                "perplexity": nested,
                "separate_perplexity": separate,
                "switch_seconds": switch_seconds(loaded, chosen.depth, options.switches),
            }
        )
        print(rows[-1], flush=True)
    with torch.no_grad():
        is_original = torch.equal(loaded(ids).logits, logits)
    return {"original_perplexity": original, "bytes": sizes, "bit_identical": is_original, "rows": rows} | {
        "machine": machine()
    }


def bytes_of(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def switch_seconds(model: Any, depth: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of entering and of leaving a depth, after a warm-up."""
    seconds: dict[str, list[float]] = {"enter": [], "leave": []}
    for number in range(repeats + 1):
        context = at_depth(model, depth)
        started = time.perf_counter()
        context.__enter__()
        entered = time.perf_counter()
        context.__exit__(None, None, None)
        left = time.perf_counter()
        if number:
            seconds["enter"].append(entered - started)
            seconds["leave"].append(left - entered)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    sizes = content["bytes"]
    lines = [
        f"SmolLM2-135M-Instruct, float32, linear maps; perplexity of the original {content['original_perplexity']:.2f} "
        f"on held-out text. The folder with all depths has {sizes['elastic'] / sizes['plain']:.3f} times the size of a "
        f"plain checkpoint. Full depth is bit for bit the original: {'yes' if content['bit_identical'] else 'no'}.",
        "",
        "| blocks | left out | perplexity | separately: left out | perplexity | ratio | switch, ms | back, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        separate, seconds = row["separate_window"], row["switch_seconds"]
        lines.append(
            f"| {row['depth']} | {row['window'][0]}–{row['window'][1] - 1} | {row['perplexity']:.2f} | {separate[0]}–"
            f"{separate[-1]} | {row['separate_perplexity']:.2f} | "
            f"{row['perplexity'] / row['separate_perplexity']:.3f} | {1000 * seconds['enter']:.0f} | "
            f"{1000 * seconds['leave']:.0f} |"
        )
    return "\n".join([*lines, "", f"Made by `{content['command']}`.", ""])


if __name__ == "__main__":
    main()

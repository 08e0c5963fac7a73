"""Compress SmolLM2-135M-Instruct in closed form and measure perplexity by held-out domain.

    python -m benchmarks.compress_smollm2 [--data FOLDER] [--remove 0.25] [--tokens 41000] [--seed 0]

FOLDER (or STREAMLINE_DATA) contains ``text/train`` and ``text/heldout`` with the same domains as ``*.txt``. Blocks are
chosen and maps fitted on ``train`` only. The results are saved to ``benchmarks/results/compress_smollm2.json`` and
``.md``, the figure to ``docs/images/similarity.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from streamline_hooks import CompressionConfig, DataConfig, RunOptions, compress, perplexity
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.data import read_documents
from streamline_hooks.replacements import LinearReplacement

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOKENS_A_DOMAIN, SEQUENCE = 8_192, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("STREAMLINE_DATA"))
    parser.add_argument("--remove", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=41_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.data is None:
        parser.error("no data folder: pass --data FOLDER or set STREAMLINE_DATA")
    started = time.time()
    texts = Path(options.data) / "text"
    model, tokenizer = load_pretrained("smollm2")
    domains = {path.stem: sequences(path, tokenizer) for path in sorted((texts / "heldout").glob("*.txt"))}
    original = {name: score(model, batches, f"{name}, original") for name, batches in domains.items()}
    result = compress(
        model,
        read_documents(texts / "train"),
        CompressionConfig(remove=options.remove, data=DataConfig(calibration_tokens=options.tokens), seed=options.seed),
        tokenizer=tokenizer,
        options=RunOptions(test_texts=read_documents(texts / "heldout")),
    )
    print(result.table())
    repaired = {name: score(model, batches, f"{name}, repaired") for name, batches in domains.items()}
    removed = without_repair(model, domains)
    command = f"python -m benchmarks.compress_smollm2 --remove {options.remove} --tokens {options.tokens}"
    row = {
        "command": f"{command} --seed {options.seed}",
        "total_seconds": round(time.time() - started, 1),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "transformers": transformers.__version__},
        "domains": {
            name: {"original": original[name], "removed": removed[name], "repaired": repaired[name]} for name in domains
        },
        **result.report(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "compress_smollm2.json").write_text(json.dumps(row, indent=1) + "\n")
    (RESULTS / "compress_smollm2.md").write_text(table(row))
    (window,) = result.candidates[0].windows
    draw(result.profile.cosine, window, ROOT / "docs" / "images" / "similarity.svg")


def sequences(path: Path, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Return the first tokens of the held-out text of a domain as batches."""
    ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids[:TOKENS_A_DOMAIN]
    return split_into_batches(torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE), 4)


def score(model: Any, batches: list[dict[str, torch.Tensor]], what: str) -> float:
    return perplexity(model, batches, what).value


def without_repair(model: Any, domains: dict[str, Any]) -> dict[str, float]:
    """Return the perplexity of plain removal, with the replacement maps set to zero."""
    maps = [m.projection.weight for m in model.modules() if isinstance(m, LinearReplacement)]
    kept = [weight.detach().clone() for weight in maps]
    for weight in maps:
        weight.data.zero_()
    scores = {name: score(model, batches, f"{name}, removed") for name, batches in domains.items()}
    for weight, value in zip(maps, kept, strict=True):
        weight.data.copy_(value)
    return scores


def table(row: dict[str, Any]) -> str:
    removed = row["plan"]["removed"]
    lines = [
        f"SmolLM2-135M-Instruct, blocks {removed[0]} to {removed[-1]} of {row['plan']['old_length']} replaced by a "
        f"linear map, fitted in closed form on {row['data']['calibration_tokens']:,} tokens of the training domains "
        f"and selected by KL on {row['data']['validation_tokens']:,} other tokens. Perplexity on held-out text, "
        f"sequences of {SEQUENCE} tokens, up to {TOKENS_A_DOMAIN:,} tokens per domain.",
        "",
        "| domain | original | removed | repaired | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    ratios = []
    for name, p in row["domains"].items():
        ratios.append(p["repaired"] / p["original"])
        lines.append(f"| {name} | {p['original']:.2f} | {p['removed']:.1f} | {p['repaired']:.2f} | {ratios[-1]:.2f} |")
    lines += [f"| mean ratio | | | | {sum(ratios) / len(ratios):.2f} |", ""]
    steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in row["seconds"].items())
    lines += [
        f"Seconds by stage: {steps}. Peak memory: {row['peak_memory_bytes'] / 1e9:.1f} GB.",
        "",
        f"Made by `{row['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def draw(cosines: torch.Tensor, window: range, path: Path) -> None:
    """Draw the matrix of mean cosines with the chosen window."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streamline_hooks"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    image = axes.imshow(cosines.numpy(), origin="lower", cmap="viridis", vmin=0.0, vmax=1.0)
    figure.colorbar(image, label="mean cosine of the hidden states")
    start, stop = window.start, window.stop
    axes.plot([start, stop, stop], [start, start, stop], color="white", lw=1.5)
    axes.plot(stop, start, "o", color="white", ms=6)
    axes.annotate(
        f"blocks {start} to {stop - 1}\nremoved\ncosine {cosines[start, stop]:.2f}",
        (stop, start),
        xytext=(12, 6),
        textcoords="offset points",
        color="white",
    )
    axes.set_xlabel("input of block (last: output of the stack)")
    axes.set_ylabel("input of block")
    axes.set_title("SmolLM2-135M: similarity of the hidden states", fontsize=11)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

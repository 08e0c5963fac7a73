"""Compress a Llama with three billion random weights with one block in memory at a time.

    python -m benchmarks.scale [--shape 3b] [--folder FOLDER] [--results FOLDER] [--tokens 4096] [--threads 2]

The checkpoint, 6 GB in bfloat16, is written file by file to ``--folder`` (where it is kept and reused) or to a
temporary folder. A separate process compresses it with `streamline_hooks.pipeline.compress_checkpoint` and reports its
peak memory as counted by the operating system; another process loads the result into memory. A small model with the
same architecture is compressed block by block and in memory, and the results are compared. They are saved to
``scale.json`` and ``scale.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality_scores import write
from benchmarks.real_text import RESULTS, show_log
from benchmarks.small_opt import train_tokenizer
from benchmarks.timing import machine

if TYPE_CHECKING:
    from streamline_hooks import CompressionConfig

# Width, MLP width, blocks, heads, key-value heads, vocabulary size, and whether the LM head is tied to the embedding.
SHAPES = {
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),  # Llama 3.2 3B
    "300m": (1024, 2816, 20, 16, 8, 32_000, False),
    "100m": (768, 2048, 10, 12, 4, 16_000, True),
    "small": (96, 256, 28, 6, 2, 4096, True),
}
BOUND, STATES = 2.0e9, 2**28
_SPREAD = 0.02


def config_of(shape: str) -> LlamaConfig:
    """Return the configuration of a shape."""
    width, inner, blocks, heads, key_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )


def write_llama(folder: Path, config: LlamaConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a checkpoint of random weights, one file per block and per weight outside the blocks.

    The weights of one file are in memory at a time. The blocks have different standard deviations, so that the windows
    differ in importance.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(block[0] if block else name, []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    where, generator = {}, torch.Generator().manual_seed(seed)
    for number, (prefix, names) in enumerate(files.items(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        spread = _SPREAD * (0.5 + (7 * number % 11) / 11 if prefix.startswith("model.layers") else 1.0)
        tensors = {
            name: torch.ones(shapes[name], dtype=dtype)
            if len(shapes[name]) == 1
            else torch.empty(shapes[name], dtype=dtype).normal_(0, spread, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2)
    )  # written last: marks the checkpoint as complete
    return folder


def text(vocabulary: int = 2048) -> tuple[Any, list[str]]:
    """Return a tokenizer and documents that need no data folder."""
    from streamline_hooks.data import read_documents

    documents = read_documents("pydoc")
    return train_tokenizer(documents[:60], vocabulary), documents


def peaks() -> dict[str, int]:
    """Return the peak memory of this process in bytes, by both counters of the operating system."""
    status = Path("/proc/self/status").read_text()
    mark = re.search(r"VmHWM:\s+(\d+) kB", status)
    return {
        "ru_maxrss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "VmHWM": 1024 * int(mark[1]) if mark else 0,
    }


def main() -> None:
    show_log()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--folder", type=Path, help="folder of the checkpoint, the hidden states and the result")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", choices=list(STEPS), help="run only this step, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step:
        print(json.dumps(STEPS[options.step](options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        content = {
            "command": f"python -m benchmarks.scale --shape {options.shape} --tokens {options.tokens} "
            f"--threads {options.threads}",
            "machine": machine() | {"load": os.getloadavg()[0]},
            "shape": options.shape,
            "bound": BOUND,
            **{step: _in_a_process(step, options) for step in STEPS},
        }
    write(options.results / "scale.json", content)
    (options.results / "scale.md").write_text(table(content))
    print(table(content))
    if options.shape == "3b" and content["compress"]["peaks"]["ru_maxrss"] > BOUND:
        raise SystemExit(f"The peak memory exceeds {BOUND / 1e9} GB.")


def _in_a_process(step: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--folder", str(options.folder)]
    command += ["--shape", options.shape, "--tokens", str(options.tokens), "--threads", str(options.threads)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def write_step(options: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint."""
    started, folder = time.perf_counter(), options.folder / options.shape
    if not (folder / "model.safetensors.index.json").is_file():
        write_llama(folder, config_of(options.shape))
    files = list(folder.glob("*.safetensors"))
    return {
        "seconds": time.perf_counter() - started,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "peaks": peaks(),
    }


def plan_step(options: argparse.Namespace) -> dict[str, float]:
    """Estimate the seconds of each step from FLOPs, bytes and the measured rates of the first block."""
    from streamline_hooks.checkpoint import open_checkpoint
    from streamline_hooks.core import HardwareConfig
    from streamline_hooks.modeling import find_stack
    from streamline_hooks.pipeline import blockwise_work, measure_rates
    from streamline_hooks.selection import blocks_to_remove

    config = replace(compression_of(options.tokens), hardware=HardwareConfig(batch_size=4))
    stack = find_stack(open_checkpoint(options.folder / options.shape))
    rates = measure_rates(stack, config, options.folder)
    stages, _ = blockwise_work(stack, config, blocks_to_remove(config.target, len(stack)), memory=STATES)
    seconds = {stage.name: stage.seconds(rates) for stage in stages}
    seconds["rank"] += seconds.pop("check")  # the check is part of the profile
    return seconds | {f"rate of {name}": getattr(rates, name) for name in ("products", "float64", "read", "write")}


def compress_step(options: argparse.Namespace) -> dict[str, Any]:
    """Compress the checkpoint with one block in memory at a time."""
    from streamline_hooks.core import HardwareConfig
    from streamline_hooks.pipeline import BlockwiseOptions, RunOptions, compress_checkpoint

    tokenizer, documents = text()
    before, started = peaks(), time.perf_counter()
    result = compress_checkpoint(
        options.folder / options.shape,
        documents,
        replace(compression_of(options.tokens), hardware=HardwareConfig(state_memory=STATES)),
        tokenizer=tokenizer,
        output=options.folder / f"{options.shape}_short",
        options=RunOptions(overwrite=True),
        blockwise=BlockwiseOptions(
            work_folder=options.folder / f"{options.shape}_work",
            max_shard_size="250MB",  # one block; the blocks of a file are in memory together
        ),
    )
    return {
        "seconds": time.perf_counter() - started,
        "steps": result.seconds,
        "peaks_before": before,
        "peaks": peaks(),
        "removed": list(result.plan.removed),
        "blocks": result.plan.old_length,
        "kl": [candidate.distance for candidate in result.candidates],
        "perplexity": result.perplexities,
        "parameters": result.parameters,
    }


def load_step(options: argparse.Namespace) -> dict[str, Any]:
    """Load the compressed checkpoint into memory."""
    from streamline_hooks import load

    started = time.perf_counter()
    model = load(options.folder / f"{options.shape}_short", dtype="auto")
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits
    return {
        "seconds": time.perf_counter() - started,
        "class": type(model).__name__,
        "blocks": model.config.num_hidden_layers,
        "finite": bool(logits.isfinite().all()),
        "peaks": peaks(),
    }


def small_step(options: argparse.Namespace) -> dict[str, Any]:
    """Compress a small model with the same architecture block by block and in memory."""
    from streamline_hooks import compress, load
    from streamline_hooks.pipeline import compress_checkpoint

    tokenizer, documents = text()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original = write_llama(folder / "original", config_of("small"))
        config = compression_of(2048)
        apart = compress_checkpoint(original, documents, config, tokenizer=tokenizer, output=folder / "apart")
        model = load(original, dtype="auto")
        whole = compress(model, documents, config, tokenizer=tokenizer, output=folder / "whole")
        weights = [weights_in(folder / name) for name in ("apart", "whole")]
        return {
            "removed": [list(result.plan.removed) for result in (apart, whole)],
            "kl": [[candidate.distance for candidate in result.candidates] for result in (apart, whole)],
            "same_names": list(weights[0]) == list(weights[1]),
            "largest_difference": max(
                float((weights[0][name].double() - weights[1][name].double()).abs().max()) for name in weights[0]
            ),
        }


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint by name."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            weights.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118 (not a mapping)
    return dict(sorted(weights.items()))


def compression_of(tokens: int) -> CompressionConfig:
    """Return the config of all compressions."""
    from streamline_hooks import CompressionConfig, DataConfig
    from streamline_hooks.pipeline import EvaluationConfig
    from streamline_hooks.selection import WindowSearch

    return CompressionConfig(
        remove=0.25,
        search=WindowSearch(protect=(0, 1, -1), shortlist=3),
        data=DataConfig(
            sequence_length=256,
            calibration_tokens=tokens,
            validation_tokens=tokens // 8,
            test_tokens=tokens // 8,
        ),
        evaluation=EvaluationConfig(speed=False, generation=False),
    )


STEPS = {"write": write_step, "plan": plan_step, "compress": compress_step, "load": load_step, "small": small_step}


def table(content: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    written, planned, compressed, loaded, small = (content[step] for step in STEPS)
    before, after = compressed["parameters"]
    kls = [f"{kl[0]:.6f}" for kl in small["kl"]]
    lines = [
        f"A Llama with {before / 1e9:.2f} billion random weights in bfloat16 ({written['bytes'] / 1e9:.2f} GB in "
        f"{written['files']} files): blocks {compressed['removed'][0]} to {compressed['removed'][-1]} of "
        f"{compressed['blocks']} removed, {after / 1e9:.2f} billion weights after removal; CPU with "
        f"{content['machine']['threads']} threads.",
        "",
        "| process | peak memory (ru_maxrss, GB) | peak memory (VmHWM, GB) | seconds |",
        "|---|---|---|---|",
    ]
    rows = {"write the original": written, "compress": compressed, "load the result into memory": loaded}
    for name, row in rows.items():
        first, second = (row["peaks"][figure] / 1e9 for figure in ("ru_maxrss", "VmHWM"))
        lines.append(f"| {name} | {first:.2f} | {second:.2f} | {row['seconds']:.0f} |")
    lines += [
        "",
        f"Peak memory of the process before the compression: {compressed['peaks_before']['VmHWM'] / 1e9:.2f} GB.",
        "",
        "| step | seconds | planned seconds |",
        "|---|---|---|",
        *(
            f"| {step} | {seconds:.1f} | {f'{planned[step]:.1f}' if step in planned else ''} |"
            for step, seconds in compressed["steps"].items()
        ),
        "",
        f"The result loads as a {loaded['class']} with {loaded['blocks']} blocks. For a small model with the same "
        f"architecture, compression block by block removes blocks {small['removed'][0]}, and compression in memory "
        f"removes blocks {small['removed'][1]}, with a KL of {' and '.join(kls)}; the largest difference of their "
        f"weights is {small['largest_difference']:.1e}.",
        "",
        f"Made by `{content['command']}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

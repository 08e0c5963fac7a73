"""Compress a Llama of about three billion random weights with one block in memory at a time.

    python -m benchmarks.scale [--shape 3b] [--folder FOLDER] [--results FOLDER] [--tokens 4096] [--threads 2]

The checkpoint, 6 GB in bfloat16, is written file by file to ``--folder`` (where it stays, and is taken up again) or to
a temporary one. A process of its own compresses it by `streamline_hooks.blockwise.compress_checkpoint`, and says the
most that it had in memory by the operating system's own figures; another one loads what was written, whole. A small
model of the same make is compressed block by block and in memory, and both are compared. The result goes to
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
from benchmarks.real_text import RESULTS
from benchmarks.small_opt import train_tokenizer
from benchmarks.timing import machine

if TYPE_CHECKING:
    from streamline_hooks import CompressionConfig

# Width, inner width, blocks, heads, heads of keys, vocabulary, and whether the LM head is the embedding.
SHAPES = {
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),  # that of Llama 3.2 3B
    "300m": (1024, 2816, 20, 16, 8, 32_000, False),
    "100m": (768, 2048, 10, 12, 4, 16_000, True),
    "small": (96, 256, 28, 6, 2, 4096, True),
}
BOUND, STATES = 2.5e9, 2**28
_SPREAD = 0.02


def config_of(shape: str) -> LlamaConfig:
    """The configuration of a shape."""
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
    """Write a checkpoint of random weights, a file for each block and for each weight that is in none.

    One file's weights are in memory at a time. The weights of the blocks differ in spread, so that one window loses
    less than another.
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))  # last: says that it is whole
    return folder


def text(vocabulary: int = 2048) -> tuple[Any, list[str]]:
    """A tokenizer and documents, which need no data."""
    from streamline_hooks.calibration import read_documents

    documents = read_documents("pydoc")
    return train_tokenizer(documents[:60], vocabulary), documents


def peaks() -> dict[str, int]:
    """The most that this process had in memory, in bytes, by both figures of the system."""
    status = Path("/proc/self/status").read_text()
    mark = re.search(r"VmHWM:\s+(\d+) kB", status)
    return {
        "ru_maxrss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "VmHWM": 1024 * int(mark[1]) if mark else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--folder", type=Path, help="for the checkpoint, the states and what is written")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=4096, help="to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", choices=list(STEPS), help="only this, in this process")
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
        raise SystemExit(f"More than {BOUND / 1e9} GB were in memory.")


def _in_a_process(step: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--folder", str(options.folder)]
    command += ["--shape", options.shape, "--tokens", str(options.tokens), "--threads", str(options.threads)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(said.splitlines()[-1])


def write_step(options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint on disk."""
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
    """Seconds of each step by the FLOPs and bytes of the model, and the rates of its first block."""
    from streamline_hooks import HardwareConfig
    from streamline_hooks.blockwise import open_checkpoint
    from streamline_hooks.pipeline.blockwise_cost import measure_rates
    from streamline_hooks.pipeline.flops import blockwise_work
    from streamline_hooks.selection import blocks_to_remove
    from streamline_hooks.stack import find_stack

    config = replace(compression_of(options.tokens), hardware=HardwareConfig(batch_size=4))
    stack = find_stack(open_checkpoint(options.folder / options.shape))
    rates = measure_rates(stack, config, options.folder)
    stages, _ = blockwise_work(stack, config, blocks_to_remove(config.target, len(stack)), memory=STATES)
    seconds = {stage.name: stage.seconds(rates) for stage in stages}
    seconds["rank"] += seconds.pop("check")  # it is the profile that checks
    return seconds | {f"rate of {name}": getattr(rates, name) for name in ("products", "float64", "read", "write")}


def compress_step(options: argparse.Namespace) -> dict[str, Any]:
    """The whole way, with one block in memory at a time."""
    from streamline_hooks import HardwareConfig
    from streamline_hooks.blockwise import compress_checkpoint

    tokenizer, documents = text()
    before, started = peaks(), time.perf_counter()
    result = compress_checkpoint(
        options.folder / options.shape,
        tokenizer,
        documents,
        options.folder / f"{options.shape}_short",
        replace(compression_of(options.tokens), hardware=HardwareConfig(state_memory=STATES)),
        overwrite=True,
        work_folder=options.folder / f"{options.shape}_work",
        say=lambda line: print(line, file=sys.stderr, flush=True),
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
    """What was written, whole in memory."""
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
    """A small model of the same make, block by block and in memory."""
    from streamline_hooks import compress, load
    from streamline_hooks.blockwise import compress_checkpoint

    tokenizer, documents = text()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original = write_llama(folder / "original", config_of("small"))
        config = compression_of(2048)
        apart = compress_checkpoint(original, tokenizer, documents, folder / "apart", config)
        model = load(original, dtype="auto")
        whole = compress(model, tokenizer, documents, config, output=folder / "whole")
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
    """All weights of a checkpoint, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (it is no mapping)
    return dict(sorted(found.items()))


def compression_of(tokens: int) -> CompressionConfig:
    """Return the config of all compressions, with a number of calibration tokens."""
    from streamline_hooks import CompressionConfig, DataConfig, EvaluationConfig, WindowSearch  # after the first peak

    return CompressionConfig(
        remove=0.25,
        search=WindowSearch(keep=(0, 1, -1), shortlist=3),
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
    """The result as Markdown."""
    written, planned, found, loaded, small = (content[step] for step in STEPS)
    before, after = found["parameters"]
    kls = [f"{kl[0]:.6f}" for kl in small["kl"]]
    lines = [
        f"A Llama of {before / 1e9:.2f} billion random weights in bfloat16, {written['bytes'] / 1e9:.2f} GB in "
        f"{written['files']} files, loses blocks {found['removed'][0]} to {found['removed'][-1]} of {found['blocks']} "
        f"and has {after / 1e9:.2f} billion then; {content['machine']['threads']} threads.",
        "",
        "| process | most in memory (ru_maxrss, GB) | (VmHWM, GB) | seconds |",
        "|---|---|---|---|",
    ]
    rows = {"writes the original": written, "compresses it": found, "loads the result whole": loaded}
    for name, row in rows.items():
        first, second = (row["peaks"][figure] / 1e9 for figure in ("ru_maxrss", "VmHWM"))
        lines.append(f"| {name} | {first:.2f} | {second:.2f} | {row['seconds']:.0f} |")
    lines += [
        "",
        f"Before the compression began, its process had {found['peaks_before']['VmHWM'] / 1e9:.2f} GB.",
        "",
        "| step | seconds | planned |",
        "|---|---|---|",
        *(
            f"| {step} | {seconds:.1f} | {f'{planned[step]:.1f}' if step in planned else ''} |"
            for step, seconds in found["steps"].items()
        ),
        "",
        f"What was written loads as a {loaded['class']} of {loaded['blocks']} blocks. A small model of the same make "
        f"loses blocks {small['removed'][0]} block by block and {small['removed'][1]} in memory, with a KL of "
        f"{' and '.join(kls)}; the weights that are written differ by {small['largest_difference']:.1e} at most.",
        "",
        f"Made by `{content['command']}`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The checkpoints of docs/engines.md: python -m tests.engines.engine_checkpoints FOLDER [NAME ...]."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import small_opt
from streamline_hooks import LayerSurgeon, fit_windows, save
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.cli import parse_replacement
from streamline_hooks.data import read_documents
from streamline_hooks.repair import insert_replacement
from streamline_hooks.testing import tiny_model
from tests.checkpoint.export.small_tokenizer import small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WINDOW, WINDOWS = range(12, 16), (range(8, 10), range(16, 18))
PROMPT_TOKENS = (4, 7, 11, 16, 20, 25, 31, 38)
NEW_TOKENS = 32


@functools.cache
def _qwen_file() -> Path:
    """Return the GGUF file of Qwen2.5-Coder-0.5B-Instruct, which the recipe of the data folder assembles once."""
    folder = ROOT / "build" / "qwen"
    if not (files := sorted(folder.glob("*.gguf"))):
        recipe = Path(os.environ["STREAMLINE_DATA"], "recipes", "assemble_qwen.sh")
        subprocess.run(["bash", str(recipe), str(folder)], check=True)
        files = sorted(folder.glob("*.gguf"))
    return files[0]


@functools.cache
def _small_opt() -> Any:
    """Return the OPT of `benchmarks.small_opt`; if it was not trained, one that is trained for a tenth of the steps."""
    if (small_opt.FOLDER / "config.json").is_file():
        return small_opt.load_small_opt()
    recipe = replace(small_opt.Recipe(), steps=450)
    documents = read_documents(Path(os.environ["STREAMLINE_DATA"], "text", "train"))
    tokenizer = small_opt.train_tokenizer(documents, recipe.vocabulary)
    stream = small_opt.stream_of(documents, tokenizer, recipe.seed)
    training = small_opt.Training(recipe, stream, ROOT / "build" / "engines_opt.pt")
    training.run()
    return training.model.eval(), tokenizer


@functools.cache
def _original(name: str) -> Any:
    if name == "small OPT":
        return _small_opt()
    return load_pretrained("smollm2" if name == "SmolLM2" else _qwen_file())


@functools.cache
def _text(name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return calibration and validation text, (sequences, tokens) each."""
    tokenizer = _original(name)[1]
    ids = tokenizer("\n\n".join(read_documents("pydoc")[:40]), return_tensors="pt").input_ids[0]
    sequences = ids[: 2 * tokens].view(-1, 256)
    return sequences[::2], sequences[1::2]


def _copy(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model, tokenizer = copy.deepcopy(_original(name))
    return model.to(dtype), tokenizer


def _replaced(name: str, kind: str, windows: Sequence[range] = (WINDOW,), dtype: torch.dtype = torch.float32) -> Any:
    """Return a real model with each window replaced by a kind of replacement."""
    model, tokenizer = _copy(name)
    calibration, validation = _text(name, 4096)
    fitted = fit_windows(model, list(windows), parse_replacement(kind), [calibration], [validation])
    with LayerSurgeon(model) as surgeon:
        for repair in sorted(fitted, key=lambda repair: -repair.window.start):
            insert_replacement(surgeon, repair.window, repair.replacement_module)
        surgeon.commit(kind=kind)
    return model.to(dtype), tokenizer


def _tiny(model_type: str) -> Any:
    """Return a random model without its second block, far from its initial values."""
    config = copy.deepcopy(tiny_model(model_type).config)
    # The kernel of vLLM for CPUs needs larger heads than those of the tiny model.
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    for name, value in (sizes | {"query_pre_attn_scalar": 64, "word_embed_proj_dim": 128}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.sliding_window = None if model_type == "mixtral" else getattr(config, "sliding_window", None)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    return model, None


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "SmolLM2, original": partial(_copy, "SmolLM2"),
    **{
        f"SmolLM2, {kind}": partial(_replaced, "SmolLM2", kind)
        for kind in ("none", "scale", "folded", "merged", "block", "silenced", "linear", "swiglu")
    },
    "SmolLM2, none, two windows": partial(_replaced, "SmolLM2", "none", WINDOWS),
    "SmolLM2, linear, two windows": partial(_replaced, "SmolLM2", "linear", WINDOWS),
    "SmolLM2, original, bfloat16": partial(_copy, "SmolLM2", torch.bfloat16),
    "SmolLM2, folded, bfloat16": partial(_replaced, "SmolLM2", "folded", dtype=torch.bfloat16),
    # Saved in float32; each engine quantizes the weights itself.
    "SmolLM2, original, int8": partial(_copy, "SmolLM2"),
    "SmolLM2, folded, int8": partial(_replaced, "SmolLM2", "folded"),
    "Qwen2.5-Coder, original": partial(_copy, "Qwen2.5-Coder"),
    "Qwen2.5-Coder, none": partial(_replaced, "Qwen2.5-Coder", "none"),
    "Qwen2.5-Coder, silenced": partial(_replaced, "Qwen2.5-Coder", "silenced"),
    "small OPT, original": partial(_copy, "small OPT"),
    "small OPT, none": partial(_replaced, "small OPT", "none", (range(4, 6),)),
    "tiny Qwen 3, none": lambda: _tiny("qwen3"),
    "tiny Gemma 3, none": lambda: _tiny("gemma3_text"),
    "tiny Mixtral, none": lambda: _tiny("mixtral"),
    "tiny OPT, none": lambda: _tiny("opt"),
}
"""Model and tokenizer of each checkpoint."""


def folder_of(root: Path, name: str) -> Path:
    return root / name.lower().replace(", ", "-").replace(" ", "_")


def write_checkpoint(root: Path, name: str) -> Path:
    """Save a checkpoint with prompts, unless it exists."""
    folder = folder_of(root, name)
    if (folder / "prompts.json").is_file():
        return folder
    model, tokenizer = CHECKPOINTS[name]()
    save(model, folder, tokenizer=tokenizer, overwrite=True)
    if tokenizer is None:
        small_tokenizer(folder, model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    low, high = 20, min(model.config.vocab_size, 40_000)
    prompts = [torch.randint(low, high, (count,), generator=generator).tolist() for count in PROMPT_TOKENS]
    eos = model.generation_config.eos_token_id
    never = sorted({0, 1, 2, 11, *([] if eos is None else torch.tensor([eos]).flatten().tolist())})
    content = {"prompts": prompts, "never": never, "new_tokens": NEW_TOKENS, "quantized": name.endswith("int8")}
    (folder / "prompts.json").write_text(json.dumps(content))
    return folder


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    for checkpoint in sys.argv[2:] or CHECKPOINTS:
        print(write_checkpoint(Path(sys.argv[1]), checkpoint), flush=True)

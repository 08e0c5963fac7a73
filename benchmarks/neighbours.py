"""Score the code of other projects on the scale of `benchmarks.retained_quality`, with the same text.

    python -m benchmarks.neighbours --streamline FOLDER --replaceme FOLDER [--data FOLDER] [--removed 8]
        [--tokens 200704] [--seed 0] [--final]

The folders are clones of RUCKBReasoning/LLM-Streamline and mts-ai/ReplaceMe, which are not part of this repository.
Their functions run unchanged, with the following exceptions. LLM-Streamline: the text replaces SlimPajama; the block
gets rotary positions, which Transformers passes to it since 4.48; a step has 2 sequences of 2,048 tokens in two parts,
because 200,000 tokens are less than one of its batches of 128. With two parts, its cosine schedule, whose length is
half of the number of parts, ends at the lowest rate. Its block is trained without a causal mask, as in its code. It
replaces one block more than are removed by one block. ReplaceMe: the text replaces its datasets; sums are on the CPU
instead of ``cuda``; packages that its least squares do not use are replaced by stand-ins; its distances are saved as
Python numbers; its model is saved in bfloat16 and scored in float32. Each project chooses its own window. The rows are
saved in the file of `benchmarks.retained_quality`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.real_text import arguments
from benchmarks.retained_quality import Bench, Run
from benchmarks.short_answers import products
from benchmarks.training_text import training_text
from streamline_hooks.checkpoint import load_pretrained

LENGTH = 2048  # tokens of a sequence in LLM-Streamline's code
BATCH, PARTS = 1, 2  # sequences of each forward pass, and forward passes of each step
MISSING = ("colorama", "termcolor", "torchmin")  # packages that ReplaceMe imports and that are not needed here


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--streamline", type=Path, help="clone of RUCKBReasoning/LLM-Streamline")
    parser.add_argument("--replaceme", type=Path, help="clone of mts-ai/ReplaceMe")
    parser.add_argument("--removed", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200_704)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--final", action="store_true", help="score on held-out text and questions too")
    options = parser.parse_args()
    options.model = "smollm2"
    bench = Bench(options)
    projects: list[tuple[str, Path | None, Callable[..., tuple[Any, list[int]]]]] = [
        ("LLM-Streamline, its code", options.streamline, streamline),
        ("ReplaceMe, its code", options.replaceme, replaceme),
    ]
    for name, folder, compress in projects:
        run = Run(name, options.removed, options.tokens, options.seed)
        bench.read()
        done = bench.content["rows"].get(run.key)
        if folder is None or (done is not None and ("final" in done or not options.final)):
            continue
        text = training_text(options.data, bench.tokenizer, run.tokens, run.seed, left_out=run.left_out)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as work:
            model, window = compress(folder.resolve(), Path(work), bench.tokenizer, text.train, text.validation, run)
        row = {
            "recipe": name,
            "removed": run.removed,
            "tokens": run.tokens,
            "seed": run.seed,
            "left_out": run.left_out,
            "window": window,
            "training": None,
            "minutes": (time.process_time() - began) / 60,
            "products": products(),
            "development": bench.score_development(model, run, text),
        }
        bench.store("rows", run.key, row | ({"final": bench.score_final(model)} if options.final else {}))
        print(name, "replaced blocks", window, row["development"]["kl"], flush=True)


def streamline(
    folder: Path, work: Path, tokenizer: Any, train: Tensor, validation: Tensor, run: Run
) -> tuple[nn.Module, list[int]]:
    """Train a block with the code of LLM-Streamline; return the model and its window."""
    model = load_pretrained("smollm2")[0]
    config = model.config
    layers = config.num_hidden_layers
    with imported(folder, work):
        training = importlib.import_module("LLM_Streamline.train_lightweightnetwork")
        surgery = importlib.import_module("LLM_Streamline.train_mseloss")
        training.load_dataset = lambda *_: {"train": None}
        training.process_datasets = lambda *_: (_sequences(train), _sequences(validation))
        training.LlamaDecoderLayer = BlockWithPositions
        torch.manual_seed(run.seed)
        model.set_attn_implementation("eager")  # without a mask it attends to all tokens, as in the published code
        count = len(train) * train.shape[1] // LENGTH
        numbers = {"cosine_num_data": min(50, count - 1), "train_num_data": count, "batch_size": BATCH, "epochs": 1}
        rates = {"lr": 2e-4, "min_lr": 5e-5, "wd": 1e-3, "gradient_accumulation_step": PARTS}
        block, first = training.lightweight_model_train(
            model, tokenizer, "cpu", run.removed + 1, layers, **numbers, **rates, config=config, model_name="llama"
        )
        weights = {name.removeprefix("block."): value for name, value in block.state_dict().items()}
        config.num_hidden_layers -= run.removed
        shorter = AutoModelForCausalLM.from_config(config)
        trained = types.SimpleNamespace(state_dict=lambda: weights)
        result = surgery.replace_lightweight_network(model, trained, shorter, first, run.removed + 1, "llama", layers)
    result.save_pretrained(work / "shorter")
    return AutoModelForCausalLM.from_pretrained(work / "shorter"), [first, first + run.removed + 1]


class BlockWithPositions(nn.Module):
    """A Llama block that is called with position ids, as before Transformers 4.48."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.block, self.positions = LlamaDecoderLayer(config, number), LlamaRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Any:
        """Return the block's output."""
        embeddings = self.positions(hidden_states, position_ids)
        return self.block(hidden_states, position_ids=position_ids, position_embeddings=embeddings)

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights with the names of the block."""
        own = {f"block.{name.removeprefix('block.')}": value for name, value in state.items()}
        return super().load_state_dict(own, *args, **kwargs)


def _sequences(rows: Tensor) -> list[dict[str, list[int]]]:
    """Return the text as sequences of LENGTH tokens."""
    ids = rows.flatten()
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in whole.tolist()]


def replaceme(
    folder: Path, work: Path, tokenizer: Any, train: Tensor, validation: Tensor, run: Run
) -> tuple[nn.Module, list[int]]:
    """Fit a linear map with the code of ReplaceMe; return the model and its window."""
    original = work / "original"
    load_pretrained("smollm2")[0].save_pretrained(original)
    tokenizer.save_pretrained(original)
    documents = tokenizer.batch_decode(train)
    with imported(folder, work, patched={"ReplaceMe/lstsq.py": ("device='cuda'", "device='cpu'")}):
        distance = importlib.import_module("ReplaceMe.distance")
        fit = importlib.import_module("ReplaceMe.lstsq")

        def loader(*_: Any) -> list[list[str]]:
            return [documents[k : k + 8] for k in range(0, len(documents) - 7, 8)]

        distance.get_calib_dataloader = fit.get_calib_dataloader = loader
        settings = {"model_path": str(original), "dataset": "", "dataset_column": "", "batch_size": 8}
        settings |= {"max_length": 1024, "layers_to_skip": run.removed}
        distance.profile_distances(**settings)
        average = torch.load("distances.pth", weights_only=False)
        torch.save([float(value) for value in average], "distances.pth")  # NumPy's numbers are not loaded by default
        path = fit.lstsq(**settings, save_path=str(work / "shorter"), distances_path="distances.pth")
        start = min(range(len(average)), key=lambda k: average[k]) + 1
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, [start, start + run.removed]


@contextmanager
def imported(folder: Path, work: Path, patched: dict[str, tuple[str, str]] | None = None) -> Iterator[None]:
    """Import from a copy of a clone with replaced strings, in a working folder, until the context ends."""
    copied = work / "code"
    for file in folder.rglob("*.py"):
        target = copied / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text("utf-8"), "utf-8")
    for name, (old, new) in (patched or {}).items():
        code = (copied / name).read_text("utf-8")
        if old not in code:
            raise SystemExit(f"{folder / name} has no {old!r}, so it is another version than this benchmark expects.")
        (copied / name).write_text(code.replace(old, new), "utf-8")
    known, before = set(sys.modules), Path.cwd()
    stubs = {name: _Anything(name) for name in MISSING if importlib.util.find_spec(name) is None}
    sys.path.insert(0, str(copied))
    sys.modules.update(stubs)
    os.chdir(work)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(copied))
        for name in set(sys.modules) - known:
            if name in stubs or name.partition(".")[0] in ("LLM_Streamline", "ReplaceMe", "args"):
                del sys.modules[name]


class _Anything(types.ModuleType):
    """A module whose names can be used for printing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Printed()


class _Printed(str):
    """An empty text that can be called and has all attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self

    def __getattr__(self, name: str) -> Any:
        return "" if not name.startswith("__") else super().__getattribute__(name)


if __name__ == "__main__":
    main()

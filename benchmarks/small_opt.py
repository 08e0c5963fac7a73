"""Train a small OPT from scratch, the other model family of LLM-Streamline's paper.

    python -m benchmarks.small_opt [--data FOLDER] [--threads N] [--anew]

A byte-level BPE and an OPT with 8 blocks (4.4 million parameters, learned positions, ReLU, pre-norm) are trained on
``text/train`` for 1.3 epochs. That takes about 20 minutes on two idle cores whose products in bfloat16 are fast, and
twice as long in float32 on others. A checkpoint is saved every minute, and an interrupted run is resumed. Model and
tokenizer are saved to ``build/small_opt``; the perplexities of the model and of a bigram on the held-out domains are
saved to ``benchmarks/results/small_opt.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.bigram import Bigram
from benchmarks.real_text import RESULTS, ROOT, SEQUENCE, arguments, heldout
from benchmarks.short_answers import products
from benchmarks.timing import machine
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import progress_bar
from streamline_hooks.core import table as format_table
from streamline_hooks.data import read_documents
from streamline_hooks.evaluation import Perplexity, perplexity

FOLDER = ROOT / "build" / "small_opt"
FILE = RESULTS / "small_opt.json"
SCORED = 32  # sequences per domain
CLEARLY = 0.8  # largest allowed ratio to the perplexity of the bigram
SECONDS_BETWEEN_CHECKPOINTS = 60.0
START, PAD, END = "<s>", "<pad>", "</s>"  # token ids 0, 1 and 2, as in OPT; END separates documents


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule: AdamW with linear warm-up and cosine decay to a tenth."""

    width: int = 192
    blocks: int = 8
    heads: int = 3
    vocabulary: int = 4096
    sequence: int = SEQUENCE
    batch: int = 2
    steps: int = 4_500
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE; it has a token for every byte and no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, PAD, END],
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=SEQUENCE,
    )


def stream_of(documents: Sequence[str], tokenizer: Any, seed: int) -> Tensor:
    """Return the tokens of the documents in a seeded order, each followed by END."""
    order = Random(seed).sample(range(len(documents)), len(documents))
    each = tokenizer([documents[k] for k in order], add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for ids in each for token in (*ids, tokenizer.eos_token_id)])


def new_model(recipe: Recipe) -> Any:
    """Return an OPT with random weights whose residual branches are initialized to zero."""
    config = transformers.OPTConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        word_embed_proj_dim=recipe.width,
        ffn_dim=4 * recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.sequence,
        dropout=0.0,  # no token is seen more than twice
        attention_dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        init_std=recipe.width**-0.5,
        attn_implementation="eager",  # at these sizes the fused kernel is slower on a CPU
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = transformers.OPTForCausalLM(config)
    for block in model.model.decoder.layers:
        torch.nn.init.zeros_(block.self_attn.out_proj.weight)
        torch.nn.init.zeros_(block.fc2.weight)
    model.model.decoder.embed_positions.weight.data.mul_(0.2)
    return model


class Training:
    """A training run that resumes from its checkpoint.

    Parameters
    ----------
    recipe : Recipe
    stream : torch.Tensor
        Tokens of the text, of shape (tokens,).
    checkpoint : Path
        File of the checkpoint. It must be of the same recipe and text.
    """

    def __init__(self, recipe: Recipe, stream: Tensor, checkpoint: Path) -> None:
        self.recipe, self.checkpoint = recipe, checkpoint
        whole = len(stream) // recipe.sequence
        if not whole:
            raise SystemExit(f"The text has {len(stream)} tokens. Expected at least one sequence of {recipe.sequence}.")
        self.sequences = stream[: whole * recipe.sequence].view(-1, recipe.sequence)
        self.model = new_model(recipe).train()
        groups = _groups(self.model, recipe.decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99), fused=True)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self._identity = {**asdict(recipe), "text": hashlib.sha256(stream.numpy().tobytes()).hexdigest()}
        if checkpoint.exists():
            self._go_on(torch.load(checkpoint, weights_only=True))

    def run(self, until: int | None = None) -> None:
        """Train up to a step, by default to the end."""
        until, recipe = self.recipe.steps if until is None else until, self.recipe
        tokens = recipe.batch * recipe.sequence
        saved = time.monotonic()
        with progress_bar(recipe.steps * tokens, "small OPT") as bar:
            bar.update(self.step * tokens)
            while self.step < until:
                started = time.monotonic()
                self.losses.append(self._learn(self.batch_of_step(self.step)))
                if not math.isfinite(self.losses[-1]):
                    raise SystemExit(f"The loss of step {self.step} is {self.losses[-1]}. Use a lower learning rate.")
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{_mean(self.losses[-50:]):.3f}", refresh=False)
                bar.update(tokens)
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half = self.checkpoint.with_suffix(".half")
        content = {
            "identity": self._identity,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, half)
        os.replace(half, self.checkpoint)

    def _go_on(self, content: dict[str, Any]) -> None:
        if content["identity"] != self._identity:
            raise SystemExit(
                f"{self.checkpoint} was made with another recipe or text. Pass --anew to delete it and start again."
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds, self.losses = content["step"], content["seconds"], content["losses"]

    def batch_of_step(self, step: int) -> Tensor:
        """Return the sequences of a step; each epoch has another seeded order."""
        places = range(step * self.recipe.batch, (step + 1) * self.recipe.batch)
        return torch.stack(
            [self.sequences[self._order(p // len(self.sequences))[p % len(self.sequences)]] for p in places]
        )

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.sequences), generator=torch.Generator().manual_seed(self.recipe.seed + epoch))

    def _learn(self, ids: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=products() == "bfloat16"):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def compare(model: Any, bigram: Bigram, domains: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Return the perplexities of both models by domain and over all domains."""
    perplexities: dict[str, Any] = {}
    opt_total, bigram_total = Perplexity(), Perplexity()
    for name, batches in domains.items():
        opt = perplexity(model, batches, name)
        bigram_perplexity = Perplexity(sum(bigram.nll(batch["input_ids"]) for batch in batches), opt.tokens)
        perplexities[name] = {"opt": opt.value, "bigram": bigram_perplexity.value, "tokens": opt.tokens}
        opt_total, bigram_total = opt_total + opt, bigram_total + bigram_perplexity
    perplexities["all"] = {"opt": opt_total.value, "bigram": bigram_total.value, "tokens": opt_total.tokens}
    return perplexities


def load_small_opt(folder: Path = FOLDER) -> tuple[Any, Any]:
    """Load the trained model, in float32, and its tokenizer."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"There is no model in {folder}. Train it with `python -m benchmarks.small_opt`.")
    return load_pretrained(folder)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--anew", action="store_true", help="delete the checkpoint and start again")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe, checkpoint = Recipe(), FOLDER / "training.pt"
    if options.anew:
        checkpoint.unlink(missing_ok=True)
    documents = read_documents(options.data / "text" / "train")
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    stream = stream_of(documents, tokenizer, recipe.seed)
    training = Training(recipe, stream, checkpoint)
    training.run()
    model = training.model.eval()
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    perplexities = compare(model, Bigram(stream, recipe.vocabulary), heldout(options.data, tokenizer, SCORED))
    row = {
        "command": "python -m benchmarks.small_opt",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(stream),
        "trained_tokens": recipe.steps * recipe.batch * recipe.sequence,
        "training_seconds": round(training.seconds),
        "last_loss": _mean(training.losses[-50:]),
        "perplexity": perplexities,
        "machine": machine(),
    }
    FILE.write_text(json.dumps(row, indent=1) + "\n")
    print(table(perplexities))
    ratio = perplexities["all"]["opt"] / perplexities["all"]["bigram"]
    if ratio > CLEARLY:
        raise SystemExit(
            f"The ratio of the perplexity to that of the bigram is {ratio:.2f}. Expected at most {CLEARLY}."
        )


def table(perplexities: dict[str, Any]) -> str:
    rows = [[name, f"{p['opt']:.1f}", f"{p['bigram']:.1f}"] for name, p in perplexities.items()]
    return format_table(rows, ["perplexity", "small OPT", "bigram"])


def _groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()

"""A small OPT, trained from scratch: the other family of the paper, of which no weights are at hand.

    python -m benchmarks.small_opt [--data FOLDER] [--threads N] [--anew]

A byte-level BPE and an OPT of 8 blocks (4.4 million parameters, learned positions, ReLU, norms before the branches)
are trained on ``text/train``, one and a third times through: about 15 minutes on two quiet cores. What was reached is
kept every minute, and a run that was interrupted goes on from there. Model and tokenizer go to ``build/small_opt``;
perplexity on the held-out domains, beside that of a bigram model of the same text and tokens, to
``benchmarks/results/small_opt.json``.
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
from benchmarks.timing import machine
from streamline_hooks.calibration import read_documents
from streamline_hooks.core.tables import table as format_table
from streamline_hooks.evaluation import Perplexity, perplexity
from streamline_hooks.passes import progress
from streamline_hooks.pretrained import load_pretrained

FOLDER = ROOT / "build" / "small_opt"
FILE = RESULTS / "small_opt.json"
SCORED = 32  # sequences a domain
CLEARLY = 0.8  # of the bigram's perplexity, which is not to be exceeded
SECONDS_BETWEEN_CHECKPOINTS = 60.0
START, PAD, END = "<s>", "<pad>", "</s>"  # 0, 1 and 2, as OPT has them; END stands between documents


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule: AdamW, a linear warm-up, then a cosine down to a tenth."""

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
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE, which has a token for every byte and so needs none for the unknown."""
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
    """The documents in a seeded order, each with END after it, as one text."""
    order = Random(seed).sample(range(len(documents)), len(documents))
    each = tokenizer([documents[k] for k in order], add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for ids in each for token in (*ids, tokenizer.eos_token_id)])


def new_model(recipe: Recipe) -> Any:
    """An OPT with random weights, in which the branches add nothing yet, so that the tokens are not drowned by them."""
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
    """A run that goes on where its checkpoint stands.

    Parameters
    ----------
    recipe : Recipe
    stream : torch.Tensor
        The text, of shape (tokens,).
    checkpoint : Path
        Of the same recipe and text, or it is not gone on with.
    """

    def __init__(self, recipe: Recipe, stream: Tensor, checkpoint: Path) -> None:
        self.recipe, self.checkpoint = recipe, checkpoint
        whole = len(stream) // recipe.sequence
        if not whole:
            raise SystemExit(f"The text has {len(stream)} tokens, less than one sequence of {recipe.sequence}.")
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
        """Train up to a step, the last one by default."""
        until, recipe = self.recipe.steps if until is None else until, self.recipe
        tokens = recipe.batch * recipe.sequence
        saved = time.monotonic()
        with progress(recipe.steps * tokens, "small OPT") as bar:
            bar.update(self.step * tokens)
            while self.step < until:
                started = time.monotonic()
                self.losses.append(self._learn(self.batch_of_step(self.step)))
                if not math.isfinite(self.losses[-1]):
                    raise SystemExit(f"The loss of step {self.step} is {self.losses[-1]}; try a lower rate.")
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{_mean(self.losses[-50:]):.3f}", refresh=False)
                bar.update(tokens)
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
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
                f"{self.checkpoint} was made with another recipe or text; --anew deletes it and begins again."
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds, self.losses = content["step"], content["seconds"], content["losses"]

    def batch_of_step(self, step: int) -> Tensor:
        """The sequences of a step: all of them in a seeded order, then in another one."""
        places = range(step * self.recipe.batch, (step + 1) * self.recipe.batch)
        return torch.stack(
            [self.sequences[self._order(p // len(self.sequences))[p % len(self.sequences)]] for p in places]
        )

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.sequences), generator=torch.Generator().manual_seed(self.recipe.seed + epoch))

    def _learn(self, ids: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def compare(model: Any, bigram: Bigram, domains: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Perplexity of both on the same tokens: by domain, and over all of them."""
    found: dict[str, Any] = {}
    ours, theirs = Perplexity(), Perplexity()
    for name, batches in domains.items():
        one = perplexity(model, batches, name)
        two = Perplexity(sum(bigram.nll(batch["input_ids"]) for batch in batches), one.tokens)
        found[name] = {"opt": one.value, "bigram": two.value, "tokens": one.tokens}
        ours, theirs = ours + one, theirs + two
    found["all"] = {"opt": ours.value, "bigram": theirs.value, "tokens": ours.tokens}
    return found


def load_small_opt(folder: Path = FOLDER) -> tuple[Any, Any]:
    """The trained model, in float32, and its tokenizer."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"There is no model in {folder}; train it with `python -m benchmarks.small_opt`.")
    return load_pretrained(folder)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--anew", action="store_true", help="do not go on where a run stopped")
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
        raise SystemExit(f"Perplexity is {ratio:.2f} of the bigram's; at most {CLEARLY} was to be reached.")


def table(perplexities: dict[str, Any]) -> str:
    rows = [[name, f"{p['opt']:.1f}", f"{p['bigram']:.1f}"] for name, p in perplexities.items()]
    return format_table(rows, ["perplexity", "small OPT", "bigram"])


def _groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and the weights of norms do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()

"""Train with Hugging Face's Trainer, monitor the hidden states, and remove the least important block during training.

    python examples/train_with_monitor.py [--model MODEL] [--steps 60] [--every 10] [--remove-at 40] [--output DIR]

Without --model a small Llama is trained from scratch on Python's help text. Statistics of the hidden states of every
N-th step are written to DIR/states.jsonl and to TensorBoard (tensorboard --logdir DIR); the shortened model is saved to
DIR/model. Requires the package tensorboard.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from streamline_hooks import find_stack, profile
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.core import split_into_batches
from streamline_hooks.data import read_documents
from streamline_hooks.training import MonitorCallback, ProgressiveRemovalCallback

SEQUENCE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a model, or smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--remove-at", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("build/train_with_monitor"))
    options = parser.parse_args()

    torch.manual_seed(0)
    documents = read_documents(["pydoc"])
    if options.model is None:
        model, tokens = small_llama(), bytes_of(documents)
    else:
        model, tokenizer = load_pretrained(options.model)
        tokens = tokens_of(documents, tokenizer)
    rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    held_out = split_into_batches(rows[:8], 4)

    def least_important(model: torch.nn.Module) -> range:
        """Return the block with the most similar input and output, except the first and the last block."""
        cosine = profile(model, held_out, replicates=0).cosine.diagonal(offset=1)
        block = 1 + int(cosine[1:-1].argmax())
        print(f"removing block {block} of {len(find_stack(model))}: cosine {cosine[block]:.3f}")
        return range(block, block + 1)

    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=options.every,
        report_to=["tensorboard"],
        save_strategy="no",
        seed=0,
    )
    dataset = [{"input_ids": ids, "labels": ids} for ids in rows[8:]]
    trainer = Trainer(model, arguments, train_dataset=dataset)
    states = options.output / "states.jsonl"
    states.unlink(missing_ok=True)
    trainer.add_callback(ProgressiveRemovalCallback({options.remove_at: least_important}))
    trainer.add_callback(MonitorCallback(trainer, every=options.every, file=states))
    trainer.train()

    for line in map(json.loads, states.read_text().splitlines()):
        influence = " ".join(f"{value:.2f}" for value in line["influence"])
        print(f"step {line['step']:4}  influence {influence}  gradient at block 0 {line['gradient_norm'][0]:.1e}")
    model.save_pretrained(options.output / "model")
    print(f"saved a model of {len(find_stack(model))} blocks in {options.output / 'model'}")


def small_llama() -> LlamaForCausalLM:
    """Return a Llama of eight blocks whose tokens are bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=SEQUENCE,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def bytes_of(documents: list[str]) -> torch.Tensor:
    """Return the bytes of the concatenated documents as token ids."""
    return torch.tensor(list("\n\n".join(documents).encode()))


def tokens_of(documents: list[str], tokenizer: AutoTokenizer) -> torch.Tensor:
    """Return the token ids of the concatenated documents."""
    return torch.tensor([t for text in documents for t in tokenizer(text, verbose=False).input_ids])


if __name__ == "__main__":
    main()

"""Distill a compressed model on text that it generates, with TRL's GKDTrainer.

    streamline-hooks compress MODEL -o SHORT --preset best
    python examples/on_policy_distillation.py MODEL SHORT -o DISTILLED [--text FILE ...] [--steps 200]

The compressed model is the student and the original model is the teacher. In a fraction `lmbda` of the steps the
student generates a continuation of a prompt from the text and learns the teacher's distribution at each generated
position; the other steps use the continuation in the text (GKD, arXiv 2306.13649). To install TRL:
`pip install "streamline_hooks[trl]"`. For a chat model, pass conversations in a column `messages` instead; the trainer
applies the chat template.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from streamline_hooks import load, save
from streamline_hooks.data import read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", help="folder or hub name of the original model")
    parser.add_argument("student", type=Path, help="folder of the compressed model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--text", nargs="+", default=["pydoc"], help="files or folders of text")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.original)
    teacher = AutoModelForCausalLM.from_pretrained(options.original)
    student = load(options.student)
    distill(student, teacher, tokenizer, read_documents(options.text), steps=options.steps, output=options.output)


def distill(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    documents: list[str],
    *,
    steps: int,
    output: Path,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    use_cpu: bool = False,
) -> None:
    """Train the student in place, and save it as a checkpoint for `streamline_hooks.load`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GKDConfig(
        output_dir=str(output.with_name(f"{output.name}.trainer")),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lmbda=0.5,  # the fraction of steps on generated text
        beta=0.0,  # KL(teacher || student); 1.0 is the reverse KL
        max_new_tokens=new_tokens,
        max_length=prompt_tokens + new_tokens,
        gradient_checkpointing=False,  # generate with a cache
        save_strategy="no",
        report_to="none",
        use_cpu=use_cpu,
        bf16=False,
    )
    texts = dataset(documents, tokenizer, prompt_tokens, new_tokens)
    trainer = GKDTrainer(student, teacher_model=teacher, args=config, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    save(trainer.accelerator.unwrap_model(trainer.model), output, tokenizer=tokenizer)


def dataset(documents: list[str], tokenizer: Any, prompt_tokens: int, new_tokens: int) -> Dataset:
    """Return the beginning of each document, divided into a prompt and a continuation."""
    length = prompt_tokens + new_tokens
    rows = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, truncation=True, max_length=length).input_ids
        if len(ids) > prompt_tokens:
            after = len(ids) - prompt_tokens
            rows.append(
                {
                    "prompt": tokenizer.decode(ids[:prompt_tokens]),
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "completion_mask": [0] * prompt_tokens + [1] * after,  # 1 for the continuation
                }
            )
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()

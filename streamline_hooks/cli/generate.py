"""The command ``streamline-hooks generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from streamline_hooks.cli.loading import load_model
from streamline_hooks.errors import StreamlineError


def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that compress wrote, or any model.")],
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.", min=0.0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text through the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a text with a saved model."""
    import torch
    from transformers import TextStreamer

    model: Any
    tokenizer: Any
    model, tokenizer = load_model(folder)
    if chat and not tokenizer.chat_template:
        raise StreamlineError(f"The tokenizer of {folder} has no chat template; leave --chat away.")
    if chat:
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[-1] == 0:
        raise StreamlineError("The text has no token; give some text to continue.")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=padding, streamer=streamer, **sampling)

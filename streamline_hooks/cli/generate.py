"""Implement ``streamline-hooks generate``."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from transformers import TextStreamer

from streamline_hooks.checkpoint import LoadingConfig, load_quietly, require_causal_lm
from streamline_hooks.cli.config_options import OptionValues, read_loading, with_options
from streamline_hooks.cli.options import Json
from streamline_hooks.cli.output import print_json, print_log
from streamline_hooks.core import StreamlineError, device_of
from streamline_hooks.evaluation import generate_with_both, require_same_tokens, side_by_side, tokenize_prompt
from streamline_hooks.modeling import default_generation_config, eos_token_ids

Folder = Annotated[str, Parameter(help="Folder with a compressed model, or any model.")]
Texts = Annotated[list[str], Parameter(help="Texts to continue, one after the other.")]
Against = Annotated[str, Parameter(help="The original model, to print the texts of both models in two columns.")]
MaxNewTokens = Annotated[int, Parameter(help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, Parameter(help="Sampling temperature; 0 always takes the most likely token.")]
Chat = Annotated[bool, Parameter(help="Apply the chat template of the model to the text.")]
Seed = Annotated[int, Parameter(help="Seed for sampling.")]


@with_options(LoadingConfig)
def generate(
    folder: Folder,
    texts: Texts,
    /,
    *,
    against: Against = "",
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    chat: Chat = False,
    seed: Seed = 0,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Continue texts with a model, and optionally with its original.

    Example: streamline-hooks generate smollm2-small "What is the capital of France?" --chat --against smollm2
    """
    print_log(to_stderr=True)
    if max_new_tokens < 1 or temperature < 0:
        raise StreamlineError(
            f"--max-new-tokens {max_new_tokens} --temperature {temperature:g} is out of range. Expected at least 1 "
            "token and a temperature >= 0. Change the option."
        )
    loading = read_loading(option_values)
    model, tokenizer = load_quietly(folder, require_causal_lm(folder, loading), loading)
    if against:
        original, original_tokenizer = load_quietly(against, require_causal_lm(against, loading), loading)
        require_same_tokens(tokenizer, original_tokenizer)
        settings: dict[str, Any] = {
            "new_tokens": max_new_tokens,
            "temperature": temperature,
            "chat": chat,
            "seed": seed,
        }
        pairs = generate_with_both(model, original, tokenizer, texts, **settings)
        if as_json:
            print_json([{"prompt": a.prompt, "generated": a.text, "original": b.text} for a, b in pairs])
        else:
            print(side_by_side(pairs, width=max(40, min(120, shutil.get_terminal_size((100, 24)).columns))))
        return
    ends = sorted(eos_token_ids(model, tokenizer))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    options |= {"eos_token_id": ends or None, "pad_token_id": min(ends, default=0)}
    options |= {"temperature": temperature, "top_k": 0} if temperature else {}
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    rows = []
    for text in texts:
        ids = _encode(tokenizer, text, chat, folder).to(device_of(model))
        torch.manual_seed(seed)
        with default_generation_config(model):  # as with --against
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        new = generated[0, ids.shape[-1] :]
        rows.append({"prompt": text, "generated": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)})
    if as_json:
        print_json(rows)


def _encode(tokenizer: Any, text: str, chat: bool, folder: str) -> torch.Tensor:
    """Return the token ids of a text, or of a conversation that starts with it, of shape (1, tokens)."""
    if chat and not tokenizer.chat_template:
        raise StreamlineError(
            f"--chat was given, but the tokenizer of {folder} has no chat template. Expected a template. Leave --chat "
            "out."
        )
    if not chat and not len(tokenizer(text)["input_ids"]):
        raise StreamlineError(f"The text {text!r} has no tokens. Expected at least one token. Add text to continue.")
    return torch.tensor([tokenize_prompt(tokenizer, text, chat)])

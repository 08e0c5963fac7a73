"""Skip blocks for the prompts of one architecture, and compare the logits with the slow reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from streamline_hooks import StreamlineError, find_stack
from streamline_hooks.repair import hidden_size_of
from streamline_hooks.surgery import PromptSkip
from tests.prompt_skips import prompt_marks, random_maps, replaced_outputs, with_positions
from tests.tiny_models import left_padded, tokens

NEW_TOKENS = 3
TOLERANCE = 1e-3


@torch.no_grad()
def examine_prompt_skip(model: Any) -> str:
    """Return "ok", the reason of the refusal, or "WRONG" with the difference.

    The upper half of the blocks is skipped with random maps. The logits of generated tokens equal those of one forward
    pass over the whole sequence without a cache, for prompts with and without left padding.
    """
    try:
        stack = find_stack(model)
        window = range(len(stack) // 2, len(stack))
        maps = random_maps(len(window), hidden_size_of(stack))
        for batch in ({"input_ids": tokens(2, 9)}, left_padded(2, 9)):
            if own := _own_fault(model, window, batch):
                return own
            with PromptSkip(model, window, maps, last_tokens=1) as skip:
                if difference := _difference(model, window, skip.maps, batch):
                    return f"WRONG: {difference}"
    except StreamlineError as error:
        return str(error)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"[:200]
    return "ok"


def _own_fault(model: Any, window: range, batch: dict[str, torch.Tensor]) -> str:
    """Return why generation of the unmodified model cannot be compared with its forward pass, or an empty string."""
    try:
        if not _difference(model, window, None, batch):
            return ""
        reason = "are not those of its forward pass"
    except Exception as error:
        reason = f"cannot be computed ({type(error).__name__})"
    return (
        f"The logits of generated tokens of the unmodified model {reason}. Expected equal logits. Choose another model."
    )


def _difference(
    model: Any, window: range, maps: Sequence[nn.Module | None] | None, batch: dict[str, torch.Tensor]
) -> str:
    """Compare generated logits with those of a full forward pass, in which outputs are replaced if maps are given."""
    output = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    prompt, ids = batch["input_ids"].shape[1], output.sequences[:, :-1]
    mask = torch.ones_like(ids)
    mask[:, :prompt] = batch.get("attention_mask", mask[:, :prompt])
    whole = {"input_ids": ids, "attention_mask": mask}
    marks = prompt_marks(whole, prompt)
    with replaced_outputs(model, window, maps, marks) if maps is not None else nullcontext():
        expected = model(**with_positions(model, whole), use_cache=False).logits[:, prompt - 1 :]
    error = float((torch.stack(output.logits, dim=1) - expected).abs().max() / (1 + expected.abs().max()))
    return "" if error < TOLERANCE else f"the logits differ by {error:.1e} of the largest"

"""Greedy decoding in llama.cpp, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is in the environment of `make engines` only")


@dataclass(frozen=True)
class Answer:
    """Generated tokens, the log-probability of each, and in Transformers how far the second best is behind."""

    tokens: list[int]
    log_probabilities: list[float]
    margins: list[float] = field(default_factory=list)


def in_llama_cpp(
    file: Path, prompts: Sequence[list[int] | str], count: int, slots: int = 1, never: Sequence[int] = ()
) -> list[Answer]:
    """Generate greedily without the tokens `never`; `slots` prompts run in one batch."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 128 * slots, slots
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, 1, 1
    # By default the cache and fused attention are in half precision.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {
        "prompt": list(prompts),
        "n_predict": count,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "cache_prompt": False,
        "logit_bias": [[token, False] for token in never],
    }
    answers = xllamacpp.Server(params).handle_completions(request)
    choices = sorted((choice for a in _as_list(answers) for choice in a["choices"]), key=lambda choice: choice["index"])
    contents = [choice["logprobs"]["content"] for choice in choices]
    return [Answer([t["id"] for t in content], [t["logprob"] for t in content]) for content in contents]


def _as_list(answers: Any) -> list[Any]:
    return answers if isinstance(answers, list) else [answers]


def in_transformers(model: nn.Module, prompts: Sequence[list[int]], count: int, never: int) -> list[Answer]:
    """Generate greedily without the token `never`, which ends the text."""
    answers = []
    for prompt in prompts:
        output: Any = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[never],
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens: Tensor = output.sequences[0, len(prompt) :]
        scores = torch.stack(output.logits)[:, 0].log_softmax(dim=-1)
        chosen = scores.gather(1, tokens[:, None])[:, 0]
        others = scores.scatter(1, tokens[:, None], -torch.inf).index_fill(1, torch.tensor(never), -torch.inf)
        answers.append(Answer(tokens.tolist(), chosen.tolist(), (chosen - others.max(dim=1).values).tolist()))
    return answers

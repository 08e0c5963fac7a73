"""Compare a model that skips blocks for a prompt with a full forward pass in which their outputs are replaced."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery, describe_blocks, device_of
from streamline_hooks.modeling import (
    evaluation_mode,
    isolated_inference,
    logits_of_output,
    read_input,
    read_output,
    write_output,
)
from streamline_hooks.surgery.probe import probe_logits_allclose
from streamline_hooks.surgery.skipped_block import SkippedBlock, cache_name, first_tokens

if TYPE_CHECKING:
    from streamline_hooks.surgery.prompt_skip import PromptSkip

_PROMPT, _CONTINUATION = 7, 2  # tokens


def text_config_of(model: Any) -> Any:
    """Return the configuration of the language model, or None if there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def learn_and_verify(skip: PromptSkip, verify: bool) -> None:
    """Learn the arguments of the skipped blocks, and compare the model with the masked full forward pass."""
    model, total = skip.model, _PROMPT + _CONTINUATION
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(int(getattr(text_config_of(model), "vocab_size", 50)), 50)
    ids = torch.randint(3 % vocabulary, vocabulary, (2, total), generator=generator).to(device_of(model))
    padded = torch.ones_like(ids)
    padded[1, :2] = 0
    prompt = (torch.arange(total, device=ids.device) < _PROMPT - 1).expand(2, -1)
    with isolated_inference(model), evaluation_mode(*(module for module in skip.maps if module is not None)):
        for mask in (padded, None):
            try:
                if mask is not None:
                    _learn(skip, ids, mask)
                if not verify:
                    return
                expected = _replaced_forward(skip, ids, mask, prompt)
                computed = _skipped_forward(skip, ids, mask, prompt)
            except StreamlineError:
                raise
            except Exception as error:
                raise UnsupportedSurgery(
                    f"PromptSkip: {type(model).__name__} fails when prompts skip {describe_blocks(skip.window)} "
                    f"({type(error).__name__}: {error}). Expected a causal language model with a cache of keys and "
                    "values. Choose other blocks, or another model.",
                    "prompt-skip",
                ) from error
            compared = ~prompt if mask is None else ~prompt & mask.bool()
            if not probe_logits_allclose(computed[compared], expected[compared]):
                raise UnsupportedSurgery(
                    f"PromptSkip: with {describe_blocks(skip.window)} skipped for prompts, {type(model).__name__} does "
                    "not give the logits of a full forward pass in which these blocks' outputs are replaced. Expected "
                    "equal logits. Choose other blocks, or another model.",
                    "prompt-skip",
                )


def _cache_name_of_model(skip: PromptSkip) -> str:
    """Return the name of the cache among the arguments of the model, which a wrapper (PEFT) does not list."""
    for module in skip.stack.ancestors:
        with suppress(UnsupportedSurgery):
            return cache_name(module)
    return cache_name(skip.model)


def _learn(skip: PromptSkip, ids: Tensor, mask: Tensor) -> None:
    """Find the axes of tokens of the arguments of the skipped blocks, in two calls with different numbers of tokens."""
    calls = dict.fromkeys(skip.window, 0)
    heads = max(1, int(getattr(text_config_of(skip.model), "num_attention_heads", None) or 1))
    with ExitStack() as undo:
        for skipped, k in zip(skip._blocks, skip.window, strict=True):

            def learn(block: nn.Module, args: Any, kwargs: Any, skipped: SkippedBlock = skipped, k: int = k) -> None:
                calls[k] += 1
                if not skipped.has_axes:
                    skipped.learn_queries(args, kwargs, heads)
                skipped.learn_axes(args, kwargs)

            undo.callback(skip.stack[k].register_forward_pre_hook(learn, with_kwargs=True).remove)
        half, name = ids.shape[1] // 2, _cache_name_of_model(skip)
        more: dict[str, Any] = {}
        for part in (slice(0, half), slice(half, None)):
            if "position_ids" in inspect.signature(skip.model.forward).parameters:  # as in `generate`
                more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, part]
            mask_part = mask[:, : part.stop]
            output = skip.model(input_ids=ids[:, part], attention_mask=mask_part, use_cache=True, **more)
            more[name] = output[name]
    for k, count in calls.items():
        if count != 2:
            raise UnsupportedSurgery(
                f"PromptSkip: a forward pass of {type(skip.model).__name__} runs block {k} {count / 2:g} times. "
                "Expected once. Choose other blocks.",
                "prompt-skip",
            )


def _replaced_forward(skip: PromptSkip, ids: Tensor, mask: Tensor | None, prompt: Tensor) -> Tensor:
    """Return the logits of a full forward pass in which the outputs of skipped blocks are replaced by estimates."""
    marks = prompt & ~first_tokens(mask, 0, ids)
    boundary: list[Tensor] = []

    def replace(number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = read_input(args, kwargs, block)
        if number == 0:
            boundary[:] = [state]
        estimate = skip._estimate(number, boundary[0], state)
        return write_output(output, torch.where(marks[..., None], estimate, read_output(output)))

    with ExitStack() as undo:
        for number, k in enumerate(skip.window):
            hook = skip.stack[k].register_forward_hook(partial(replace, number), with_kwargs=True)
            undo.callback(hook.remove)
        return logits_of_output(skip.model(input_ids=ids, attention_mask=mask, use_cache=False))


def _skipped_forward(skip: PromptSkip, ids: Tensor, mask: Tensor | None, prompt: Tensor) -> Tensor:
    """Return the logits of the parts of a prompt, whose tokens skip the window, and of a continuation."""
    logits: list[Tensor] = []
    name, cache = _cache_name_of_model(skip), None
    with ExitStack() as undo:
        skip._install(undo)
        for part in (slice(0, 3), slice(3, 5), slice(5, _PROMPT), slice(_PROMPT, None)):  # of (3, 5), no token runs
            arguments: dict[str, Any] = {"input_ids": ids[:, part], "use_cache": True}
            if mask is not None:
                arguments["attention_mask"] = mask[:, : part.stop]
            if cache is not None:
                arguments[name] = cache
            with skip._marking(prompt[:, part]):
                output = skip.model(**arguments)
            cache = output[name]
            logits.append(logits_of_output(output))
    return torch.cat(logits, dim=1)

"""Run any model on a few tokens, isolated from its hooks and modes, and find the branches of its blocks.

The inputs are chosen from the parameters of the model's forward and from its configuration. Models for which none are
known are run on a batch of the caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    device_of,
    exclusive_global_state,
    prepare_inputs,
    takes_use_cache,
    weights_in_memory,
)
from streamline_hooks.modeling.block_call import BlockCall, observe_calls
from streamline_hooks.modeling.block_stack import BlockStack
from streamline_hooks.modeling.branches import Branches, find_branches
from streamline_hooks.modeling.forward import (
    evaluation_mode,
    is_capture_hook,
    keeping_4_bit_layout,
    preserve_forward_state,
)
from streamline_hooks.modeling.hooks import is_part_of_model

PROBE_ROWS, PROBE_TOKENS = 2, 8
SPLICES = ("spliced_before", "spliced_after")
"""Names of the children of a block that hold the modules spliced in before and after it."""

_LATER_TOKENS = 1e-3  # largest change of the logits, relative to the largest logit, that may be rounding

_FRAMES = 64  # of audio, where the configuration does not specify the number
_SAMPLES = 4000


class ProbeFailedError(Exception):
    """The model, not the probe, failed."""


def choose_probe_inputs(model: Any, runs: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the first inputs that a model accepts, preferably inputs that run the module `runs`.

    A single candidate is returned without a test. Raise `ProbeFailedError`, with the first error, if the model accepts
    none.
    """
    candidates = candidate_inputs(model, inspect.signature(model.forward).parameters)
    first, second = next(candidates), next(candidates, None)
    if second is None:
        return first
    refusal: ProbeFailedError | None = None
    accepted: dict[str, Tensor] | None = None
    called: list[nn.Module] = []
    handle = None if runs is None else runs.register_forward_pre_hook(lambda module, _: called.append(module))
    try:
        for inputs in chain((first, second), candidates):
            try:
                probe_logits(model, inputs)
            except ProbeFailedError as error:
                refusal = refusal or error
                called.clear()
                continue
            if called or runs is None:
                return inputs
            accepted = accepted or inputs
    finally:
        if handle is not None:
            handle.remove()
    if accepted is None:
        raise refusal or ProbeFailedError("no inputs are known that it accepts")
    return accepted


def candidate_inputs(model: Any, parameters: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Yield keyword arguments for a model, based on the parameters of its forward and its configuration.

    The order is: token ids (of encoder and decoder), images, images with token ids, images inside a text, audio. Images
    are either whole, or patches of all images in one sequence together with the grid of each image.
    """
    decoder_ids = {"decoder_input_ids": _token_ids(model, 5)} if "decoder_input_ids" in parameters else {}
    images = (_image_patches(model, parameters) or _images(model)) if "pixel_values" in parameters else {}
    audio = _audio(model, parameters)
    if "input_ids" in parameters or not (images or audio):
        if decoder_ids:
            yield {"input_ids": _token_ids(model), **decoder_ids}
        yield {"input_ids": _token_ids(model)}
    if images:
        if decoder_ids:
            yield {**images, **decoder_ids}
        yield images
        if "input_ids" in parameters:
            yield {"input_ids": _token_ids(model), **images}
            yield from _images_in_text(model, images, parameters)
    if audio:
        yield {**audio, **decoder_ids}


def _token_ids(model: Any, first: int = 3) -> Tensor:
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 32) or 32)
    numbers = torch.arange(PROBE_ROWS * PROBE_TOKENS) * 7 + first
    return (
        (numbers % max(vocabulary - 4, 1) + min(3, vocabulary - 1)).view(PROBE_ROWS, PROBE_TOKENS).to(device_of(model))
    )


def _images(model: Any) -> dict[str, Tensor]:
    configs = (model.config, *(getattr(model.config, name, None) for name in ("vision_config", "encoder")))
    config = next((c for c in configs if getattr(c, "image_size", None)), None)
    if config is None:
        return {}
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = int(getattr(config, "num_channels", 3))
    return {"pixel_values": _deterministic_values(model, PROBE_ROWS, channels, int(height), int(width))}


def _image_patches(model: Any, parameters: Collection[str]) -> dict[str, Tensor]:
    """Return images as patches with their grid, which is wider than one attention window of a vision tower."""
    config = getattr(model.config, "vision_config", model.config)
    patch = _single_size(config, "patch_size")
    if "image_grid_thw" not in parameters or patch is None:
        return {}
    frames, merged = (_single_size(config, name) or 1 for name in ("temporal_patch_size", "spatial_merge_size"))
    channels = _single_size(config, "in_channels") or _single_size(config, "in_chans") or 3
    cells = (_single_size(config, "window_size") or 0) // (patch * merged)
    grid = torch.tensor([[1, merged * 2, merged * (cells + 2)]] * PROBE_ROWS, device=device_of(model))
    pixels = _deterministic_values(model, int(grid.prod(dim=1).sum()), channels * frames * patch * patch)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _single_size(config: Any, name: str) -> int | None:
    """Return a size that a configuration holds as one number, or as the same number for each axis."""
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value > 0 else None


def _images_in_text(model: Any, images: dict[str, Tensor], parameters: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Yield token ids with one placeholder per image feature vector, and the token types if required."""
    token_ids = (getattr(model.config, name, None) for name in ("image_token_id", "image_token_index"))
    image_token = next((value for value in token_ids if isinstance(value, int)), None)
    describe = getattr(model, "get_image_features", None)
    if image_token is None or describe is None:
        return
    try:
        features = describe(**images)
    except Exception:  # the model may not accept images in this form
        return
    features = getattr(features, "pooler_output", features)
    vectors = features[0] if isinstance(features, (list, tuple, Tensor)) and len(features) == PROBE_ROWS else None
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        ids = _token_ids(model)
        ids = torch.cat([ids[:, :2], ids.new_full((PROBE_ROWS, len(vectors)), image_token), ids[:, 2:]], dim=1)
        token_types = {"mm_token_type_ids": (ids == image_token).long()} if "mm_token_type_ids" in parameters else {}
        yield {"input_ids": ids, **images, **token_types}


def _audio(model: Any, parameters: Collection[str]) -> dict[str, Tensor]:
    if "input_features" in parameters:
        bins = getattr(model.config, "num_mel_bins", None)
        frames = 2 * getattr(model.config, "max_source_positions", _FRAMES // 2)
        return (
            {"input_features": _deterministic_values(model, PROBE_ROWS, int(bins), int(frames))}
            if isinstance(bins, int)
            else {}
        )
    return {"input_values": _deterministic_values(model, PROBE_ROWS, _SAMPLES)} if "input_values" in parameters else {}


def _deterministic_values(model: Any, *shape: int) -> Tensor:
    """Return distinct values between -1 and 1."""
    values = torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 1.1)
    return values.view(shape).to(device_of(model), getattr(model, "dtype", torch.float32))


def probe_logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Return the logits of a forward pass without a cache, by default on the first inputs that the model accepts."""
    arguments: dict[str, Any] = dict(choose_probe_inputs(model) if inputs is None else inputs)
    if takes_use_cache(inspect.signature(model.forward).parameters):
        arguments["use_cache"] = False
    logits = logits_of_output(run_probe(model, arguments))
    if not torch.isfinite(logits).all():
        raise ProbeFailedError("its logits are not finite")
    return logits


def refuse_later_tokens(model: nn.Module, action: str) -> None:
    """Raise StreamlineError if the logits of a token depend on later tokens, as in BERT without ``is_decoder=True``.

    A model with a module that Transformers marks as causal is accepted. Others are run twice on the probe inputs, which
    differ in the last token; a model that accepts no token ids or cannot be probed is accepted.
    """
    if not saves_itself(model) or any(getattr(module, "is_causal", None) is True for module in model.modules()):
        return
    with isolated_inference(model):
        try:
            inputs = choose_probe_inputs(model)
            ids = inputs.get("input_ids")
            if ids is None or "decoder_input_ids" in inputs:
                return
            changed = ids.clone()
            changed[:, -1] = ids[:, 0]
            before, after = (probe_logits(model, {**inputs, "input_ids": tokens}) for tokens in (ids, changed))
        except ProbeFailedError:
            return
    if before.shape[:2] != ids.shape:
        return
    difference = (after - before)[:, :-1].abs().max()
    if difference > _LATER_TOKENS * before.abs().max():
        raise StreamlineError(
            f"The logits of {type(model).__name__} depend on later tokens, also on the one that they predict, so it is "
            f"no causal language model. {action} needs one. Load the model with is_decoder=True (BERT and similar "
            "models) or causal=True (XLM) if it was trained so; otherwise compare its outputs with agreement."
        )


def run_probe(model: Any, inputs: dict[str, Any]) -> Any:
    """Run one forward pass. Only errors of the model become `ProbeFailedError`, not errors of the probe."""
    try:
        return model(**inputs)
    except Exception as error:
        raise ProbeFailedError(f"{type(error).__name__}: {error}") from error


def logits_of_output(output: Any) -> Tensor:
    """Return the logits, the image-text logits of two towers, or the last hidden state of a model without a head."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(logits := getattr(output, name, None), Tensor):
            return logits
    raise ProbeFailedError(f"it returns a {type(output).__name__} without logits")


@contextmanager
def isolated_inference(model: nn.Module) -> Iterator[None]:
    """Disable gradients, dropout and user hooks, and restore what forward passes change, including the random state.

    Hooks by which Transformers captures hidden states stay, because LLaVA's forward uses the captured states. A forward
    that accelerate wrapped for mixed precision runs unwrapped: its outputs are float32 with the accuracy of bfloat16.
    Autocast is disabled for the same reason.
    """
    original: Any = vars(model).get("_original_forward")
    wrapped = None if original is None else vars(model).get("forward")
    stashed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    device = device_of(model).type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    with (
        exclusive_global_state(),
        torch.autocast(device, enabled=False) if is_autocast else nullcontext(),
        evaluation_mode(model),
        keeping_4_bit_layout(model),
        preserve_forward_state(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            if wrapped is not None:
                model.forward = original
            for module in model.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    removed = [
                        key for key, hook in hooks.items() if not (is_part_of_model(hook) or is_capture_hook(hook))
                    ]
                    if removed:
                        stashed.append((hooks, dict(hooks)))
                    for key in removed:
                        del hooks[key]
            yield
        finally:
            for hooks, content in stashed:
                hooks.clear()
                hooks.update(content)
            if wrapped is not None:
                model.forward = wrapped


def saves_itself(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers or PEFT, tested without the slow import of their classes.

    Other libraries have ``save_pretrained`` too (huggingface_hub, diffusers), but no configuration of Transformers.
    """
    config = getattr(module, "config", None)
    has_config = hasattr(config, "to_dict") or type(config) is dict  # PEFT stores a dict for custom modules
    return has_config and callable(getattr(type(module), "save_pretrained", None))


@contextmanager
def probing(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> Iterator[Callable[[], Any]]:
    """Yield a function that runs a model on the probe inputs, or on a batch without padding.

    Inside, the model is in evaluation mode, without gradients and hooks. `blocks` are the blocks that the inputs must
    run. Raise `StreamlineError` if no probe inputs are known, or if the model fails on them.
    """
    own_inputs = next(filter(saves_itself, stack.ancestors), None)  # the model may be inside another module
    model: Any = stack.model if batch is not None else own_inputs
    if model is None:
        raise StreamlineError(f"{_NEEDS_RUN} no probe inputs are known for {type(stack.model).__name__}. {_PASS_BATCH}")
    chosen_blocks = [stack[k] for k in blocks]
    single_block = chosen_blocks[0] if len(chosen_blocks) == 1 else nn.Identity()
    with weights_in_memory(single_block), isolated_inference(model):  # several offloaded blocks may not fit
        try:
            if batch is not None:
                yield partial(model, **prepare_inputs(model, batch))
            else:
                inputs: dict[str, Any] = choose_probe_inputs(model, next(iter(chosen_blocks), None))
                if takes_use_cache(inspect.signature(model.forward).parameters):
                    inputs = {**inputs, "use_cache": False}
                yield partial(run_probe, model, inputs)
        except ProbeFailedError as error:
            reason = f"{_NEEDS_RUN} {type(model).__name__} cannot be run on the probe inputs ({error}). {_PASS_BATCH}"
            raise StreamlineError(reason) from error


@contextmanager
def observe_blocks(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> Iterator[dict[int, BlockCall | UnsupportedSurgery]]:
    """Run a model as `probing`, and yield `observe_calls` of some blocks.

    Inside, the blocks can be run again.
    """
    blocks = list(blocks)
    with probing(stack, blocks, batch) as run:
        yield observe_calls({k: stack[k] for k in blocks}, run)


_NEEDS_RUN = "The branches of a block are found by running the model, and"


_PASS_BATCH = "Pass a batch of model input without padding (batch=...)."


def branches_of(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> dict[int, Branches | UnsupportedSurgery]:
    """Find the residual branches of blocks by running the model.

    Parameters
    ----------
    stack : BlockStack
        Stack of blocks; see `find_stack`.
    blocks : iterable of int
        Indices of the blocks.
    batch : mapping or torch.Tensor, optional
        Model input without padding. Required for a model that cannot be probed without one.

    Returns
    -------
    dict of int to Branches or UnsupportedSurgery
        The branches of each block, or the error with the reason why there are none.

    Raises
    ------
    StreamlineError
        If the model cannot be run without a batch.

    Examples
    --------
    >>> from streamline_hooks.modeling import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> branches = branches_of(find_stack(tiny_model("llama")), [1])
    >>> branches[1].writers["mlp"]
    ('mlp.down_proj.weight',)
    """
    branches: dict[int, Branches | UnsupportedSurgery] = {}
    with observe_blocks(stack, blocks, batch) as calls:
        for k, call in calls.items():
            with weights_in_memory(stack[k]):
                branches[k] = branches_in(call)
    return branches


def branches_in(call: BlockCall | UnsupportedSurgery) -> Branches | UnsupportedSurgery:
    """Find the branches of a block, without its splices, from one call, or return the error."""
    if isinstance(call, UnsupportedSurgery):
        return call
    try:
        return find_branches(call, apart=SPLICES)
    except UnsupportedSurgery as error:
        return error

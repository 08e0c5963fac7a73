"""Run a model with blocks bypassed and with blocks removed, on a few tokens, and compare the outputs.

Known hazards are found by inspection (`hazards`). The probe detects all other dependencies on the block index: other
logits, a failing forward pass, or a cache that no longer fits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import UnsupportedSurgery, device_of, exclusive_global_state, takes_use_cache
from streamline_hooks.modeling import BlockStack, evaluation_mode, is_capture_hook, preserve_forward_state
from streamline_hooks.surgery.bypass import bypass
from streamline_hooks.surgery.splice import AFTER, run_after, run_before, spliced

CACHE_MISMATCH = "decoding with a cache no longer equals the full forward"
_ROWS, _TOKENS = 2, 8
_STEPS = 2
_FRAMES = 64  # of audio, where the configuration does not specify the number
_SAMPLES = 4000
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative; 1e-4 for wider dtypes


@dataclass(frozen=True)
class ReferenceRun:
    """The inputs and outputs that the model without a window must reproduce."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the forward pass."""
    logits: Tensor
    """Logits with the window bypassed, usually of shape (rows, tokens, vocabulary)."""
    cached: bool
    """Whether cached decoding of the unmodified model equals its full forward, so that it is required afterwards."""
    runs: bool = False
    """Whether the forward runs with its default cache settings. Tested only if `cached` is false."""


def run_reference(stack: BlockStack, window: range, removed_splices: Sequence[nn.Module] = ()) -> ReferenceRun | None:
    """Run the model with a window bypassed, and without `removed_splices`, which follow the window's last block.

    Return None, with a warning, if the model cannot be run without a batch or is not deterministic.
    """
    model = stack.model
    first, last = stack[window.start], stack[window.stop - 1]
    called: list[nn.Module] = []

    def replacement(state: Tensor) -> Tensor:
        for splice in spliced(last, AFTER):
            state = state if any(splice is module for module in removed_splices) else splice(state)
        return state

    def attach() -> list[RemovableHandle]:
        called.clear()
        return [
            first.register_forward_pre_hook(lambda block, _: called.append(block)),
            *bypass(first, last, replacement),
        ]

    message = f"Removals in this {type(model).__name__} are not compared with the same blocks bypassed"
    reference = run_reference_with_hooks(model, attach, message, frames=6, runs=first)
    if reference is not None and not called:
        raise UnsupportedSurgery(
            f"Block {window.start} cannot be removed: a forward of {' and '.join(reference.inputs)} alone does not run "
            "it, so the model without it cannot be verified. Choose other blocks.",
            "not-run",
        )
    return reference


def run_reference_with_hooks(
    model: nn.Module,
    attach: Callable[[], Iterable[RemovableHandle]],
    message: str,
    frames: int,
    runs: nn.Module | None = None,
) -> ReferenceRun | None:
    """Run the model with the hooks that `attach` registers, preferably on inputs that run the module `runs`.

    Return None, with a warning, if the model cannot be run without a batch or is not deterministic. The warning begins
    with `message` and is attributed to the caller `frames` calls above this function.
    """
    with isolated_inference(model):
        try:
            inputs = choose_probe_inputs(model, runs)
            logits, repeated = probe_logits(model, inputs), probe_logits(model, inputs)
            reason = "" if probe_logits_allclose(logits, repeated) else "two forward passes give different outputs"
        except ProbeFailedError as error:
            reason = f"it cannot be run without a batch ({error})"
        if reason:
            warnings.warn(f"{message}: {reason}.", stacklevel=frames + 1)
            return None
        cached = cache_matches_forward(model, logits, inputs)
        as_called = not cached and not forward_error(model, inputs)
        handles = attach()
        try:
            return ReferenceRun(inputs, probe_logits(model, inputs), cached, as_called)
        finally:
            for handle in handles:
                handle.remove()


def find_mismatch(reference: ReferenceRun, model: nn.Module, than: str = "with them bypassed") -> str | None:
    """Return how a model differs from a reference run, with or without a cache, or None if it is equal.

    `than` describes the reference in the returned text.
    """
    with isolated_inference(model):
        try:
            logits = probe_logits(model, reference.inputs)
        except ProbeFailedError as error:
            return f"the model fails ({error})"
        if not probe_logits_allclose(logits, reference.logits):
            return f"the model gives other logits than {than}"
        if reference.cached and not cache_matches_forward(model, logits, reference.inputs):
            return CACHE_MISMATCH
        failure = forward_error(model, reference.inputs) if reference.runs else ""
        return f"the model fails with its default cache ({failure})" if failure else None


def matches_reference(reference: ReferenceRun, model: nn.Module) -> bool:
    """Whether a model's full forward gives the logits of a reference run."""
    with isolated_inference(model), suppress(ProbeFailedError):
        return probe_logits_allclose(probe_logits(model, reference.inputs), reference.logits)
    return False


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
    numbers = torch.arange(_ROWS * _TOKENS) * 7 + first
    return (numbers % max(vocabulary - 4, 1) + min(3, vocabulary - 1)).view(_ROWS, _TOKENS).to(device_of(model))


def _images(model: Any) -> dict[str, Tensor]:
    configs = (model.config, *(getattr(model.config, name, None) for name in ("vision_config", "encoder")))
    config = next((c for c in configs if getattr(c, "image_size", None)), None)
    if config is None:
        return {}
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = int(getattr(config, "num_channels", 3))
    return {"pixel_values": _deterministic_values(model, _ROWS, channels, int(height), int(width))}


def _image_patches(model: Any, parameters: Collection[str]) -> dict[str, Tensor]:
    """Return images as patches with their grid, which is wider than one attention window of a vision tower."""
    config = getattr(model.config, "vision_config", model.config)
    patch = _single_size(config, "patch_size")
    if "image_grid_thw" not in parameters or patch is None:
        return {}
    frames, merged = (_single_size(config, name) or 1 for name in ("temporal_patch_size", "spatial_merge_size"))
    channels = _single_size(config, "in_channels") or _single_size(config, "in_chans") or 3
    cells = (_single_size(config, "window_size") or 0) // (patch * merged)
    grid = torch.tensor([[1, merged * 2, merged * (cells + 2)]] * _ROWS, device=device_of(model))
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
    vectors = features[0] if isinstance(features, (list, tuple, Tensor)) and len(features) == _ROWS else None
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        ids = _token_ids(model)
        ids = torch.cat([ids[:, :2], ids.new_full((_ROWS, len(vectors)), image_token), ids[:, 2:]], dim=1)
        token_types = {"mm_token_type_ids": (ids == image_token).long()} if "mm_token_type_ids" in parameters else {}
        yield {"input_ids": ids, **images, **token_types}


def _audio(model: Any, parameters: Collection[str]) -> dict[str, Tensor]:
    if "input_features" in parameters:
        bins = getattr(model.config, "num_mel_bins", None)
        frames = 2 * getattr(model.config, "max_source_positions", _FRAMES // 2)
        return (
            {"input_features": _deterministic_values(model, _ROWS, int(bins), int(frames))}
            if isinstance(bins, int)
            else {}
        )
    return {"input_values": _deterministic_values(model, _ROWS, _SAMPLES)} if "input_values" in parameters else {}


def _deterministic_values(model: Any, *shape: int) -> Tensor:
    """Return distinct values between -1 and 1."""
    values = torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 1.1)
    return values.view(shape).to(device_of(model), getattr(model, "dtype", torch.float32))


def probe_logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Return the logits of a forward pass without a cache, by default on the first inputs that the model accepts."""
    arguments: dict[str, Any] = dict(choose_probe_inputs(model) if inputs is None else inputs)
    if takes_use_cache(inspect.signature(model.forward).parameters):
        arguments["use_cache"] = False
    logits = _logits_of_output(_run(model, arguments))
    if not torch.isfinite(logits).all():
        raise ProbeFailedError("its logits are not finite")
    return logits


def forward_error(model: Any, inputs: dict[str, Tensor]) -> str:
    """Return the error of a forward pass with the default cache settings, or an empty string if there is none."""
    try:
        _run(model, dict(inputs))
    except ProbeFailedError as error:
        return str(error)
    return ""


def cache_matches_forward(model: Any, logits: Tensor, inputs: dict[str, Tensor]) -> bool:
    """Whether the last tokens, decoded one by one with a cache, have the logits of the full forward."""
    ids_name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    cache_name = next(
        (n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters), None
    )
    if cache_name is None or ids_name not in inputs or logits.ndim < 3 or logits.shape[1] != _TOKENS:
        return False
    ids, cache = inputs[ids_name], None
    for end in range(_TOKENS - _STEPS, _TOKENS + 1):
        new_ids = ids[:, :end] if cache is None else ids[:, end - 1 : end]
        arguments = {**inputs, ids_name: new_ids, "use_cache": True, **({} if cache is None else {cache_name: cache})}
        try:
            output = _run(model, arguments)
        except ProbeFailedError:
            return False
        cache = getattr(output, cache_name, None)
        if cache is None or not probe_logits_allclose(_logits_of_output(output)[:, -1:], logits[:, end - 1 : end]):
            return False
    return True


class ProbeFailedError(Exception):
    """The model, not the probe, failed."""


def _run(model: Any, inputs: dict[str, Any]) -> Any:
    """Run one forward pass. Only errors of the model become `ProbeFailedError`, not errors of the probe."""
    try:
        return model(**inputs)
    except Exception as error:
        raise ProbeFailedError(f"{type(error).__name__}: {error}") from error


def _logits_of_output(output: Any) -> Tensor:
    """Return the logits, the image-text logits of two towers, or the last hidden state of a model without a head."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(logits := getattr(output, name, None), Tensor):
            return logits
    raise ProbeFailedError(f"it returns a {type(output).__name__} without logits")


def probe_logits_allclose(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal up to the rounding of their dtype."""
    tolerance = _TOLERANCE.get(a.dtype, 1e-4)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


@contextmanager
def isolated_inference(model: nn.Module) -> Iterator[None]:
    """Disable gradients, dropout and user hooks, and restore what forward passes change, including the random state.

    Hooks by which Transformers captures hidden states stay, because LLaVA's forward uses the captured states. A forward
    that accelerate wrapped for mixed precision runs unwrapped: its outputs are float32 with the accuracy of bfloat16.
    """
    original: Any = vars(model).get("_original_forward")
    wrapped = None if original is None else vars(model).get("forward")
    stashed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    own_hooks: tuple[Callable[..., Any], ...] = (run_before, run_after)
    with (
        exclusive_global_state(),
        evaluation_mode(model),
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
                        key for key, hook in hooks.items() if hook not in own_hooks and not is_capture_hook(hook)
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

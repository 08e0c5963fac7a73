"""Assert that a saved checkpoint loads as the same model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint import load
from streamline_hooks.core import Batch, StreamlineError, bitwise_equal, device_of
from streamline_hooks.modeling import pooling_argument
from streamline_hooks.surgery import AFTER, BEFORE
from streamline_hooks.testing.compare import (
    SAME_ORDER_TOLERANCE,
    assert_outputs_match,
    describe_difference,
    make_batches,
    model_output,
    reproducible_eval,
)
from streamline_hooks.testing.model_state import snapshot_changes, take_snapshot

# Config entries that depend on the folder or are set by loading.
_FOLDER_KEYS = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")


def assert_checkpoint_round_trip(
    model: nn.Module,
    folder: str | os.PathLike[str] | None = None,
    batch: Batch | Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Assert that a model saved by ``save_pretrained`` is equal after loading.

    A causal language model is loaded with ``AutoModelForCausalLM`` and with `streamline_hooks.load`, other models with
    ``from_pretrained`` of their class. The loaded model must have the same class, the same configuration with its plan,
    the same state-dict keys in the same order, bitwise equal values, and equal dtypes, non-persistent buffers and
    logits. The model may contain spliced replacements.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model. It is not changed.
    folder : path, optional
        Folder of the checkpoint, which is not deleted. Default: a temporary folder.
    batch : mapping or torch.Tensor, optional
        Inputs of the model's forward. Default: random tokens, with and without left padding.
    tolerance : float, optional
        Relative tolerance of the logits and the non-persistent buffers. The default depends on the dtype (1e-5 for
        float32).

    Raises
    ------
    AssertionError
        If something differs. The message contains the difference and how the model was loaded.
    StreamlineError
        If the model cannot be saved, for example because the class of a replacement is not registered.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_checkpoint_round_trip, tiny_model
    >>> assert_checkpoint_round_trip(tiny_model("llama", blocks=2))
    """
    save: Any = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise StreamlineError(
            f"{type(model).__name__} has no save_pretrained. Expected a Transformers model. Save other models with "
            "torch.save or safetensors."
        )
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(os.fspath(folder)) as path:
        config = vars(model.config)
        original = dict(config)
        try:
            save(path)
        finally:  # Transformers stores the class and dtype in the configuration while saving
            config.clear()
            config.update(original)
        for loader, load_folder in _loaders(model).items():
            compare_loaded(model, loader, load_folder, Path(path), batch, tolerance)


def compare_loaded(
    model: nn.Module,
    loader: str,
    load_folder: Callable[[Path], nn.Module],
    folder: Path,
    batch: Batch | Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare the model returned by a loader with the model that was saved."""
    try:
        loaded = load_folder(folder)
    except Exception as error:
        raise AssertionError(
            f"Loading a saved {type(model).__name__} with {loader} fails: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:600]}. Expected: the same model. Likely cause: the saved configuration "
            "and the saved weights belong to different models, or a weight is missing."
        ) from error
    subject = f"Loaded with {loader}, the {type(model).__name__}"
    if type(loaded) is not type(model):
        raise AssertionError(
            f"{subject} is a {type(loaded).__name__}. Expected: the class that was saved. Likely cause: a different "
            "model_type in config.json, so that the splices of the class are lost."
        )
    if device_of(loaded) != device_of(model):
        loaded.to(device_of(model))
    _compare_weights(model, loaded, subject)
    _compare_config(model, loaded, subject)
    _compare_buffers(model, loaded, subject, tolerance)
    assert_logits_match(model, loaded, subject, make_batches(model, batch, left_padded=True), tolerance)


def assert_logits_match(
    model: nn.Module,
    loaded: nn.Module,
    subject: str,
    batches: Sequence[Mapping[str, Any]],
    tolerance: float | None = None,
) -> None:
    """Compare the logits of a loaded model with those of the model that was saved."""
    with reproducible_eval(model), reproducible_eval(loaded):
        for inputs in batches:
            expected = model_output(model, inputs)
            assert_outputs_match(
                model,
                inputs,
                model_output(loaded, inputs),
                expected,
                f"{subject} returns different logits",
                "the checkpoint does not contain everything that the logits depend on: an attribute, a hook, or a "
                "setting was changed only in memory",
                tolerance,
            )


def _loaders(model: Any) -> dict[str, Callable[[Path], nn.Module]]:
    """Return the functions that load the model's checkpoint, by name."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    def by(loader: Any, **kwargs: Any) -> Callable[[Path], Any]:
        return lambda folder: loader.from_pretrained(folder, dtype="auto", **kwargs).eval()

    # The configuration of a model with splices is a subclass; remote code is registered in auto_map.
    config_classes = [cls for cls in type(model.config).__mro__ if cls in MODEL_FOR_CAUSAL_LM_MAPPING]
    causal = "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})
    if config_classes:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_classes[0]]
        causal = isinstance(model, model_class)
    if causal:
        return {
            "AutoModelForCausalLM": by(AutoModelForCausalLM),
            "streamline_hooks.load": lambda folder: load(folder, dtype="auto"),
        }
    return {f"{type(model).__name__}.from_pretrained": by(type(model), **pooling_argument(model))}


def _compare_weights(model: nn.Module, loaded: nn.Module, subject: str) -> None:
    saved, restored = model.state_dict(), loaded.state_dict()
    lost, new = [k for k in saved if k not in restored], [k for k in restored if k not in saved]
    if lost or new:
        splices = [key for key in lost if {BEFORE, AFTER} & set(key.split("."))]
        cause = (
            "a replacement was lost: the file contains its weights, but loading does not build its modules"
            if splices
            else "the configuration describes a different number or kind of blocks than the model has"
        )
        raise AssertionError(
            f"{subject} has different weights: {len(lost)} lost ({', '.join((splices or lost)[:3]) or 'none'}), "
            f"{len(new)} new ({', '.join(new[:3]) or 'none'}). Expected: the keys that were saved. Likely cause: "
            f"{cause}."
        )
    if list(saved) != list(restored):
        k = next(k for k, (a, b) in enumerate(zip(saved, restored, strict=True)) if a != b)
        raise AssertionError(
            f"{subject} has a state dict in a different order: key {k} is {list(restored)[k]}; expected "
            f"{list(saved)[k]}. Likely cause: a module or parameter was removed and added again after the others."
        )
    for key, value in saved.items():
        if restored[key].dtype != value.dtype:
            raise AssertionError(
                f"{subject} has {key} in {restored[key].dtype}; expected {value.dtype}. Likely cause: dtype in "
                "config.json is not the dtype of the weights."
            )
        if not bitwise_equal(restored[key], value):
            difference = describe_difference(restored[key], value, tolerance=0.0, axes=())
            raise AssertionError(
                f"{subject} has different values in {key}: {difference or 'in the sign of a zero or a NaN'}. Likely "
                "cause: the weight is initialized after loading, tied to another weight, or was not saved."
            )


def _compare_config(model: Any, loaded: Any, subject: str) -> None:
    if type(loaded.config) is not type(model.config):
        raise AssertionError(
            f"{subject} has a {type(loaded.config).__name__}; expected a {type(model.config).__name__}. Likely cause: "
            "a different model_type in config.json."
        )
    saved, restored = (take_snapshot(_as_json(c.to_dict())) for c in (model.config, loaded.config))
    changes = list(snapshot_changes(saved, restored, "config"))
    if changes:
        path, expected, value = changes[0]
        plan = " This entry contains the plan of the surgery." if "streamline_hooks" in path else ""
        raise AssertionError(
            f"{subject} has a different configuration: {path} is {value}; expected {expected}.{plan} Likely cause: the "
            "configuration was changed after saving, or its class changes it on loading."
        )


def _as_json(value: Any) -> Any:
    """Convert a value to what a JSON file stores: lists for tuples, and strings as keys."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items() if key not in _FOLDER_KEYS}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _compare_buffers(model: nn.Module, loaded: nn.Module, subject: str, tolerance: float | None) -> None:
    """Compare non-persistent buffers with the tolerance of the lower precision, then cast the loaded buffers.

    ``model.bfloat16()`` casts such buffers, but loading does not.
    """
    loaded_buffers = dict(loaded.named_buffers())
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            continue
        restored = loaded_buffers.get(name)
        allowed = max(
            SAME_ORDER_TOLERANCE.get(b.dtype, 0.0) for b in (buffer, buffer if restored is None else restored)
        )
        difference: object = "missing"
        if restored is not None:
            allowed = allowed if tolerance is None or not buffer.is_floating_point() else tolerance
            difference = describe_difference(
                restored.to(torch.float64), buffer.to(torch.float64), tolerance=allowed, axes=()
            )
        if difference is not None:
            raise AssertionError(
                f"{subject} has a different buffer {name}, which is not saved: {difference}. Expected: the values "
                "that the class computes from its configuration. Likely cause: the buffer was changed only in "
                "memory; make it persistent, or change the configuration that it is computed from."
            )
        path, _, last = name.rpartition(".")
        loaded.get_submodule(path)._buffers[last] = loaded_buffers[name].to(buffer.dtype)

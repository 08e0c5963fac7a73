"""Assert that a saved checkpoint loads as the same model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of
from streamline_hooks.checkpoint import load
from streamline_hooks.digests import same_bits
from streamline_hooks.errors import StreamlineError
from streamline_hooks.pooling_layer import pooling_argument
from streamline_hooks.surgery.splice import AFTER, BEFORE
from streamline_hooks.testing.assertions.difference import SAME_SUMS, difference, require_same
from streamline_hooks.testing.assertions.model_state import changed_places, frozen
from streamline_hooks.testing.assertions.running import answer, axes_of, batches_for, padding_said, quietly, real_places

# What a folder, and not the model, says; and what reading writes.
_OF_THE_FOLDER = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")


def assert_checkpoint_round_trip(
    model: nn.Module,
    folder: str | os.PathLike[str] | None = None,
    batch: Batch | Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Assert that ``save_pretrained`` writes a model that comes back the same.

    It is read with ``AutoModelForCausalLM`` and with `streamline_hooks.load`, and a model that is no causal language
    model with its own class's ``from_pretrained``. Each must give the class, the
    configuration with its plan, the state dict's keys in their order, its values to the bit and their dtypes, the
    buffers that are not saved, and the logits. Models with splices are held to the same.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model. It is not changed.
    folder : path, optional
        Where to write, and to leave, the checkpoint; a temporary folder by default.
    batch : mapping or torch.Tensor, optional
        What the model's forward takes; made up by default, left-padded as well.
    tolerance : float, optional
        Of the logits, and of the buffers that are not saved; relative, by default that of the dtype, see
        `difference`.

    Raises
    ------
    AssertionError
        With what came back otherwise, and how it was read.
    StreamlineError
        If the model cannot be saved, for instance because a replacement's class is not registered.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_checkpoint_round_trip, tiny_model
    >>> assert_checkpoint_round_trip(tiny_model("llama", blocks=2))
    """
    save: Any = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise StreamlineError(
            f"A {type(model).__name__} has no save_pretrained: only Transformers models are written as checkpoints."
        )
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(os.fspath(folder)) as where:
        with _config_as_it_is(model):
            save(where)
        for how, read in _ways(model).items():
            hold_reading(model, how, read, Path(where), batch, tolerance)


def hold_reading(
    model: nn.Module,
    how: str,
    read: Callable[[Path], nn.Module],
    folder: Path,
    batch: Batch | Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare the model that one way of loading returns with the model that was saved."""
    try:
        loaded = read(folder)
    except Exception as error:
        raise AssertionError(
            f"Read back with {how}, a saved {type(model).__name__} fails: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:600]}. Expected: the same model. Likely cause: the configuration that was "
            "written and the weights are of different models, or a weight was lost."
        ) from error
    back = f"Read back with {how}, the {type(model).__name__}"
    if type(loaded) is not type(model):
        raise AssertionError(
            f"{back} is a {type(loaded).__name__}. Expected: the class that was saved. Likely cause: model_type in "
            "config.json is another one, so that what the class adds (its splices) is lost."
        )
    if device_of(loaded) != device_of(model):
        loaded.to(device_of(model))
    _hold_weights(model, loaded, back)
    _hold_config(model, loaded, back)
    _hold_buffers(model, loaded, back, tolerance)
    hold_logits(model, loaded, back, batches_for(model, batch, left_padded=True), tolerance)


def hold_logits(
    model: nn.Module, loaded: nn.Module, back: str, batches: Sequence[Mapping[str, Any]], tolerance: float | None = None
) -> None:
    """Compare the logits of a loaded model with those of the model that was saved."""
    with quietly(model), quietly(loaded):
        for given in batches:
            expected = answer(model, given)
            require_same(
                answer(loaded, given),
                expected,
                f"{back} gives other logits{padding_said(given)}",
                "something that the logits depend on is not in the checkpoint: an attribute, a hook, or a setting that "
                "was changed in memory only",
                real=real_places(given, expected),
                tolerance=tolerance,
                axes=axes_of(model),
            )


@contextmanager
def _config_as_it_is(model: Any) -> Iterator[None]:
    """Transformers notes the class and the precision in the model's configuration as it writes it."""
    held = dict(vars(model.config))
    try:
        yield
    finally:
        vars(model.config).clear()
        vars(model.config).update(held)


def _auto(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _own(folder: Path) -> nn.Module:
    return load(folder, dtype="auto")


def _ways(model: Any) -> dict[str, Callable[[Path], nn.Module]]:
    """How a checkpoint of a model is read, by name."""
    if _is_causal_language_model(model):
        return {"AutoModelForCausalLM": _auto, "streamline_hooks.load": _own}

    def with_its_class(folder: Path) -> nn.Module:
        pooling = pooling_argument(model)
        read: nn.Module = type(model).from_pretrained(folder, dtype="auto", **pooling).eval()
        return read

    return {f"{type(model).__name__}.from_pretrained": with_its_class}


def _is_causal_language_model(model: Any) -> bool:
    """Whether ``AutoModelForCausalLM`` gives this class for this configuration, or is told to by a class from afar."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    for config_class in type(model.config).__mro__:  # a model with splices has a configuration derived from its own
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            return isinstance(model, model_class)
    return "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})


def _hold_weights(model: nn.Module, loaded: nn.Module, back: str) -> None:
    ours, theirs = model.state_dict(), loaded.state_dict()
    lost, new = [k for k in ours if k not in theirs], [k for k in theirs if k not in ours]
    if lost or new:
        repair = [key for key in lost if {BEFORE, AFTER} & set(key.split("."))]
        cause = (
            "a repair was lost: its weights are in the file and nothing builds its modules"
            if repair
            else "the configuration says another number of blocks, or another kind of block, than the model has"
        )
        raise AssertionError(
            f"{back} has other weights: {len(lost)} lost ({', '.join((repair or lost)[:3]) or 'none'}), {len(new)} new "
            f"({', '.join(new[:3]) or 'none'}). Expected: the keys that were saved. Likely cause: {cause}."
        )
    if list(ours) != list(theirs):
        k = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise AssertionError(
            f"{back} has its state dict in another order: key {k} is {list(theirs)[k]}; expected {list(ours)[k]}. "
            "Likely cause: a module or a parameter was taken out and put back behind the others."
        )
    for key, value in ours.items():
        if theirs[key].dtype != value.dtype:
            raise AssertionError(
                f"{back} has {key} in {theirs[key].dtype}; expected {value.dtype}. Likely cause: dtype in config.json "
                "does not say what the weights are in."
            )
        if not same_bits(theirs[key], value):
            found = difference(theirs[key], value, tolerance=0.0, axes=())
            raise AssertionError(
                f"{back} has other values in {key}: {found or 'in the sign of a zero or a NaN'}. Likely cause: the "
                "weight is made anew after loading, tied to another one, or was not written."
            )


def _hold_config(model: Any, loaded: Any, back: str) -> None:
    if type(loaded.config) is not type(model.config):
        raise AssertionError(
            f"{back} has a {type(loaded.config).__name__}; expected a {type(model.config).__name__}. Likely cause: "
            "model_type in config.json is another one."
        )
    ours, theirs = (frozen(_as_json(c.to_dict())) for c in (model.config, loaded.config))
    places = list(changed_places(ours, theirs, "config"))
    if places:
        path, before, now = places[0]
        plan = " The plan of the surgery is kept there." if "streamline_hooks" in path else ""
        raise AssertionError(
            f"{back} has another configuration: {path} says {now}; expected {before}.{plan} Likely cause: the "
            "configuration was changed after it was written, or its class changes it when it reads it."
        )


def _as_json(value: Any) -> Any:
    """As it lies in a file, where there are no tuples and every key is a text."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items() if key not in _OF_THE_FOLDER}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _hold_buffers(model: nn.Module, loaded: nn.Module, back: str, tolerance: float | None) -> None:
    """Compare buffers that are not saved, in the coarser precision of the two, then cast the loaded ones.

    ``model.bfloat16()`` casts them, loading does not.
    """
    theirs = dict(loaded.named_buffers())
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            continue
        made = theirs.get(name)
        allowed = max(SAME_SUMS.get(b.dtype, 0.0) for b in (buffer, buffer if made is None else made))
        found: object = "missing"
        if made is not None:
            allowed = allowed if tolerance is None or not buffer.is_floating_point() else tolerance
            found = difference(made.to(torch.float64), buffer.to(torch.float64), tolerance=allowed, axes=())
        if found is not None:
            raise AssertionError(
                f"{back} has another buffer {name}, which is not saved: {found}. Expected: what the class computes "
                "from its configuration. Likely cause: the buffer was changed in memory only; make it persistent, or "
                "change the configuration that it comes from."
            )
        path, _, last = name.rpartition(".")
        loaded.get_submodule(path)._buffers[last] = theirs[name].to(buffer.dtype)

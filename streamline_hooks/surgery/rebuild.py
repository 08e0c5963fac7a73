"""Whether the class, built from the shortened configuration, is the model that the surgery made.

Bypassing blocks is the truth; a shorter model is only a claim. Some classes build themselves from a block's number
(DiffLlama's lambda, GPT-2's ``scale_attn_by_inverse_layer_idx``, ``first_k_dense_replace``), so that a saved model
would come back as another one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.pooling_layer import pooling_argument
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.renumber import IndexAttribute
from streamline_hooks.surgery.splice import AFTER, BEFORE

_SIMPLE = (bool, int, float, str, type(None))
# What says nothing of the model in use: its mode, and the rates of stochastic depth, which are spread over all blocks.
_RUN_TIME_STATE = frozenset({"training", "gradient_checkpointing", "drop_prob"})


def verify_rebuild(
    model: Any,
    model_class: type[nn.Module],
    config: Any,
    path: str,
    blocks: Sequence[nn.Module],
    indices: Sequence[IndexAttribute],
) -> None:
    """Build the model anew from its configuration, without memory for its weights, and compare.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model after the surgery.
    model_class : type
        The class that a checkpoint of it would be loaded with, without splices.
    config : transformers.PretrainedConfig
        The model's configuration as it would be saved.
    path : str
        Path of the stack.
    blocks : sequence of torch.nn.Module
        The blocks that are in it now.
    indices : sequence of IndexAttribute
        The attributes that hold a block's number.

    Raises
    ------
    UnsupportedSurgery
        With the first difference in keys, shapes, classes, attributes or computed buffers.
    """
    _refuse_unsaved_quantization(model, config, path, blocks)
    try:
        saved = json.loads(json.dumps(config.to_dict(), default=str))
        described = type(config).from_dict(saved)
        _compare_lists(config, described)
        with _no_memory_for_parameters(blocks):
            rebuilt = model_class(described, **pooling_argument(model))
    except UnsupportedSurgery:
        raise
    except Exception as error:
        raise UnsupportedSurgery(
            f"{model_class.__name__} cannot be built from the shortened configuration, so that a checkpoint of it "
            f"would not load: {error}",
            "configuration",
        ) from error
    _follow_attention_type(model, rebuilt)
    _compare_keys(model, rebuilt)
    for number, (ours, theirs) in enumerate(zip(blocks, find_stack(rebuilt, path).blocks, strict=True)):
        for where, difference in _differences(ours, theirs, indices, rebuilt.config):
            raise UnsupportedSurgery(
                f"Block {number} of the shortened model would come back from a checkpoint as another one: "
                f"{where or 'the block'} {difference}. The class builds it from its number or from the configuration; "
                "choose other blocks, or keep the surgery in memory (leave the context open, without commit).",
                "built-from-number",
            )


def _refuse_unsaved_quantization(model: Any, config: Any, path: str, blocks: Sequence[nn.Module]) -> None:
    """Raise if the weights are quantised in a way that no checkpoint keeps, or that would not come back.

    bitsandbytes' modules are compared by their features, and torchao leaves the modules as they are.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    for name, value in model.state_dict().items() if quantizer is None else ():
        if not isinstance(value, torch.Tensor):
            owner = name.split("._packed_params")[0]
            kind = type(model.get_submodule(owner)) if owner in dict(model.named_modules()) else type(value)
            raise UnsupportedSurgery(
                f"{owner} is a {kind.__module__}.{kind.__qualname__}, whose packed weights ({name}) are no tensors, so "
                "that safetensors cannot hold them. Commit the surgery before quantising the model, or keep it in "
                "memory (leave the context open, without commit).",
                "quantized",
            )
    if quantizer is None:
        return
    method = str(
        getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    )
    if not quantizer.is_serializable():
        raise UnsupportedSurgery(
            f"{type(model).__name__} is quantised with {method}, which Transformers cannot save, so that there is no "
            "checkpoint to commit to. Commit the surgery to the model in full precision and quantise what is loaded "
            "from its checkpoint, or keep the surgery in memory (leave the context open, without commit).",
            "quantized",
        )
    full = _in_full_precision(blocks, path, _skipped(config)) if method == "bitsandbytes" else None
    if full is not None:
        raise UnsupportedSurgery(
            f"{full} is in full precision, in a {type(model).__name__} quantised with bitsandbytes, which would "
            "quantise it when the checkpoint is loaded: the model would come back as another one. Replace and commit "
            "in the model in full precision, and load its checkpoint with quantization_config; a removal without "
            "replacement can be committed here.",
            "quantized",
        )


def _skipped(config: Any) -> list[str]:
    """The names that bitsandbytes' settings keep in full precision, as they are after the surgery."""
    settings = getattr(config, "quantization_config", None)
    held = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    return list(held.get("llm_int8_skip_modules") or ())


def _in_full_precision(blocks: Sequence[nn.Module], path: str, skipped: Sequence[str]) -> str | None:
    """Find a linear map in full precision that loading would quantise: a spliced one, or one beside quantised ones."""
    inside = [dict(block.named_modules()) for block in blocks]
    quantized = {name for parts in inside for name, part in parts.items() if _is_bitsandbytes(part)}
    for number, parts in enumerate(inside):
        for name, part in parts.items():
            whole = f"{path}.{number}.{name}"
            named = any(f".{entry}." in f".{whole}." or whole.endswith(entry) for entry in skipped)
            spliced = name.split(".")[0] in (BEFORE, AFTER)
            if type(part) is nn.Linear and (spliced or name in quantized) and not named:
                return whole
    return None


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def _is_quantized(ours: nn.Module, theirs: nn.Module | None) -> bool:
    """Whether a module is bitsandbytes' form of the one that the class builds: the same map, stored otherwise."""
    if theirs is None or not _is_bitsandbytes(ours):
        return False
    features = [(getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in (ours, theirs)]
    biased = [getattr(m, "bias", None) is not None for m in (ours, theirs)]
    return isinstance(theirs, nn.Linear) and features[0] == features[1] and biased[0] == biased[1]


def _no_memory_for_parameters(blocks: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    computed = any(module._non_persistent_buffers_set for block in blocks for module in block.modules())
    if not computed:
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)  # type: ignore[no-any-return]


def _compare_lists(ours: Any, theirs: Any) -> None:
    """A configuration class may insist on something, such as full attention in the last block (Gemma 4)."""
    values = vars(ours.get_text_config(decoder=True))
    for name, value in vars(theirs.get_text_config(decoder=True)).items():
        before = values.get(name)
        if isinstance(value, list) and isinstance(before, (list, tuple)) and len(value) == len(before):
            for number, (old, new) in enumerate(zip(before, value, strict=True)):
                if _is_simple(old) and old != new:
                    raise UnsupportedSurgery(
                        f"A checkpoint of the shortened model would come back as another one: {type(theirs).__name__} "
                        f"turns {name}[{number}] from {old!r} into {new!r}. Choose other blocks, or keep the surgery "
                        "in memory (leave the context open, without commit).",
                        "configuration",
                    )


def _follow_attention_type(model: nn.Module, rebuilt: nn.Module) -> None:
    """Replace the attention of a rebuilt BigBird as the model has done since it ran a short text.

    The configuration goes on naming the sparse attention, and both kinds have the same weights.
    """
    inside: dict[str, Any] = dict(rebuilt.named_modules())
    for path, module in model.named_modules():
        if callable(getattr(module, "set_attention_type", None)) and path in inside:
            inside[path].set_attention_type(module.attention_type)


def _compare_keys(model: nn.Module, rebuilt: nn.Module) -> None:
    inside = dict(rebuilt.named_modules())
    quantized = tuple(f"{path}." for path, part in model.named_modules() if _is_quantized(part, inside.get(path)))

    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        # On some CPUs bitsandbytes' state_dict() rounds the weights of the model that it reads.
        entries = module.state_dict().items() if not quantized else _persistent(module)
        return {
            key: tuple(value.shape)
            for key, value in entries
            if not {BEFORE, AFTER} & set(key.split(".")) and not key.startswith(quantized)
        }

    ours, theirs = shapes(model), shapes(rebuilt)
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise UnsupportedSurgery(
                f"A checkpoint of the shortened model would not load: {key} has the shape {ours.get(key, 'missing')} "
                f"in the model and {theirs.get(key, 'missing')} in what {type(rebuilt).__name__} builds from the "
                "shortened configuration.",
                "built-from-number",
            )


def _persistent(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in module.named_modules():
        held = {**part._parameters, **part._buffers}
        for name, value in held.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), value


def _differences(
    ours: nn.Module, theirs: nn.Module, indices: Sequence[IndexAttribute], config: Any
) -> Iterator[tuple[str, str]]:
    skipped = {(index.path, index.name) for index in indices}
    inside: dict[str, nn.Module] = dict(theirs.named_modules())
    for path, module in ours.named_modules():
        if path.split(".")[0] in (BEFORE, AFTER):
            continue
        other = inside.get(path)
        if _is_quantized(module, other):
            continue
        if other is not None and type(module) is not type(other) and _are_one_in_evaluation(module, other):
            continue
        if other is None or type(module) is not type(other):
            yield path, f"is a {type(module).__name__} and would be a {type(other).__name__}"
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or name in _RUN_TIME_STATE or (path, name) in skipped:
                continue
            rebuilt = getattr(other, name, None)
            if isinstance(value, tuple) and isinstance(rebuilt, list):
                rebuilt = tuple(rebuilt)  # JSON knows no tuples
            if _is_per_block(value, rebuilt, config):
                continue
            if isinstance(value, float) and isinstance(rebuilt, float) and math.isclose(value, rebuilt, rel_tol=1e-9):
                continue
            if _is_simple(value) and value != rebuilt:
                yield f"{path}.{name}".lstrip("."), f"is {value!r} and would be {rebuilt!r}"
        for name in module._non_persistent_buffers_set:
            value, rebuilt = module._buffers[name], other._buffers.get(name)
            if value is not None and rebuilt is not None and not rebuilt.is_meta:
                same = value.shape == rebuilt.shape and torch.equal(
                    value, rebuilt.to(value)
                )  # in the model's precision
                if not same:
                    yield f"{path}.{name}".lstrip("."), "is a buffer that would have other values"


def _are_one_in_evaluation(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules without anything that is saved compute the same, once the model is not trained.

    So it is with stochastic depth, which is the identity then: Swin's and BEiT's first block has no module for it, and
    the others' rates are spread over all blocks. A checkpoint holds neither; the class builds them anew.
    """
    both = (ours, theirs)
    if any(next(held, None) is not None for m in both for held in (m.children(), m.parameters(), m.buffers())):
        return False
    sizes = 10.0 ** torch.arange(-3, 5)[:, None, None]
    state = sizes * torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = [_in_evaluation(module, state.clone()) for module in both]
    return all(isinstance(each, torch.Tensor) for each in made) and torch.equal(*made)


def _in_evaluation(module: nn.Module, state: torch.Tensor) -> Any:
    training = module.training
    module.training = False
    try:
        return module.forward(state)
    except Exception:  # it is given something else than a state
        return None
    finally:
        module.training = training


def _is_per_block(ours: Any, theirs: Any, config: Any) -> bool:
    """Whether a list inside a block is only its copy of a configuration's list with one entry a block."""
    described = config.get_text_config(decoder=True)
    return isinstance(theirs, list) and any(theirs == value for value in vars(described).values()) and ours != theirs


def _is_simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, _SIMPLE) for v in value)
    return isinstance(value, _SIMPLE)

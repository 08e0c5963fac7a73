"""Make a surgery permanent: store the plan in the configuration, and give the model the class that saves it.

Beforehand, the class is built from the shortened configuration and compared with the model. Some classes build their
blocks from the block index (DiffLlama's lambda, GPT-2's ``scale_attn_by_inverse_layer_idx``,
``first_k_dense_replace``), so that a different model would be loaded from the checkpoint.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery, refuse_adapters
from streamline_hooks.modeling import BlockStack, evaluation_mode, find_stack, is_pooler_parameter, pooling_argument
from streamline_hooks.surgery.layer_indices import IndexAttribute
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.splice import AFTER, BEFORE
from streamline_hooks.surgery.spliced_model import (
    CODE,
    accept_guarded,
    base_class,
    format_of,
    is_splice_parameter,
    resolve_model_path,
    splice_entries,
    streamlined_config_class,
    streamlined_model_class,
)

_SCALAR_TYPES = (bool, int, float, str, type(None))
# Attributes that do not describe the model in use: its mode, and the rates of stochastic depth, spread over all blocks.
_RUN_TIME_STATE = frozenset({"training", "gradient_checkpointing", "drop_prob"})


def prepare_commit(
    stack: BlockStack,
    depth: int,
    plan: SurgeryPlan,
    indices: Sequence[IndexAttribute],
    notes: dict[str, Any],
    prompt_skip: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Any, Any]:
    """Run all steps of `commit_surgery` that can fail on copies; return the record and the new classes.

    `stack` is the stack before the surgery, and `depth` the index of the saved model among its ancestors. The classes
    are those of the model and of its configuration. `prompt_skip` describes the blocks that prompts skip.
    """
    model: Any = stack.ancestors[depth]
    refuse_adapters(model, "committed")
    path = ".".join(stack.path.split(".")[depth:])
    if stack.config is None:
        raise UnsupportedSurgery(
            f"{type(model).__name__} cannot be committed: its configuration does not contain the number of blocks of "
            f"{stack.path} ({plan.old_length} before the surgery), so a checkpoint could not describe the shorter "
            "stack. Keep the surgery in memory (do not commit, and keep the with statement open)."
        )
    entry = history_entry(model, plan, notes)
    now = find_stack(model, path)
    earlier = getattr(model.config, "streamline_hooks", None) or {}
    entries = [*splice_entries(now.blocks), *_splices_in_other_stacks(model, earlier, path)]
    description: dict[str, Any] = {
        "format": 1,
        "stack": path,
        "splices": entries,
        "guard": _guard_weight(model, now),
        "history": [*copy.deepcopy(earlier.get("history", [])), entry],
    }
    if prompt_skip is not None:
        description["prompt_skip"] = prompt_skip
    if is_changed := bool(entries or prompt_skip):
        description["format"] = format_of(description)
    model_class: Any = base_class(type(model))
    config_class: Any = base_class(type(model.config))
    plain_config = copy.copy(model.config)
    plain_config.__class__ = config_class
    plain_config.streamline_hooks = description
    verify_rebuild(model, model_class, plain_config, now, indices)
    if is_changed:
        model_class = streamlined_model_class(model_class, config_class)
        config_class = streamlined_config_class(config_class)
    return description, model_class, config_class


def commit_surgery(
    stack: BlockStack,
    depth: int,
    plan: SurgeryPlan,
    indices: Sequence[IndexAttribute],
    notes: dict[str, Any],
    prompt_skip: dict[str, Any] | None = None,
) -> None:
    """Store the plan in the configuration, and give model and configuration the classes that save the result.

    The model is changed only after every step that can fail. Arguments are those of `prepare_commit`.
    """
    model: Any = stack.ancestors[depth]
    description, model_class, config_class = prepare_commit(stack, depth, plan, indices, notes, prompt_skip)
    hooks = model._load_state_dict_pre_hooks.values()
    if description["format"] > 1 and not any(getattr(hook, "hook", hook) is accept_guarded for hook in hooks):
        model.register_load_state_dict_pre_hook(accept_guarded)
    model.config.streamline_hooks = description
    # An entry of an earlier surgery. Saving writes it again if it applies.
    if CODE in str(vars(model.config).get("auto_map")):
        del model.config.auto_map
    model.config.architectures = [model_class.__name__]
    model.config.__class__ = config_class
    model.__class__ = model_class


def history_entry(model: Any, plan: SurgeryPlan, notes: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return a checkpoint's record of one surgery; `name` is used if the model has no name of its own."""
    try:
        notes = json.loads(json.dumps(notes))
    except (TypeError, ValueError) as error:
        raise StreamlineError(
            f"The notes passed to commit() are not JSON values: {error}. Pass numbers, strings, lists and dicts."
        ) from error
    return {"base_model": _base_model_name(model) or name, **notes, **plan.to_dict(), "versions": _versions(model)}


def _splices_in_other_stacks(model: Any, description: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Return the entries of splices in other stacks, with their paths in this model, with or without its head."""
    stacks = [
        resolve_model_path(model, entry.get("stack", description["stack"])) for entry in description.get("splices", [])
    ]
    return [
        {**entry, "stack": at} for entry, at in zip(description.get("splices", []), stacks, strict=True) if at != path
    ]


def _base_model_name(model: Any) -> str:
    """Return the hub name of a model, or only the last part of a local path."""
    name = str(getattr(model, "name_or_path", ""))
    on_hub = name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
    return name if on_hub else Path(name).name


def _versions(model: Any) -> dict[str, str]:
    """Return the versions of this library, its dependencies and the package of the model's class."""
    versions = {name: version(name) for name in ("streamline_hooks", "torch", "transformers")}
    package = type(model).__module__.partition(".")[0]
    with suppress(PackageNotFoundError):  # the class is defined in a user's script
        versions.setdefault(package, version(package))
    return versions


def _guard_weight(model: nn.Module, stack: BlockStack) -> str:
    """Return the name of the guard: an untied weight that is stored in another shape, usually of the final norm.

    Vectors are preferred to matrices, then weights after the blocks to weights before them and in them. A pooler is the
    last choice, because the class may be built without it.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    owner, _, container = stack.path.rpartition(".")
    children = list(stack.ancestors[-1]._modules)
    later_prefixes = tuple(f"{owner}.{name}.".lstrip(".") for name in children[children.index(container) + 1 :])

    def rank(entry: tuple[str, nn.Parameter]) -> tuple[bool, ...]:
        name, parameter = entry
        return (
            is_pooler_parameter(name),
            parameter.ndim != 1,
            name.startswith(f"{stack.path}."),
            not name.startswith(later_prefixes),
        )

    # Loading pads and ties the weights of embeddings and head by their shape, including biases.
    embedding_ids = {id(parameter) for module in _embedding_modules(model) for parameter in module.parameters()}
    candidates = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if owners[id(parameter)] == 1 and id(parameter) not in embedding_ids and not is_splice_parameter(name)
    ]
    return min(candidates, key=rank)[0]


def _embedding_modules(model: Any) -> Iterator[nn.Module]:
    """Yield the input embedding and the head, where the model defines them."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            if isinstance(module := getattr(model, getter)(), nn.Module):
                yield module


def verify_rebuild(
    model: Any, model_class: type[nn.Module], config: Any, stack: BlockStack, indices: Sequence[IndexAttribute]
) -> None:
    """Rebuild the model from its configuration on the meta device, and compare it with the model.

    Raise `UnsupportedSurgery` with the first difference in keys, shapes, classes, attributes or computed buffers.
    """
    _refuse_unsaved_quantization(model, config, stack)
    try:
        saved = json.loads(json.dumps(config.to_dict(), default=str))
        described = type(config).from_dict(saved)
        _compare_lists(config, described)
        with _parameters_on_meta(stack):
            rebuilt = model_class(described, **pooling_argument(model))
    except UnsupportedSurgery:
        raise
    except Exception as error:
        raise UnsupportedSurgery(
            f"{model_class.__name__} cannot be built from the shortened configuration, so its checkpoint would not "
            f"load: {error}. Choose other blocks, or keep the surgery in memory (do not commit, and keep the with "
            "statement open).",
            "configuration",
        ) from error
    _copy_attention_type(model, rebuilt)
    _compare_keys(model, rebuilt)
    for number, (ours, theirs) in enumerate(zip(stack.blocks, find_stack(rebuilt, stack.path).blocks, strict=True)):
        for path, difference in _differences(ours, theirs, indices, rebuilt.config):
            raise UnsupportedSurgery(
                f"Block {number} of the shortened model would be loaded from a checkpoint as a different block: "
                f"{path or 'the block'} {difference}. The class builds it from the block index or the configuration; "
                "choose other blocks, or keep the surgery in memory (do not commit, and keep the with statement open).",
                "built-from-index",
            )


def _refuse_unsaved_quantization(model: Any, config: Any, stack: BlockStack) -> None:
    """Raise if the weights are quantized in a way that cannot be saved or loaded.

    bitsandbytes modules are compared by their features; torchao does not change the modules.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        for name, value in model.state_dict().items():
            if not isinstance(value, torch.Tensor):
                owner = name.split("._packed_params")[0]
                kind = type(model.get_submodule(owner)) if owner in dict(model.named_modules()) else type(value)
                raise UnsupportedSurgery(
                    f"{owner} is a {kind.__module__}.{kind.__qualname__}, whose packed weights ({name}) are not "
                    "tensors, so safetensors cannot store them. Commit the surgery before quantizing the model, or "
                    "keep the surgery in memory (do not commit, and keep the with statement open).",
                    "quantized",
                )
        return
    method = quantizer.quantization_config.quant_method
    method = str(getattr(method, "value", method))
    if not quantizer.is_serializable():
        raise UnsupportedSurgery(
            f"{type(model).__name__} is quantized with {method}, which Transformers cannot save. Commit the surgery to "
            "the model in full precision and quantize the model loaded from its checkpoint, or keep the surgery in "
            "memory (do not commit, and keep the with statement open).",
            "quantized",
        )
    unquantized = _in_full_precision(stack, config) if method == "bitsandbytes" else None
    if unquantized is not None:
        raise UnsupportedSurgery(
            f"{unquantized} is in full precision, in a {type(model).__name__} quantized with bitsandbytes, which would "
            "quantize it when the checkpoint is loaded. Replace and commit in the model in full precision, and load "
            "its checkpoint with quantization_config. A removal without replacement can be committed here.",
            "quantized",
        )


def _in_full_precision(stack: BlockStack, config: Any) -> str | None:
    """Find a linear map in full precision that loading would quantize: a splice, or one next to quantized modules."""
    settings = getattr(config, "quantization_config", None)
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    skipped = values.get("llm_int8_skip_modules") or ()
    parts_by_block = [dict(block.named_modules()) for block in stack.blocks]
    quantized = {name for parts in parts_by_block for name, part in parts.items() if _is_bitsandbytes(part)}
    for number, parts in enumerate(parts_by_block):
        for name, part in parts.items():
            path = f"{stack.path}.{number}.{name}"
            is_skipped = any(f".{entry}." in f".{path}." or path.endswith(entry) for entry in skipped)
            is_spliced = name.split(".")[0] in (BEFORE, AFTER)
            if type(part) is nn.Linear and (is_spliced or name in quantized) and not is_skipped:
                return path
    return None


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def _is_quantized(ours: nn.Module, theirs: nn.Module | None) -> bool:
    """Whether a module is the bitsandbytes form of the module that the class builds."""
    if theirs is None or not _is_bitsandbytes(ours):
        return False
    features = [(getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in (ours, theirs)]
    biased = [getattr(m, "bias", None) is not None for m in (ours, theirs)]
    return isinstance(theirs, nn.Linear) and features[0] == features[1] and biased[0] == biased[1]


def _parameters_on_meta(stack: BlockStack) -> AbstractContextManager[Any]:
    if not any(module._non_persistent_buffers_set for block in stack.blocks for module in block.modules()):
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)  # type: ignore[no-any-return]


def _compare_lists(ours: Any, theirs: Any) -> None:
    """Raise if the configuration class changes a list when it is loaded (Gemma 4: full attention in the last block)."""
    values = vars(ours.get_text_config(decoder=True))
    for name, value in vars(theirs.get_text_config(decoder=True)).items():
        original = values.get(name)
        if isinstance(value, list) and isinstance(original, (list, tuple)) and len(value) == len(original):
            for number, (old, new) in enumerate(zip(original, value, strict=True)):
                if _is_scalar(old) and old != new:
                    raise UnsupportedSurgery(
                        f"A checkpoint of the shortened model would be loaded as a different model: "
                        f"{type(theirs).__name__} turns {name}[{number}] from {old!r} into {new!r}. Choose other "
                        "blocks, or keep the surgery in memory (do not commit, and keep the with statement open).",
                        "configuration",
                    )


def _copy_attention_type(model: nn.Module, rebuilt: nn.Module) -> None:
    """Change the attention of a rebuilt BigBird as the model does when it runs a short text.

    The configuration still specifies sparse attention, and both kinds have the same weights.
    """
    rebuilt_modules: dict[str, Any] = dict(rebuilt.named_modules())
    for path, module in model.named_modules():
        if callable(getattr(module, "set_attention_type", None)) and path in rebuilt_modules:
            rebuilt_modules[path].set_attention_type(module.attention_type)


def _compare_keys(model: nn.Module, rebuilt: nn.Module) -> None:
    rebuilt_modules = dict(rebuilt.named_modules())
    quantized = tuple(
        f"{path}." for path, part in model.named_modules() if _is_quantized(part, rebuilt_modules.get(path))
    )

    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        entries = module.state_dict().items() if not quantized else _persistent(module)
        return {
            key: tuple(value.shape)
            for key, value in entries
            if not is_splice_parameter(key) and not key.startswith(quantized)
        }

    ours, theirs = shapes(model), shapes(rebuilt)
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise UnsupportedSurgery(
                f"A checkpoint of the shortened model would not load: {key} has the shape {ours.get(key, 'missing')} "
                f"in the model and {theirs.get(key, 'missing')} in the {type(rebuilt).__name__} built from the "
                "shortened configuration. Choose other blocks.",
                "built-from-index",
            )


def _persistent(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the entries of the state dict; bitsandbytes' own method rounds the weights it reads on some CPUs."""
    for path, part in module.named_modules():
        for name, value in {**part._parameters, **part._buffers}.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), value


def _differences(
    ours: nn.Module, theirs: nn.Module, indices: Sequence[IndexAttribute], config: Any
) -> Iterator[tuple[str, str]]:
    skipped = {(index.path, index.name) for index in indices}
    rebuilt_modules: dict[str, nn.Module] = dict(theirs.named_modules())
    for path, module in ours.named_modules():
        if path.split(".")[0] in (BEFORE, AFTER):
            continue
        other = rebuilt_modules.get(path)
        if _is_quantized(module, other):
            continue
        if other is None or type(module) is not type(other):
            if other is None or not _equal_in_evaluation(module, other):
                yield path, f"is a {type(module).__name__} and would be loaded as a {type(other).__name__}"
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or name in _RUN_TIME_STATE or (path, name) in skipped:
                continue
            rebuilt = getattr(other, name, None)
            if isinstance(value, tuple) and isinstance(rebuilt, list):
                rebuilt = tuple(rebuilt)  # JSON has no tuples
            if _is_per_block(rebuilt, config):
                continue
            if isinstance(value, float) and isinstance(rebuilt, float) and math.isclose(value, rebuilt, rel_tol=1e-9):
                continue
            if _is_scalar(value) and value != rebuilt:
                yield f"{path}.{name}".lstrip("."), f"is {value!r} and would be loaded as {rebuilt!r}"
        for name in module._non_persistent_buffers_set:
            value, rebuilt = module._buffers[name], other._buffers.get(name)
            if value is None or rebuilt is None or rebuilt.is_meta:
                continue
            if not torch.equal(value, rebuilt.to(value)):  # in the model's dtype
                yield f"{path}.{name}".lstrip("."), "is a buffer that would be loaded with other values"


def _equal_in_evaluation(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules without parameters, buffers and children compute the same in evaluation mode.

    Stochastic depth, for instance, is the identity in evaluation mode. The first block of Swin and BEiT has no module
    for it, and the rates of the others are spread over all blocks. A checkpoint stores neither.
    """
    both = (ours, theirs)
    if any(next(members, None) is not None for m in both for members in (m.children(), m.parameters(), m.buffers())):
        return False
    sizes = 10.0 ** torch.arange(-3, 5)[:, None, None]
    state = sizes * torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(*both), torch.no_grad():
        try:
            outputs = [module.forward(state.clone()) for module in both]
        except Exception:  # the input is not a single state
            return False
    return all(isinstance(each, torch.Tensor) for each in outputs) and torch.equal(*outputs)


def _is_per_block(value: Any, config: Any) -> bool:
    """Whether a list inside a block only copies a list of the configuration with one entry per block."""
    return isinstance(value, list) and value in vars(config.get_text_config(decoder=True)).values()


def _is_scalar(value: Any) -> bool:
    return all(isinstance(v, _SCALAR_TYPES) for v in (value if isinstance(value, (list, tuple)) else (value,)))

"""Classes of models with splices: they build the splices, and save and load checkpoints that contain them.

A model with splices gets a class derived from the class of its architecture, and so does its configuration. With these
classes, ``model.save_pretrained`` (and therefore a ``Trainer``) writes a checkpoint that loads through
``AutoModelForCausalLM`` if this library is imported, and fails to load otherwise. It fails for three reasons:

- the ``model_type`` is unknown without this library;
- ``quantization_config`` in ``config.json`` has no ``quant_method``, so that ``from_pretrained`` of every plain class
  raises; the model's own quantization settings, if any, are stored inside it;
- one weight (the guard, usually of the final norm) is stored with a leading axis of 1, so that the architecture's own
  class raises a size mismatch, unless ``ignore_mismatched_sizes=True``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from streamline_hooks.core import StreamlineError
from streamline_hooks.replacements import build_replacement, is_own, replacement_config
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced

MODEL_TYPE = "streamline_hooks"
CODE = "modeling_streamline_hooks"
# 4 has no `last_tokens` of `prompt_skip`, 3 no `prompt_skip`, 2 no digest and no guard in quantization_config, and 1
# splices in one stack only.
FORMAT = 5
PROMPT_MAPS = "prompt_maps"
"""Name of the submodule of a model that holds the maps of `PromptSkip`, by block."""
_PREFIX = "Streamlined"
_WITH_DIGEST, _WITH_PROMPT_SKIP, _WITH_LAST_TOKENS = 3, 4, 5
_MARK = "has_guard_axis"
_QUANTIZATION, _REQUIRES = "quantization_config", "requires"
_guarded: ContextVar[bool] = ContextVar("guarded", default=False)
_class_lock = threading.RLock()  # without it, two threads may create two classes of the same model


class StreamlinedConfig(PretrainedConfig):
    """Configuration class that Transformers finds by the model type of checkpoints with splices."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the derived configuration of the architecture that the dictionary names.

        Raises
        ------
        StreamlineError
            If the dictionary was not written by this library, or was written by a later version.
        """
        from transformers import CONFIG_MAPPING

        base_type: Any = config_dict.get("base_model_type")
        _check_description(config_dict.get("streamline_hooks"), base_type)
        if base_type not in CONFIG_MAPPING:
            raise StreamlineError(
                f"This checkpoint is a compressed {base_type!r}, which the installed Transformers "
                f"{transformers.__version__} does not support. Upgrade Transformers. If the architecture is your own, "
                "register it with AutoConfig and AutoModelForCausalLM first."
            )
        config_base: Any = CONFIG_MAPPING[base_type]
        return register_classes(config_base).from_dict(config_dict, **kwargs)


def register_classes(config_base: Any) -> Any:
    """Let the auto classes of Transformers build models with splices; return their configuration class.

    A configuration that was pickled in another process does not do this.
    """
    config_class = streamlined_config_class(config_base)
    for auto, base in _classes_for(config_base):
        auto.register(config_class, streamlined_model_class(base, config_base), exist_ok=True)
    return config_class


class _ConfigWithSplices:
    """Mix-in for configurations of models with splices, which are saved under another model type."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the content of ``config.json``."""
        description: Any = config_dict.get("streamline_hooks")
        _check_description(description, config_dict.get("base_model_type", cls.model_type))
        settings = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        settings["streamline_hooks"] = {**description, "format": format_of(description)}
        if description["format"] >= _WITH_DIGEST:
            quantization = settings.pop(_QUANTIZATION, None)
            if not isinstance(quantization, dict) or quantization.get(_REQUIRES) != MODEL_TYPE:
                raise _changed_file_error(f"{_QUANTIZATION} is {quantization!r}, without {_REQUIRES}={MODEL_TYPE!r}")
            settings |= {key: value for key, value in quantization.items() if key == _QUANTIZATION}
        return super().from_dict(settings, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write ``config.json`` with the entries that make plain classes refuse it, and a digest of the splices."""
        content = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        description = {**self.streamline_hooks, "format": format_of(self.streamline_hooks)}  # type: ignore[attr-defined]
        content["streamline_hooks"] = {**description, "digest": _digest(description, type(self).model_type)}
        model_settings = {_QUANTIZATION: content[_QUANTIZATION]} if content.get(_QUANTIZATION) else {}
        content[_QUANTIZATION] = {_REQUIRES: MODEL_TYPE, **model_settings}
        Path(json_file_path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**values, "model_type": MODEL_TYPE, "base_model_type": type(self).model_type}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the configuration, unless it is saved with a part of the model, which would omit the guard."""
        architectures = getattr(self, "architectures", None) or []
        if not any(str(name).startswith(_PREFIX) for name in architectures):
            raise StreamlineError(
                f"{', '.join(architectures) or 'This module'} shares the configuration of a model with spliced modules "
                "and would be saved without them. Save the model that was committed. To commit another model, open the "
                "LayerSurgeon on it."
            )
        if _can_stand_alone(self):
            classes = _classes_for(base_class(type(self)))
            self.auto_map = {"AutoConfig": f"{CODE}.StreamlinedConfig"} | {
                auto.__name__: f"{CODE}.{_PREFIX}{base.__name__}" for auto, base in classes
            }
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{CODE}.py").write_text(_standalone_code(), encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class _ModelWithSplices:
    """Mix-in for models with splices, which builds the splices and guards the checkpoint."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        description = config.streamline_hooks
        changed = description.get("digest") not in (None, _digest(description, type(config).model_type))
        for entry in description["splices"]:
            block = _block_of_entry(self, description, entry)
            try:
                modules = build_splices(entry)
            except (TypeError, RuntimeError) as error:
                if changed:
                    raise _changed_file_error(
                        f"a replacement cannot be built from {entry['modules']} ({error})"
                    ) from error
                raise
            set_splices(block, entry["place"], modules)
        if changed:
            raise _changed_file_error("the digest of its splices does not match the stored one")
        guard_parts(self)
        if "prompt_skip" in description:
            try:
                from streamline_hooks.surgery.prompt_skip import attach_prompt_skip  # it imports this module
            except ModuleNotFoundError as error:  # this file is a copy in a checkpoint
                raise StreamlineError(
                    "The prompts of this checkpoint skip blocks, which needs streamline_hooks. Install it."
                ) from error
            entry = description["prompt_skip"]
            attach_prompt_skip(cast("nn.Module", self), entry, _build_maps(entry))
        self.register_load_state_dict_pre_hook(accept_guarded)  # type: ignore[attr-defined]
        if _guarded.get():
            _set_guard_axis(self, present=True)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        token = _guarded.set(True)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        finally:
            _guarded.reset(token)
        guard = resolve_model_path(model, model.config.streamline_hooks["guard"])
        mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ()]
        unexpected = [*(info.get("unexpected_keys") or ()), *mismatched]
        if unusable := [*filter(is_splice_parameter, unexpected), *(key for key in mismatched if key == guard)]:
            raise _changed_file_error(f"the stored weight {min(unusable)} does not fit the described model")
        if missing := [*filter(is_splice_parameter, info["missing_keys"])]:
            raise StreamlineError(
                f"The checkpoint lacks weights of spliced modules that its configuration lists: {', '.join(missing)} "
                f"(names in {base_class(cls).__name__}). It is damaged, or was saved from a class with other block "
                "names. Save it again, or load it with the class that was saved."
            )
        model.config.streamline_hooks.pop("digest", None)  # it describes the file, and the modules may change later
        _set_guard_axis(model, present=False)
        _fill_unsaved_buffers(model)
        return (model, info) if output_loading_info else model

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return the weights, unless a model that contains this one is saved, which would be loaded without splices."""
        if prefix:
            _refuse_whole_model(self)
        return super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        description = self.config.streamline_hooks
        guard = resolve_model_path(self, description["guard"])
        description["splices"] = [_current_entry(self, entry) for entry in description["splices"]]
        for entry in description["splices"]:
            if "error" in entry:
                raise StreamlineError(entry["error"])
        if "prompt_skip" in description:
            description["prompt_skip"]["maps"] = describe_maps(getattr(self, PROMPT_MAPS))
        _warn_about_wider_dtypes(self)
        # A quantizer, and the hooks of offloaded weights, read the weights from the model instead of the state dict.
        offloaded = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]
        if getattr(self, "hf_quantizer", None) is not None or (offloaded and state_dict is None):
            with _guard_axis(self):
                return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        weights = dict(self.state_dict() if state_dict is None else state_dict)
        if guard in weights and weights[guard].ndim == self.get_parameter(guard).ndim:  # type: ignore[attr-defined]
            weights[guard] = weights[guard].unsqueeze(0)
        return super().save_pretrained(save_directory, *args, state_dict=weights, **kwargs)  # type: ignore[misc]


def _refuse_whole_model(part: Any) -> None:
    """Raise if ``save_pretrained`` of a model that contains `part` is running."""
    from transformers import PreTrainedModel

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        saves = frame.f_code.co_name == "save_pretrained" and isinstance(owner, PreTrainedModel)
        # A model with the same configuration refuses by itself, and one with splices describes those of its parts.
        if saves and not isinstance(owner, _ModelWithSplices) and owner.config is not part.config:
            raise StreamlineError(
                f"The {type(part).__name__} inside this {type(owner).__name__} has spliced modules, and the whole "
                "model would be loaded without them. Expected a surgery that was committed on the whole model. Open "
                "the LayerSurgeon on it, with the path of the stack, or save the part."
            )
        frame = frame.f_back


class PartGuard:
    """Replacement of ``save_pretrained`` of a part of a model with splices, which raises."""

    def __init__(self, part: str, whole: str) -> None:
        self.part, self.whole = part, whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise with the reason and the remedy."""
        raise StreamlineError(
            f"This {self.part} is a part of a {self.whole} with spliced modules, and would be saved without them. Save "
            "the whole model. To commit the part alone, open the LayerSurgeon on it."
        )


def guard_parts(model: Any) -> None:
    """Let the parts of a model that contain its splices refuse to be saved.

    A part with the configuration of the model refuses by that.
    """
    from transformers import PreTrainedModel

    description = model.config.streamline_hooks
    paths = {entry.get("stack", description["stack"]) for entry in description["splices"]}
    for path in (resolve_model_path(model, path).split(".") for path in paths):
        for length in range(1, len(path)):
            part = model.get_submodule(".".join(path[:length]))
            if isinstance(part, PreTrainedModel) and part.config is not model.config:
                vars(part)["save_pretrained"] = PartGuard(
                    base_class(type(part)).__name__, base_class(type(model)).__name__
                )


_FIELDS: dict[str, type] = {"format": int, "stack": str, "guard": str, "splices": list}
_FIELDS_OF_ENTRY: dict[str, type] = {"block": int, "place": str, "modules": list}
_FIELDS_OF_PROMPT_SKIP: dict[str, type] = {"stack": str, "window": list, "maps": dict}
_FIELDS_OF_MODULE: dict[str, type] = {"kind": str, "config": dict}


def _check_description(description: Any, base_type: Any) -> None:
    """Raise unless a configuration describes splices or skipped blocks in a format that this version reads."""
    if not isinstance(description, dict) or base_type is None:
        raise StreamlineError(
            "This configuration has the model type 'streamline_hooks' but no plan or no base_model_type, so "
            "streamline_hooks did not write it. Load a folder that streamline_hooks saved."
        )
    _check_fields(description, _FIELDS, "the entry")
    if description["format"] > FORMAT:
        raise StreamlineError(
            f"This checkpoint has format {description['format']}, but this version of streamline_hooks reads formats "
            f"up to {FORMAT}. Upgrade streamline_hooks."
        )
    if description["format"] >= _WITH_DIGEST:
        _check_fields(description, {"digest": str}, "the entry")
    elif description["format"] < 1 or "digest" in description:
        raise _changed_file_error(f"'format' is {description['format']}")
    if "prompt_skip" in description:
        last_tokens = {"last_tokens": int} if description["format"] >= _WITH_LAST_TOKENS else {}
        _check_fields(description["prompt_skip"], _FIELDS_OF_PROMPT_SKIP | last_tokens, "'prompt_skip'")
        for number, module in description["prompt_skip"]["maps"].items():
            _check_fields(module, _FIELDS_OF_MODULE, f"prompt_skip.maps[{number}]")
    elif not description["splices"]:
        raise _changed_file_error("'splices' is empty")
    for number, entry in enumerate(description["splices"]):
        where = f"splices[{number}]"
        _check_fields(entry, _FIELDS_OF_ENTRY, where)
        if not entry["modules"]:
            raise _changed_file_error(f"'modules' of {where} is empty")
        for position, module in enumerate(entry["modules"]):
            _check_fields(module, _FIELDS_OF_MODULE, f"{where}.modules[{position}]")


def _check_fields(entry: Any, fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _changed_file_error(f"{name!r} of {where} is {value!r}, expected {kind.__name__}")


def _changed_file_error(what: str) -> StreamlineError:
    return StreamlineError(
        f"config.json, streamline_hooks: {what}. The file was changed since it was written, and the loaded model would "
        "not be the saved one. Restore the file, or save the model again."
    )


def _digest(description: dict[str, Any], base_type: str) -> str:
    """Return a digest of everything that the splices are built from."""
    names = ("stack", "guard", "splices", "prompt_skip")
    fields = {name: description[name] for name in names if name in description}
    text = json.dumps([base_type, fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def format_of(description: dict[str, Any]) -> int:
    """Return the oldest format that can express a description of splices or of skipped blocks."""
    if "prompt_skip" not in description:
        return _WITH_DIGEST
    return _WITH_LAST_TOKENS if "last_tokens" in description["prompt_skip"] else _WITH_PROMPT_SKIP


def describe_maps(maps: nn.ModuleDict) -> dict[str, dict[str, Any]]:
    """Return a checkpoint's description of the maps of `PromptSkip`, by block."""
    return {k: dict(zip(("kind", "config"), replacement_config(module), strict=True)) for k, module in maps.items()}


def streamlined_config_class(base: Any) -> Any:
    """Return the configuration class of an architecture with splices."""
    with _class_lock:
        return _config_class(base)


@functools.cache
def _config_class(base: Any) -> Any:
    members = {"__module__": __name__, "__doc__": _ConfigWithSplices.__doc__, "model_type": base.model_type}
    return type(f"{_PREFIX}{base.__name__}", (_ConfigWithSplices, base), members)


def streamlined_model_class(base: Any, config_base: Any) -> Any:
    """Return the model class of an architecture with splices."""
    with _class_lock:
        return _model_class(base, config_base)


@functools.cache  # by both arguments, since several configuration classes can share a model class
def _model_class(base: Any, config_base: Any) -> Any:
    members = {
        "__module__": __name__,
        "__doc__": _ModelWithSplices.__doc__,
        "config_class": streamlined_config_class(config_base),
        # Checkpoints are converted like those of the architecture itself.
        "is_custom_code": classmethod(lambda cls: bool(base.is_custom_code())),
    }
    model_class = type(f"{_PREFIX}{base.__name__}", (_ModelWithSplices, base), members)
    if importlib.util.find_spec("transformers.conversion_mapping") is not None:  # conversions are listed by class name
        from transformers import conversion_mapping

        conversion = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
        if conversion is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(model_class.__name__, conversion, overwrite=True)
    return model_class


def base_class(cls: type[Any]) -> type[Any]:
    """Return the architecture's own class of a model or configuration, with or without splices."""
    return next(c for c in cls.__mro__ if not issubclass(c, (_ModelWithSplices, _ConfigWithSplices)))


def _classes_for(config_base: type[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the Auto classes that support an architecture, each with its class for the plain model."""
    from transformers.models.auto import modeling_auto  # slow import

    for auto in vars(modeling_auto).values():
        mapping: Any = (getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None) or ()
        if config_base in mapping and isinstance(base := mapping[config_base], type):
            yield auto, base


def _can_stand_alone(config: Any) -> bool:
    """Whether the model needs only classes of Transformers and of this library."""
    kinds = [m["kind"] for entry in config.streamline_hooks["splices"] for m in entry.get("modules", [])]
    is_plain = "prompt_skip" not in config.streamline_hooks
    return is_plain and base_class(type(config)).__module__.startswith("transformers.") and all(map(is_own, kinds))


def _standalone_code() -> str:
    """Return the code that loads a model where this library is not installed."""
    try:
        from streamline_hooks.surgery.standalone import standalone_code
    except ModuleNotFoundError:  # this file is that code
        return Path(__file__).read_text(encoding="utf-8")
    return standalone_code()


def accept_guarded(module: Any, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Let ``load_state_dict`` accept the guard as stored on disk, as a resuming ``Trainer`` passes it."""
    guard = resolve_model_path(module, module.config.streamline_hooks["guard"])
    stored = state_dict.get(prefix + guard)
    if stored is not None and stored.ndim == module.get_parameter(guard).ndim + 1:
        state_dict[prefix + guard] = stored.squeeze(0)


def _guard_owner(model: Any) -> tuple[nn.Module, str]:
    """Return the module that holds the guard, and the name of the parameter in it."""
    path, _, name = resolve_model_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    return model.get_submodule(path), name


def _set_guard_axis(model: Any, present: bool) -> None:
    """Add the leading axis with which the guard is stored, or remove it."""
    owner, name = _guard_owner(model)
    parameter: Any = owner._parameters[name]
    if present and getattr(parameter, _MARK, False):
        return  # a model inside a model, for instance in a classifier, has set its guard already
    data = parameter.data.unsqueeze(0) if present else parameter.data.squeeze(0)
    reshaped = nn.Parameter(data, requires_grad=parameter.requires_grad)
    vars(reshaped).update({**vars(parameter), _MARK: present})
    owner._parameters[name] = reshaped
    if parameter.is_meta:
        _reshape_offloaded(owner, name, reshaped.ndim)


def _reshape_offloaded(owner: Any, name: str, axes: int) -> None:
    """Reshape the values of an offloaded guard, which accelerate loads in their stored shape."""
    offloaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
    if offloaded is None:
        return  # the model was built on the meta device, without values
    offloaded_weights = getattr(getattr(offloaded, "dataset", None), "state_dict", None)
    if offloaded_weights is None:
        raise StreamlineError(
            f"{name} of a {type(owner).__name__} is offloaded in an unknown way, so it cannot be reshaped. Keep "
            "this module in memory: assign it a device in device_map."
        )
    stored = offloaded[name]
    offloaded_weights[f"{offloaded.prefix}{name}"] = stored.reshape(
        (1,) * (axes - stored.ndim) + stored.shape[max(0, stored.ndim - axes) :]
    )


@contextmanager
def _guard_axis(model: Any) -> Iterator[None]:
    """Add the leading axis of the guard temporarily, and restore the same parameter, which an optimizer may hold."""
    owner, name = _guard_owner(model)
    parameter: Any = owner._parameters[name]
    try:
        _set_guard_axis(model, present=True)
        yield
    finally:
        owner._parameters[name] = parameter
        if parameter.is_meta:
            _reshape_offloaded(owner, name, parameter.ndim)


def splice_entries(blocks: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return the checkpoint's description of the splices of a stack, in the order of the blocks."""
    return [
        _entry(number, position, spliced(block, position))
        for number, block in enumerate(blocks)
        for position in (BEFORE, AFTER)
        if spliced(block, position)
    ]


def _entry(number: int, position: str, modules: tuple[nn.Module, ...]) -> dict[str, Any]:
    try:
        kinds = [dict(zip(("kind", "config"), replacement_config(module), strict=True)) for module in modules]
    except StreamlineError as error:  # it works in memory; saving raises this error
        return {"block": number, "place": position, "error": str(error)}
    return {"block": number, "place": position, "modules": kinds}


def build_splices(entry: dict[str, Any]) -> list[nn.Module]:
    """Build the modules at one position that a checkpoint entry describes, in the order in which they run."""
    return [build_replacement(module["kind"], module["config"]) for module in entry["modules"]]


def _current_entry(model: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry for the current modules, which may have changed since the surgery."""
    modules = spliced(_block_of_entry(model, model.config.streamline_hooks, entry), entry["place"])
    stack = {"stack": entry["stack"]} if "stack" in entry else {}
    return {**stack, **_entry(entry["block"], entry["place"], modules)}


def _warn_about_wider_dtypes(model: Any) -> None:
    """Warn if loading, which casts all weights to one dtype, would round the splices."""
    spliced_parameters = (p for name, p in model.named_parameters() if is_splice_parameter(name))
    wider = {p.dtype for p in spliced_parameters if p.is_floating_point() and p.dtype.itemsize > model.dtype.itemsize}
    if wider:
        warnings.warn(
            f"The replacements have dtype {', '.join(map(str, wider))}, but loading casts all weights to the dtype "
            f"of the model, {model.dtype}. Load the checkpoint with dtype={next(iter(wider))} to keep their values.",
            stacklevel=3,
        )


def _fill_unsaved_buffers(model: Any) -> None:
    """Fill the buffers of spliced modules that no checkpoint contains, since loading leaves them without values."""
    description = model.config.streamline_hooks
    for entry in description["splices"]:
        modules = nn.ModuleList(spliced(_block_of_entry(model, description, entry), entry["place"]))
        if not any(part._non_persistent_buffers_set for part in modules.modules()):
            continue
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            rebuilt = nn.ModuleList(build_splices(entry))
        _fill_buffers(modules, rebuilt)
    if "prompt_skip" in description and (maps := getattr(model, PROMPT_MAPS, None)) is not None:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            _fill_buffers(maps, _build_maps(description["prompt_skip"]))


def _fill_buffers(modules: nn.Module, rebuilt: nn.Module) -> None:
    for part, rebuilt_part in zip(modules.modules(), rebuilt.modules(), strict=True):
        for name in part._non_persistent_buffers_set:
            buffer, value = part._buffers[name], rebuilt_part._buffers[name]
            if buffer is not None and value is not None:
                part._buffers[name] = value.to(buffer.device, buffer.dtype)


def _build_maps(entry: dict[str, Any]) -> nn.ModuleDict:
    """Build the maps of `PromptSkip` that a checkpoint describes."""
    return nn.ModuleDict({k: build_replacement(m["kind"], m["config"]) for k, m in entry["maps"].items()})


def _block_of_entry(model: Any, description: dict[str, Any], entry: dict[str, Any]) -> nn.Module:
    """Return the block that carries the splices of an entry, or raise if there is none."""
    stack = entry.get("stack", description["stack"])
    try:
        blocks = list(model.get_submodule(resolve_model_path(model, stack)).children())
    except AttributeError:
        blocks = []
    if entry["place"] not in (BEFORE, AFTER) or not 0 <= entry["block"] < len(blocks):
        raise StreamlineError(
            f"config.json, streamline_hooks.splices: the entry names a module {entry['place']} block {entry['block']} "
            f"of {stack!r}, which has {len(blocks)} blocks in this {type(model).__name__}. Either this class lacks the "
            "stack, or the file was changed since it was written. Load the class that was saved, or save the model "
            "again."
        )
    block: nn.Module = blocks[entry["block"]]
    return block


def resolve_model_path(model: Any, path: str) -> str:
    """Return a path in this model for a path written for the model with or without its head."""
    first, _, rest = path.partition(".")
    base_prefix = getattr(model, "base_model_prefix", "")
    if hasattr(model, first):
        return path
    return f"{base_prefix}.{path}" if hasattr(getattr(model, base_prefix, None), first) else rest


def is_splice_parameter(name: str) -> bool:
    """Whether a name is that of a parameter or buffer of a spliced module, or of a map of `PromptSkip`."""
    return not {BEFORE, AFTER, PROMPT_MAPS}.isdisjoint(name.split("."))


def __getattr__(name: str) -> Any:
    """Return a derived class by its name, as unpickling requires."""
    base: Any = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        config_class: Any = base
        return streamlined_config_class(config_class)
    config_base: Any = getattr(base, "config_class", None)
    if config_base is not None:
        return streamlined_model_class(base, config_base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

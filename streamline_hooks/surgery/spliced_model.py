"""The class of a model with splices: it builds them, and reads and writes a checkpoint that keeps them.

A model with splices gets a class of its own, derived from its architecture's, and so does its configuration: then
``model.save_pretrained`` itself, and with it a ``Trainer``, writes a checkpoint that loads through
``AutoModelForCausalLM`` where this library is imported and fails loudly where it is not. Three things make it fail:

- the ``model_type`` is unknown without this library;
- ``quantization_config`` in ``config.json`` has no ``quant_method``, which makes ``from_pretrained`` of every plain
  class raise; the model's own settings, if any, are stored inside it;
- one weight (the guard, the final norm's) is stored with a leading axis of 1, so that loading with the architecture's
  own class raises on its size, unless ``ignore_mismatched_sizes=True``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from streamline_hooks.errors import StreamlineError
from streamline_hooks.replacements.registry import build_replacement, is_own, replacement_config
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced

MODEL_TYPE = "streamline_hooks"
CODE = "modeling_streamline_hooks"
FORMAT = 3  # 2 has no digest and no guard in quantization_config; 1 has splices in one stack only
_PREFIX = "Streamlined"
_WITH_DIGEST = 3
_MARK = "has_guard_axis"
_QUANTIZATION, _REQUIRES = "quantization_config", "requires"
_guarded: ContextVar[bool] = ContextVar("guarded", default=False)


class StreamlinedConfig(PretrainedConfig):
    """The entry under which Transformers finds configurations of models with splices."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of the architecture that the dictionary names.

        Raises
        ------
        StreamlineError
            If the dictionary was not written by this library, or by a later version of it.
        """
        from transformers import CONFIG_MAPPING

        base_type: Any = config_dict.get("base_model_type")
        _check_description(config_dict.get("streamline_hooks"), base_type)
        if base_type not in CONFIG_MAPPING:
            raise StreamlineError(
                f"This checkpoint is a compressed {base_type!r}, which the installed Transformers "
                f"{transformers.__version__} does not know. Upgrade Transformers, or, if the architecture is your own, "
                "register it with AutoConfig and AutoModelForCausalLM first."
            )
        config_base = CONFIG_MAPPING[base_type]
        config_class = streamlined_config_class(config_base)
        _register_models(config_base, config_class)
        return config_class.from_dict(config_dict, **kwargs)


class _ConfigWithSplices:
    """What a configuration of a model with splices does differently: it is written under another type."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from the content of ``config.json``.

        Raises
        ------
        StreamlineError
            If the content does not describe the splices as this library writes them.
        """
        said = config_dict.get("streamline_hooks")
        _check_description(said, config_dict.get("base_model_type", cls.model_type))
        settings = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        settings["streamline_hooks"] = {**said, "format": FORMAT}  # type: ignore[dict-item]
        if said["format"] >= _WITH_DIGEST:  # type: ignore[index]
            guarded = settings.pop(_QUANTIZATION, None)
            if not isinstance(guarded, dict) or guarded.get(_REQUIRES) != MODEL_TYPE:
                raise _changed(f"{_QUANTIZATION} beside it is {guarded!r}, without {_REQUIRES}={MODEL_TYPE!r}")
            settings |= {key: value for key, value in guarded.items() if key == _QUANTIZATION}
        return super().from_dict(settings, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write ``config.json`` with what makes the plain classes refuse it, and with a digest of the splices."""
        content = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        said = {**self.streamline_hooks, "format": FORMAT}  # type: ignore[attr-defined]
        content["streamline_hooks"] = {**said, "digest": _digest(said, type(self).model_type)}
        original = {_QUANTIZATION: content[_QUANTIZATION]} if content.get(_QUANTIZATION) else {}
        content[_QUANTIZATION] = {_REQUIRES: MODEL_TYPE, **original}
        Path(json_file_path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**written, "model_type": MODEL_TYPE, "base_model_type": type(self).model_type}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the configuration, unless a part of the model, which does not know of the guard, is being saved."""
        architectures = getattr(self, "architectures", None) or []
        if not any(str(name).startswith(_PREFIX) for name in architectures):
            raise StreamlineError(
                f"{', '.join(architectures) or 'This part'} shares the configuration of a model with spliced modules "
                "and would be saved without them. Save the model that was committed; to commit another one, open the "
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
    """What a model with splices does differently: it builds them, and guards its checkpoint."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = config.streamline_hooks
        changed = said.get("digest") not in (None, _digest(said, type(config).model_type))
        for entry in said["splices"]:
            block = _block_of(self, entry.get("stack", said["stack"]), entry)
            try:
                modules = build_splices(entry)
            except (TypeError, RuntimeError) as error:
                if changed:
                    raise _changed(f"a replacement cannot be built from {entry['modules']} ({error})") from error
                raise
            set_splices(block, entry["place"], modules)
        if changed:
            raise _changed("the digest of its splices is not the stored one")
        self.register_load_state_dict_pre_hook(accept_guarded)  # type: ignore[attr-defined]
        if _guarded.get():
            _set_guard_axis(self, present=True)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        with _reading_a_guarded_checkpoint():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        lost = [key for key in info["missing_keys"] if {BEFORE, AFTER} & set(key.split("."))]
        _check_loading(model, info)
        if lost:
            raise StreamlineError(
                f"The checkpoint lacks the weights of spliced modules that its configuration lists, under the names "
                f"that {base_class(cls).__name__} has for them: {', '.join(lost)}. It is damaged, or was saved from a "
                "class that names its blocks otherwise. Save it again, or load it as the class that was saved."
            )
        model.config.streamline_hooks.pop("digest", None)  # it is of the file, and the modules may be changed
        _set_guard_axis(model, present=False)
        _fill_unsaved_buffers(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        said = self.config.streamline_hooks
        guard = own_path(self, said["guard"])
        said["splices"] = [_entry_now(self, entry) for entry in said["splices"]]
        unwritable = [m for m in said["splices"] if "modules" not in m]
        if unwritable:
            raise StreamlineError(unwritable[0]["error"])
        _tell_of_wider_ones(self)
        # A quantizer reads the weights from the model in any case, and so does what brings offloaded ones.
        offloaded = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]
        if getattr(self, "hf_quantizer", None) is not None or (offloaded and state_dict is None):
            with _guard_axis(self):
                return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        weights = dict(self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        if guard in weights and weights[guard].ndim == self.get_parameter(guard).ndim:  # type: ignore[attr-defined]
            weights[guard] = weights[guard].unsqueeze(0)
        return super().save_pretrained(save_directory, *args, state_dict=weights, **kwargs)  # type: ignore[misc]


_FIELDS: dict[str, type] = {"format": int, "stack": str, "guard": str, "splices": list}
_FIELDS_OF_ENTRY: dict[str, type] = {"block": int, "place": str, "modules": list}
_FIELDS_OF_MODULE: dict[str, type] = {"kind": str, "config": dict}


def _check_description(said: Any, base_type: Any) -> None:
    """Raise unless a configuration describes at least one splice, in a format that this version reads."""
    if not isinstance(said, dict) or base_type is None:
        raise StreamlineError(
            "This configuration has the model type 'streamline_hooks' but neither a plan nor a base_model_type; "
            "it was not written by streamline_hooks. Load a folder that streamline_hooks saved."
        )
    _check_fields(said, _FIELDS, "the entry")
    if said["format"] > FORMAT:
        raise StreamlineError(
            f"This checkpoint has the format {said['format']}; this version of streamline_hooks reads up to "
            f"{FORMAT}. Upgrade streamline_hooks."
        )
    if said["format"] >= _WITH_DIGEST:
        _check_fields(said, {"digest": str}, "the entry")
    elif said["format"] < 1 or "digest" in said:
        raise _changed(f"'format' is {said['format']}")
    if not said["splices"]:
        raise _changed("'splices' is empty")
    for number, entry in enumerate(said["splices"]):
        where = f"splices[{number}]"
        _check_fields(entry, _FIELDS_OF_ENTRY, where)
        if not entry["modules"]:
            raise _changed(f"'modules' of {where} is empty")
        for position, module in enumerate(entry["modules"]):
            _check_fields(module, _FIELDS_OF_MODULE, f"{where}.modules[{position}]")


def _check_fields(held: Any, fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        value = held.get(name) if isinstance(held, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _changed(f"{name!r} of {where} is {value!r}, not of the type {kind.__name__}")


def _changed(what: str) -> StreamlineError:
    return StreamlineError(
        f"config.json, streamline_hooks: {what}. The file was changed since it was written, and the model would lose "
        "its repair or be another one. Restore the file, or save the model again."
    )


def _digest(said: dict[str, Any], base_type: str) -> str:
    """The digest of everything from which the splices are built."""
    described = {name: said[name] for name in ("stack", "guard", "splices")}
    text = json.dumps([base_type, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_loading(model: Any, info: dict[str, Any]) -> None:
    """Raise if the configuration has no module for a stored splice, or a splice or the guard was not loaded."""
    guard = own_path(model, model.config.streamline_hooks["guard"])
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ()]
    wrong = [
        *(key for key in info.get("unexpected_keys") or () if {BEFORE, AFTER} & set(key.split("."))),
        *(key for key in mismatched if key == guard or {BEFORE, AFTER} & set(key.split("."))),
    ]
    if wrong:
        raise _changed(f"the stored weight {min(wrong)} does not fit the model that it describes")


_made: dict[Any, Any] = {}


def streamlined_config_class(base: Any) -> Any:
    """The configuration class for a model with splices of an architecture; made once a base."""
    if base not in _made:
        members = {"__module__": __name__, "__doc__": _ConfigWithSplices.__doc__, "model_type": base.model_type}
        _made[base] = type(f"{_PREFIX}{base.__name__}", (_ConfigWithSplices, base), members)
    return _made[base]


def streamlined_model_class(base: Any, config_base: Any) -> Any:
    """The class of a model with splices of an architecture; made once a base, and known to the Auto classes."""
    key = (base, config_base)  # several types of configuration can share one class of models
    if key in _made:
        return _made[key]

    def is_custom_code(cls: Any) -> bool:
        return bool(base.is_custom_code())

    members = {
        "__module__": __name__,
        "__doc__": _ModelWithSplices.__doc__,
        "config_class": streamlined_config_class(config_base),
        "is_custom_code": classmethod(is_custom_code),  # checkpoints convert as the architecture's own do
    }
    _made[key] = type(f"{_PREFIX}{base.__name__}", (_ModelWithSplices, base), members)
    _share_weight_conversion(base, _made[key])
    return _made[key]


def base_class(cls: type[Any]) -> type[Any]:
    """The architecture's own class of a model or a configuration, with or without splices."""
    if issubclass(cls, (_ModelWithSplices, _ConfigWithSplices)):
        return next(c for c in cls.__mro__[1:] if not issubclass(c, (_ModelWithSplices, _ConfigWithSplices)))
    return cls


def _register_models(config_base: type[Any], config_class: type[Any]) -> None:
    """Register the classes with splices with every Auto class that knows the architecture."""
    for auto, base in _classes_for(config_base):
        auto.register(config_class, streamlined_model_class(base, config_base), exist_ok=True)


def _classes_for(config_base: type[Any]) -> Iterator[tuple[Any, type[Any]]]:
    """Yield the Auto classes that know an architecture, each with the class that it gives for the plain model."""
    from transformers.models.auto import modeling_auto  # every table of classes: a quarter of a second

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or config_base not in mapping:
            continue
        base = mapping[config_base]
        if isinstance(base, type):
            yield auto, base


def _can_stand_alone(config: Any) -> bool:
    """Whether the model needs only Transformers' own classes and this library's."""
    kinds = [m["kind"] for entry in config.streamline_hooks["splices"] for m in entry.get("modules", [])]
    return base_class(type(config)).__module__.startswith("transformers.") and all(map(is_own, kinds))


def _standalone_code() -> str:
    """What reads a model where the library is not installed."""
    try:
        from streamline_hooks.surgery.standalone import standalone_code
    except ModuleNotFoundError:  # this is that code
        return Path(__file__).read_text(encoding="utf-8")
    return standalone_code()


def _share_weight_conversion(base: type[Any], made: type[Any]) -> None:
    """A conversion of checkpoints that Transformers keeps by class name holds for the class with splices too."""
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return
    from transformers import conversion_mapping

    conversion = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(made.__name__, conversion, overwrite=True)


def accept_guarded(module: Any, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Let ``load_state_dict`` take a checkpoint as it lies on disk, as a ``Trainer`` does when it resumes."""
    guard = own_path(module, module.config.streamline_hooks["guard"])
    stored = state_dict.get(prefix + guard)
    if stored is not None and stored.ndim == module.get_parameter(guard).ndim + 1:
        state_dict[prefix + guard] = stored.squeeze(0)


def _set_guard_axis(model: Any, present: bool) -> None:
    """Give the guard the leading axis with which it is stored, or take it away."""
    path, _, name = own_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters[name]
    if present and getattr(held, _MARK, False):
        return  # of a model in a model, such as that of a classifier, each is built as this class says
    data = held.data.unsqueeze(0) if present else held.data.squeeze(0)
    reshaped = nn.Parameter(data, requires_grad=held.requires_grad)
    vars(reshaped).update({**vars(held), _MARK: present})
    owner._parameters[name] = reshaped
    if held.is_meta:
        _reshape_offloaded(owner, name, reshaped.ndim)


def _reshape_offloaded(owner: Any, name: str, axes: int) -> None:
    """The same where accelerate has the values, and brings them as they lie: this one is kept in memory."""
    offloaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
    if offloaded is None:
        return  # nobody has the values: the model was made without
    kept = getattr(getattr(offloaded, "dataset", None), "state_dict", None)
    if kept is None:
        raise StreamlineError(
            f"{name} of a {type(owner).__name__} is offloaded in a way that is not known here. Keep that module in "
            "memory: give it a device in the device_map."
        )
    stored = offloaded[name]
    kept[f"{offloaded.prefix}{name}"] = stored.reshape(
        (1,) * (axes - stored.ndim) + stored.shape[max(0, stored.ndim - axes) :]
    )


@contextmanager
def _guard_axis(model: Any) -> Iterator[None]:
    """Give the guard its leading axis for a while. The same parameter comes back: an optimizer may hold it."""
    path, _, name = own_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters[name]
    try:
        _set_guard_axis(model, present=True)
        yield
    finally:
        owner._parameters[name] = held
        if held.is_meta:
            _reshape_offloaded(owner, name, held.ndim)


def splice_entries(blocks: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint says of the modules that are spliced beside blocks, in the order of the blocks."""
    return [
        _entry(number, place, spliced(block, place))
        for number, block in enumerate(blocks)
        for place in (BEFORE, AFTER)
        if spliced(block, place)
    ]


def _entry(number: int, place: str, modules: tuple[nn.Module, ...]) -> dict[str, Any]:
    try:
        kinds = [dict(zip(("kind", "config"), replacement_config(module), strict=True)) for module in modules]
    except StreamlineError as error:  # in memory it works all the same; saving says what is missing
        return {"block": number, "place": place, "error": str(error)}
    return {"block": number, "place": place, "modules": kinds}


def build_splices(entry: dict[str, Any]) -> list[nn.Module]:
    """Build the modules at one place that an entry of a checkpoint describes, in the order in which they run."""
    return [build_replacement(module["kind"], module["config"]) for module in entry["modules"]]


def _entry_now(model: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as the modules are by now, which may have been changed since the surgery."""
    block = _block_of(model, entry.get("stack", model.config.streamline_hooks["stack"]), entry)
    where = {"stack": entry["stack"]} if "stack" in entry else {}
    return {**where, **_entry(entry["block"], entry["place"], spliced(block, entry["place"]))}


def _tell_of_wider_ones(model: Any) -> None:
    """Warn where loading, which gives all weights one precision, would round what is spliced in."""
    spliced_in = (p for name, p in model.named_parameters() if {BEFORE, AFTER} & set(name.split(".")))
    wider = {p.dtype for p in spliced_in if p.is_floating_point() and p.dtype.itemsize > model.dtype.itemsize}
    if wider:
        warnings.warn(
            f"What is spliced in holds {', '.join(map(str, wider))} beside the model's {model.dtype}, as which all "
            f"comes back. Load it with dtype={next(iter(wider))} to have its values.",
            stacklevel=3,
        )


def _fill_unsaved_buffers(model: Any) -> None:
    """Give spliced modules the buffers that no checkpoint holds: they are built without values."""
    said = model.config.streamline_hooks
    for entry in said["splices"]:
        block = _block_of(model, entry.get("stack", said["stack"]), entry)
        placed = spliced(block, entry["place"])
        if not any(part._non_persistent_buffers_set for module in placed for part in module.modules()):
            continue
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            built = build_splices(entry)
        for module, other in zip(placed, built, strict=True):
            for part, whole in zip(module.modules(), other.modules(), strict=True):
                for name in part._non_persistent_buffers_set:
                    held, value = part._buffers[name], whole._buffers[name]
                    if held is not None and value is not None:
                        part._buffers[name] = value.to(held.device, held.dtype)


def _block_of(model: Any, stack: str, entry: dict[str, Any]) -> nn.Module:
    """The block that has the splices of an entry of the configuration.

    Raises
    ------
    StreamlineError
        If there is no such block or place: the configuration was changed since it was written.
    """
    try:
        blocks = list(model.get_submodule(own_path(model, stack)).children())
    except AttributeError:
        blocks = []
    if entry["place"] not in (BEFORE, AFTER) or not 0 <= entry["block"] < len(blocks):
        raise StreamlineError(
            f"config.json, streamline_hooks.splices: a module {entry['place']} block {entry['block']} of {stack!r}, "
            f"which has {len(blocks)} blocks in this {type(model).__name__}. Either this class lacks that stack, or "
            "the file was changed since it was written. Load the class that was saved, or save the model again."
        )
    return blocks[entry["block"]]


def own_path(model: Any, path: str) -> str:
    """A path that was written for the model with its head, or without it, in this model, which may be the other."""
    first, _, rest = path.partition(".")
    inside = getattr(model, "base_model_prefix", "")
    if hasattr(model, first):
        return path
    return f"{inside}.{path}" if hasattr(getattr(model, inside, None), first) else rest


@contextmanager
def _reading_a_guarded_checkpoint() -> Iterator[None]:
    token = _guarded.set(True)
    try:
        yield
    finally:
        _guarded.reset(token)


def __getattr__(name: str) -> Any:
    """Find a made class by its name again, which is what unpickling asks for."""
    base: Any = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return streamlined_config_class(base)
    config_base: Any = getattr(base, "config_class", None)
    if config_base is not None:
        return streamlined_model_class(base, config_base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The class of a model whose surgery is permanent, so that saving and loading keep its splices.

A model with splices gets a class of its own, derived from its architecture's, and so does its configuration: then
``model.save_pretrained`` itself, and with it a ``Trainer``, writes a checkpoint that loads through
``AutoModelForCausalLM`` where this library is imported and fails loudly where it is not. Two things make it fail:
the ``model_type`` is unknown without this library, and one weight (the guard, the final norm's) is stored with a
leading axis of 1, so that loading with the architecture's own class raises on its size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from streamline_hooks.errors import StreamlineError
from streamline_hooks.replacements import build_replacement, replacement_config
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced

MODEL_TYPE = "streamline_hooks"
FORMAT = 1
_PREFIX = "Streamlined"
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

        said = config_dict.get("streamline_hooks")
        base_type = config_dict.get("base_model_type")
        if not isinstance(said, dict) or base_type is None:
            raise StreamlineError(
                "This configuration has the model type 'streamline_hooks' but neither a plan nor a base_model_type; "
                "it was not written by streamline_hooks. Load a folder that streamline_hooks saved."
            )
        if said.get("format", 0) > FORMAT:
            raise StreamlineError(
                f"This checkpoint has the format {said['format']}; this version of streamline_hooks reads up to "
                f"{FORMAT}. Upgrade streamline_hooks."
            )
        if base_type not in CONFIG_MAPPING:
            raise StreamlineError(
                f"This checkpoint is a compressed {base_type!r}, which the installed Transformers "
                f"{transformers.__version__} does not know. Upgrade Transformers."
            )
        config_base = CONFIG_MAPPING[base_type]
        config_class = streamlined_config_class(config_base)
        _register_models(config_base, config_class, config_dict.get("architectures") or [])
        settings = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        return config_class.from_dict(settings, **kwargs)


class _ConfigWithSplices:
    """What a configuration of a model with splices does differently: it is written under another type."""

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**written, "model_type": MODEL_TYPE, "base_model_type": type(self).model_type}


class _ModelWithSplices:
    """What a model with splices does differently: it builds them, and guards its checkpoint."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = config.streamline_hooks
        blocks = find_stack(self, _own_path(self, said["stack"])).blocks  # type: ignore[arg-type]
        for entry in said["splices"]:
            modules = [build_replacement(m["kind"], m["config"]) for m in entry["modules"]]
            set_splices(blocks[entry["block"]], entry["place"], modules)
        self.register_load_state_dict_pre_hook(_accept_guarded)  # type: ignore[attr-defined]
        if _guarded.get():
            _set_guard_axis(self, present=True)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        with _reading_a_guarded_checkpoint():
            loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _set_guard_axis(model, present=False)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        guard = _own_path(self, self.config.streamline_hooks["guard"])
        unwritable = [m for m in self.config.streamline_hooks["splices"] if "modules" not in m]
        if unwritable:
            raise StreamlineError(unwritable[0]["error"])
        weights = dict(self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        if guard in weights and weights[guard].ndim == self.get_parameter(guard).ndim:  # type: ignore[attr-defined]
            weights[guard] = weights[guard].unsqueeze(0)
        return super().save_pretrained(save_directory, *args, state_dict=weights, **kwargs)  # type: ignore[misc]


_made: dict[Any, Any] = {}


def streamlined_config_class(base: Any) -> Any:
    """The configuration class for a model with splices of an architecture; made once a base."""
    if base not in _made:
        members = {"__module__": __name__, "__doc__": _ConfigWithSplices.__doc__, "model_type": base.model_type}
        _made[base] = type(f"{_PREFIX}{base.__name__}", (_ConfigWithSplices, base), members)
    return _made[base]


def streamlined_model_class(base: Any, config_base: Any) -> Any:
    """The class of a model with splices of an architecture; made once a base, and known to the Auto classes."""
    if base in _made:
        return _made[base]

    def is_custom_code(cls: Any) -> bool:
        return bool(base.is_custom_code())

    members = {
        "__module__": __name__,
        "__doc__": _ModelWithSplices.__doc__,
        "config_class": streamlined_config_class(config_base),
        "is_custom_code": classmethod(is_custom_code),  # checkpoints convert as the architecture's own do
    }
    _made[base] = type(f"{_PREFIX}{base.__name__}", (_ModelWithSplices, base), members)
    _share_weight_conversion(base, _made[base])
    return _made[base]


def base_class(cls: type[Any]) -> type[Any]:
    """The architecture's own class of a model or a configuration, with or without splices."""
    if issubclass(cls, (_ModelWithSplices, _ConfigWithSplices)):
        return next(c for c in cls.__mro__[1:] if not issubclass(c, (_ModelWithSplices, _ConfigWithSplices)))
    return cls


def settle(model: Any, stack: BlockStack, plan: SurgeryPlan, notes: dict[str, Any]) -> None:
    """Write the plan into a model's configuration and give both the class that saves what is there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        After the surgery.
    stack : BlockStack
        Its stack as it is now.
    plan : SurgeryPlan
        What was carried out.
    notes : dict
        Further JSON values for the checkpoint: calibration fingerprint, versions.
    """
    config = model.config
    earlier = getattr(config, "streamline_hooks", None) or {}
    entries = [
        _entry(number, place, spliced(block, place))
        for number, block in enumerate(stack.blocks)
        for place in (BEFORE, AFTER)
        if spliced(block, place)
    ]
    config.streamline_hooks = {
        "format": FORMAT,
        "stack": stack.path,
        "splices": entries,
        "guard": _guard(model, stack),
        "history": [*earlier.get("history", []), {**plan.to_dict(), **notes}],
    }
    model_base, config_base = base_class(type(model)), base_class(type(config))
    if not entries:
        model.__class__, config.__class__ = model_base, config_base
        return
    config.__class__ = streamlined_config_class(config_base)
    model.__class__ = streamlined_model_class(model_base, config_base)
    if _accept_guarded not in [getattr(h, "hook", h) for h in model._load_state_dict_pre_hooks.values()]:
        model.register_load_state_dict_pre_hook(_accept_guarded)


def _register_models(config_base: type[Any], config_class: type[Any], architectures: list[str]) -> None:
    """Let those Auto classes that know the architecture know its class with splices."""
    from transformers.models.auto import modeling_auto  # every table of classes: a quarter of a second

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or config_base not in mapping:
            continue
        base = mapping[config_base]
        usual = auto in (modeling_auto.AutoModel, modeling_auto.AutoModelForCausalLM)
        if isinstance(base, type) and (usual or f"{_PREFIX}{base.__name__}" in architectures):
            auto.register(config_class, streamlined_model_class(base, config_base), exist_ok=True)


def _share_weight_conversion(base: type[Any], made: type[Any]) -> None:
    """A conversion of checkpoints that Transformers keeps by class name holds for the class with splices too."""
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return
    from transformers import conversion_mapping

    conversion = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(made.__name__, conversion, overwrite=True)


def _entry(number: int, place: str, modules: tuple[nn.Module, ...]) -> dict[str, Any]:
    try:
        kinds = [dict(zip(("kind", "config"), replacement_config(module), strict=True)) for module in modules]
    except StreamlineError as error:  # in memory it works all the same; saving says what is missing
        return {"block": number, "place": place, "error": str(error)}
    return {"block": number, "place": place, "modules": kinds}


def _guard(model: nn.Module, stack: BlockStack) -> str:
    """The weight whose stored shape keeps other classes away: the final norm's, or one outside the blocks."""
    inside = f"{stack.path}."
    outside = [(name, p) for name, p in model.named_parameters() if not name.startswith(inside)]
    order = list(stack.ancestors[-1]._modules)
    owner = stack.path.rpartition(".")[0]
    container = order.index(stack.path.rpartition(".")[2])
    after = [f"{owner}.{name}".lstrip(".") for name in order[container + 1 :]]
    for prefix in after:
        for name, parameter in outside:
            if name.startswith(f"{prefix}.") and parameter.ndim == 1:
                return name
    vectors = [name for name, parameter in outside if parameter.ndim == 1]
    return (vectors or [name for name, _ in outside])[0]


def _accept_guarded(module: Any, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Let ``load_state_dict`` take a checkpoint as it lies on disk, as a ``Trainer`` does when it resumes."""
    guard = _own_path(module, module.config.streamline_hooks["guard"])
    stored = state_dict.get(prefix + guard)
    if stored is not None and stored.ndim == module.get_parameter(guard).ndim + 1:
        state_dict[prefix + guard] = stored.squeeze(0)


def _set_guard_axis(model: Any, present: bool) -> None:
    """Give the guard the leading axis with which it is stored, or take it away."""
    path, _, name = _own_path(model, model.config.streamline_hooks["guard"]).rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters[name]
    data = held.data.unsqueeze(0) if present else held.data.squeeze(0)
    reshaped = nn.Parameter(data, requires_grad=held.requires_grad)
    vars(reshaped).update(vars(held))
    owner._parameters[name] = reshaped


def _own_path(model: Any, path: str) -> str:
    """A path that was written for the model with its head, in this model, which may be without."""
    prefix = f"{model.base_model_prefix}."
    return path if hasattr(model, prefix[:-1]) else path.removeprefix(prefix)


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

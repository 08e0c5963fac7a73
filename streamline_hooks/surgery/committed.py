"""The class of a model whose surgery is permanent, so that saving and loading keep its splices.

A model with splices gets a class of its own, derived from its architecture's, and so does its configuration: then
``model.save_pretrained`` itself, and with it a ``Trainer``, writes a checkpoint that loads through
``AutoModelForCausalLM`` where this library is imported and fails loudly where it is not. Two things make it fail:
the ``model_type`` is unknown without this library, and one weight (the guard, the final norm's) is stored with a
leading axis of 1, so that loading with the architecture's own class raises on its size.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.replacements import build_replacement, replacement_config
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.rebuild import verify_rebuild
from streamline_hooks.surgery.renumber import IndexAttribute
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced
from streamline_hooks.wrapping import refuse_adapters

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
                f"{transformers.__version__} does not know. Upgrade Transformers, or, if the architecture is your own, "
                "register it with AutoConfig and AutoModelForCausalLM first."
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

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the configuration, unless a part of the model, which does not know of the guard, is being saved."""
        architectures = getattr(self, "architectures", None) or []
        if not any(str(name).startswith(_PREFIX) for name in architectures):
            raise StreamlineError(
                f"{', '.join(architectures) or 'This part'} shares the configuration of a model with spliced modules "
                "and would be saved without them. Save the model that was committed; to commit another one, open the "
                "LayerSurgeon on it."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


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
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        with _reading_a_guarded_checkpoint():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        lost = [key for key in info["missing_keys"] if {BEFORE, AFTER} & set(key.split("."))]
        if lost:
            raise StreamlineError(
                f"The checkpoint lacks the weights of spliced modules that its configuration lists: {', '.join(lost)}. "
                "It is damaged, or was written by something else than save_pretrained; write it again."
            )
        _set_guard_axis(model, present=False)
        return (model, info) if output_loading_info else model

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


def prepare_to_settle(
    stack: BlockStack, depth: int, plan: SurgeryPlan, indices: Sequence[IndexAttribute], notes: dict[str, Any]
) -> tuple[dict[str, Any], Any, Any]:
    """Do everything of `settle` that can fail, on copies.

    Parameters
    ----------
    stack : BlockStack
        As it was before the surgery.
    depth : int
        Which of its ancestors is the model that is saved.
    plan : SurgeryPlan
        What was carried out.
    indices : sequence of IndexAttribute
        By which its blocks know their number.
    notes : dict
        Further JSON values for the checkpoint, such as the calibration data's fingerprint.

    Returns
    -------
    dict, type, type
        What the configuration will say, and the classes of the model and of its configuration.

    Raises
    ------
    UnsupportedSurgery
        If no configuration counts the blocks, or the class would build another model from it.
    StreamlineError
        If the notes are no JSON values.
    """
    model: Any = stack.ancestors[depth]
    refuse_adapters(model)
    path = ".".join(stack.path.split(".")[depth:])
    if stack.config is None:
        raise UnsupportedSurgery(
            f"{type(model).__name__} cannot be committed: nothing in its configuration counts the {plan.old_length} "
            f"blocks of {stack.path}, so that a checkpoint would not say how many are left."
        )
    try:
        notes = json.loads(json.dumps(notes))
    except (TypeError, ValueError) as error:
        raise StreamlineError(f"commit() takes JSON values to keep with the plan: {error}.") from error
    now = find_stack(model, path)
    entries = [
        _entry(number, place, spliced(block, place))
        for number, block in enumerate(now.blocks)
        for place in (BEFORE, AFTER)
        if spliced(block, place)
    ]
    earlier = getattr(model.config, "streamline_hooks", None) or {}
    said = {
        "format": FORMAT,
        "stack": path,
        "splices": entries,
        "guard": _guard(model, now),
        "history": [*earlier.get("history", []), {**notes, **plan.to_dict(), "versions": _versions()}],
    }
    model_class, config_class = base_class(type(model)), base_class(type(model.config))
    plain = copy.copy(model.config)
    plain.__class__ = config_class
    plain.streamline_hooks = said
    verify_rebuild(model, model_class, plain, path, now.blocks, indices)
    if entries:
        model_class = streamlined_model_class(model_class, config_class)
        config_class = streamlined_config_class(config_class)
    return said, model_class, config_class


def settle(
    stack: BlockStack, depth: int, plan: SurgeryPlan, indices: Sequence[IndexAttribute], notes: dict[str, Any]
) -> None:
    """Write the plan into a model's configuration and give both the class that saves what is there.

    Parameters and errors are those of `prepare_to_settle`; the model is changed when nothing can fail any more.
    """
    model: Any = stack.ancestors[depth]
    said, model_class, config_class = prepare_to_settle(stack, depth, plan, indices, notes)
    hooked = any(getattr(h, "hook", h) is _accept_guarded for h in model._load_state_dict_pre_hooks.values())
    if said["splices"] and not hooked:
        model.register_load_state_dict_pre_hook(_accept_guarded)
    model.config.streamline_hooks = said
    model.config.architectures = [model_class.__name__]
    model.config.__class__ = config_class
    model.__class__ = model_class


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("streamline_hooks", "torch", "transformers")}


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
    """The weight whose stored shape keeps other classes away: the final norm's, or another one that is not tied.

    Vectors come before matrices, those behind the blocks before those in front of them, and these before the blocks.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    owner, _, container = stack.path.rpartition(".")
    children = list(stack.ancestors[-1]._modules)
    behind = tuple(f"{owner}.{name}.".lstrip(".") for name in children[children.index(container) + 1 :])

    def rank(entry: tuple[str, nn.Parameter]) -> tuple[bool, bool, bool]:
        name, parameter = entry
        return (parameter.ndim != 1, name.startswith(f"{stack.path}."), not name.startswith(behind))

    # Loading pads and ties what belongs to the embeddings by its shape, biases of the head included.
    shaped = {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}
    free = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if owners[id(parameter)] == 1 and id(parameter) not in shaped and not {BEFORE, AFTER} & set(name.split("."))
    ]
    return min(free, key=rank)[0]


def _embeddings(model: Any) -> Iterator[nn.Module]:
    """The input embedding and the head, where the model says which they are."""
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield module


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

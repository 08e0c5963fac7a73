"""Load a compressed model and read its plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from streamline_hooks.checkpoint.custom_modules import load_module
from streamline_hooks.checkpoint.elastic import commit_depth, has_depths, load_depths
from streamline_hooks.checkpoint.pretrained import error_summary
from streamline_hooks.checkpoint.safety import CONFIG, DESCRIPTION, INDEX, WEIGHTS, check_folder
from streamline_hooks.core import StreamlineError, read_json, validate_arguments
from streamline_hooks.modeling import find_sentence_folder, load_with_pooler
from streamline_hooks.surgery import MODEL_TYPE, SurgeryPlan, surgery_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_Model = TypeVar("_Model", bound=nn.Module)


@overload
def load(
    folder: str | Path, *, into: None = None, as_original: bool = False, depth: int | None = None, **kwargs: Any
) -> PreTrainedModel: ...


@overload
def load(folder: str | Path, *, into: _Model, as_original: bool = False, **kwargs: Any) -> _Model: ...


@validate_arguments()
def load(
    folder: str | Path,
    *,
    into: nn.Module | None = None,
    as_original: bool = False,
    depth: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a compressed model.

    Parameters
    ----------
    folder : str or Path
        Folder written by `save`, ``model.save_pretrained`` or a ``Trainer``.
    into : torch.nn.Module, optional
        Required only for a model outside Transformers: its original architecture, newly built with the same settings
        and number of blocks as before the surgery. `load` removes blocks, inserts the spliced modules and loads the
        weights in their saved dtype, on the devices of the model. A model that does not fit is not changed.
    as_original : bool
        Whether to raise if the model is not of the original's class because of spliced modules; default False.
    depth : int, optional
        Number of blocks of a model that `save_elastic` wrote. The other blocks are discarded. By default the model has
        all blocks, and `at_depth` runs it with fewer.
    **kwargs
        Arguments of ``from_pretrained``; `dtype` is the saved one by default, also in Transformers 4. Code in the
        folder runs only with ``trust_remote_code=True``.

    Returns
    -------
    transformers.PreTrainedModel or torch.nn.Module
        The model, of the saved class, in evaluation mode. `read_plans` returns its surgeries.

    Raises
    ------
    StreamlineError
        If a file is missing, damaged, of another model, outside the folder, or in a format that can run code; if `into`
        is missing, not needed, or another architecture; if the model has splices and `as_original` is set; or if the
        folder has no such `depth`. The message names the file and the key.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks import LayerSurgeon, save
    >>> from streamline_hooks.testing import tiny_model
    >>> model, folder = tiny_model("llama"), tempfile.mkdtemp()
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([2, 3])
    ...     _ = surgeon.commit()
    >>> loaded = load(save(model, folder), as_original=True)
    >>> type(loaded).__name__, len(loaded.model.layers), read_plans(loaded)[0].removed
    ('LlamaForCausalLM', 6, (2, 3))

    Load a model outside Transformers into its newly built architecture:

    >>> from torch import nn
    >>> def build():
    ...     return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)
    >>> encoder, folder = build(), tempfile.mkdtemp()
    >>> with LayerSurgeon(encoder) as surgeon:
    ...     surgeon.remove([1, 2])
    ...     _ = surgeon.commit()
    >>> loaded = load(save(encoder, folder), into=build())
    >>> len(loaded.layers), read_plans(folder)[0].removed
    (2, (1, 2))
    """
    folder_path = Path(folder)
    if (folder_path / DESCRIPTION).is_file():
        refused_names = ["as_original"] * as_original + ["depth"] * (depth is not None) + list(kwargs)
        return _load_plain(folder_path, into, refused_names)
    if into is not None:
        raise StreamlineError(
            f"into= is for models outside Transformers, but {folder_path} contains no {DESCRIPTION}. A Transformers "
            "model is built from the config in its folder. Omit into."
        )
    unsupported = [name for name in ("variant", "subfolder", "gguf_file", "adapter_kwargs") if kwargs.get(name)]
    if unsupported:
        raise StreamlineError(
            f"{unsupported[0]}= would load files that are not validated. Expected a folder that `save` wrote. Omit it."
        )
    config = check_folder(folder_path, code=bool(kwargs.get("trust_remote_code")))
    if depth is not None and not has_depths(folder_path):
        raise StreamlineError(
            f"load: depth={depth} was given, but {folder_path} contains a model with one depth. Expected a folder that "
            "save_elastic wrote. Leave depth out."
        )
    model_type = config.get("model_type")
    if as_original and model_type == MODEL_TYPE:
        raise StreamlineError(
            f"{folder_path} contains a {config.get('base_model_type')} with spliced modules, which the original class "
            "does not have, so its repair would be lost. Load it without as_original, or compress the original again "
            "with a kind that results in a plain model (none, block, silenced, merged, folded, scale)."
        )
    record = config.get("streamline_hooks")
    has_splices = "base_model_type" in config or (isinstance(record, dict) and record.get("splices"))
    if model_type != MODEL_TYPE and has_splices:
        raise StreamlineError(
            f"{folder_path / CONFIG}: model_type is {model_type!r}, but with streamline_hooks.splices it must be "
            f"{MODEL_TYPE!r}. The file was changed since it was written. Restore it, or save the model again."
        )
    try:
        model, info = _from_pretrained(folder_path, **kwargs)
    except (StreamlineError, MemoryError, torch.OutOfMemoryError):  # not a problem of the folder
        raise
    except Exception as error:
        key = _mismatched(folder_path, kwargs)
        if key is None:
            raise StreamlineError(
                f"{folder_path} cannot be loaded: {error_summary(error)} Expected a folder that `save` wrote. Copy the "
                "folder again, or save the model again."
            ) from error
        raise StreamlineError(
            f"{folder_path / _file_of(folder_path, key)}, {key}: its shape differs from the one in {CONFIG}. The files "
            "belong to different models. Save the model again."
        ) from error
    unexpected = f"is not in the model that {CONFIG} describes"
    for info_key, text in (("missing_keys", "is missing"), ("unexpected_keys", unexpected)):
        if info.get(info_key):
            key = sorted(info[info_key])[0]
            raise StreamlineError(
                f"{folder_path / _file_of(folder_path, key)}, {key}: the weight {text}. The files belong to different "
                "models. Save the model again."
            )
    if find_sentence_folder(folder_path) is not None:
        model.name_or_path = str(folder_path.absolute())  # absolute, so `save` finds it from any directory
    if has_depths(folder_path):
        load_depths(model, folder_path)
        if depth is not None:
            commit_depth(model, depth)
    return model.eval()  # type: ignore[no-any-return]


@validate_arguments()
def read_plans(model: nn.Module | str | Path) -> list[SurgeryPlan]:
    """Return the plan of each surgery on a model; a plan numbers blocks as the previous surgery left them.

    Parameters
    ----------
    model : torch.nn.Module, str or Path
        A model in memory, or its folder. Only ``config.json`` or ``streamline.json`` is read.

    Raises
    ------
    StreamlineError
        If no surgery was committed to the model.
    """
    return [SurgeryPlan.from_dict(entry) for entry in read_history(model)]


def read_history(model: nn.Module | str | Path) -> list[dict[str, Any]]:
    """Return the record of each surgery: its plan, and the arguments of `LayerSurgeon.commit`."""
    if isinstance(model, (str, Path)):
        file, name = Path(model) / DESCRIPTION, str(model)
        record = read_json(file if file.is_file() else Path(model) / CONFIG).get("streamline_hooks")
    else:
        record, name = {"history": surgery_records(model)}, type(model).__name__
    history = (record or {}).get("history") or []
    if not history:
        raise StreamlineError(
            f"{name} has no record of a surgery. Expected a model changed by LayerSurgeon.commit. Pass such a model."
        )
    return [dict(entry) for entry in history]


def _load_plain(folder: Path, into: nn.Module | None, others: list[str]) -> nn.Module:
    """Load a model outside Transformers; `others` are given arguments that only Transformers models accept."""
    if (folder / CONFIG).exists():
        raise StreamlineError(
            f"{folder} contains both {CONFIG} (of a Transformers model) and {DESCRIPTION} (of another model). Expected "
            "one of them. Delete the wrong one."
        )
    if into is None:
        name = read_json(folder / DESCRIPTION).get("class", "model outside Transformers")
        raise StreamlineError(
            f"{folder} contains a {name}, which has no config to build it from. Build the original architecture with "
            "as many blocks as before the surgery, and call load(folder, into=model)."
        )
    if others:
        raise StreamlineError(
            f"{others[0]} is for Transformers models, but {folder} contains another model. Omit it: dtype and weights "
            "are those that were saved, the device is that of `into`."
        )
    return load_module(folder, into)


def _from_pretrained(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Load the saved class only from safetensors in this folder; return the model and the loading info."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    trust_code = bool(kwargs.get("trust_remote_code"))
    saved_class = (read_json(folder / CONFIG).get("architectures") or [""])[0]
    config = type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_code, local_files_only=True))
    auto_class = default = modeling_auto.AutoModelForCausalLM
    for auto in (default, *vars(modeling_auto).values()):
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and config in mapping and getattr(mapping[config], "__name__", "") == saved_class:
            auto_class = auto
            break
    if "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", "auto")  # the default of Transformers 5; 4 would load float32
    return load_with_pooler(auto_class, folder, use_safetensors=True, local_files_only=True, **kwargs)


def _mismatched(folder: Path, kwargs: dict[str, Any]) -> str | None:
    """Return a weight whose shape differs from the config, if that is why loading failed."""
    try:
        _, info = _from_pretrained(folder, ignore_mismatched_sizes=True, **kwargs)
    except (StreamlineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # not a matter of shapes: the caller reports the first error
        return None
    keys = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ())
    return str(keys[0]) if keys else None


def _file_of(folder: Path, key: str) -> str:
    """Return the name of the file of a weight; for an unknown key the index file."""
    if not (folder / INDEX).is_file():
        return WEIGHTS
    return str(read_json(folder / INDEX)["weight_map"].get(key, INDEX))

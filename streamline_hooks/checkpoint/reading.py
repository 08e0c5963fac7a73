"""Read a compressed model back, and only what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.checkpoint.plain_reading import load_into
from streamline_hooks.checkpoint.safety import CONFIG, INDEX, PLAIN, WEIGHTS, check_folder, read_json
from streamline_hooks.errors import StreamlineError
from streamline_hooks.pooling_layer import load_as_pooled
from streamline_hooks.pretrained import reason_of
from streamline_hooks.sentence_folder import find_sentence_folder
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.surgery.plain_module import history_of
from streamline_hooks.surgery.spliced_model import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_Model = TypeVar("_Model", bound=nn.Module)


@overload
def load(folder: str | Path, *, into: None = None, as_original: bool = False, **kwargs: Any) -> PreTrainedModel: ...


@overload
def load(folder: str | Path, *, into: _Model, as_original: bool = False, **kwargs: Any) -> _Model: ...


@checked()
def load(folder: str | Path, *, into: nn.Module | None = None, as_original: bool = False, **kwargs: Any) -> nn.Module:
    """Read a compressed model.

    Parameters
    ----------
    folder : str or Path
        As `save`, ``model.save_pretrained`` or a ``Trainer`` wrote it.
    into : torch.nn.Module, optional
        For a model that is no Transformers model, and for no other: the original architecture, built anew with the
        settings and the number of blocks that it had before the surgery. It is shortened, given the spliced modules
        and the weights, and returned, on the devices where it is and in the precision that was saved. One that does not
        fit is left as it was.
    as_original : bool
        Only as a model of the original's own class, which has nothing of this library; a model with spliced modules,
        which would lose its repair that way, is refused.
    **kwargs
        For ``from_pretrained``. Code in the folder is run only with ``trust_remote_code=True``.

    Returns
    -------
    transformers.PreTrainedModel or torch.nn.Module
        In evaluation mode, of the class that was saved. `read_plans` says what was done to it.

    Raises
    ------
    StreamlineError
        If `into` is missing or is given for a Transformers model; if it is of another class, has another number of
        blocks, other settings or other weights than the one that was saved asks for; if there is no model in the
        folder; if a file is missing, damaged, of another model, or of a format that can run code; if weights are not
        those that `save` wrote; if something in the folder names what is outside; or if the model has splices and was
        asked for `as_original`. The text names the file and, where there is one, the key.

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

    What is no Transformers model is put into its architecture, built anew:

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
    where = Path(folder)
    if (where / PLAIN).is_file():
        return _load_plain(where, into, ["as_original"] * as_original + list(kwargs))
    if into is not None:
        raise StreamlineError(
            f"into= is for models that are no Transformers model, whose folder holds a {PLAIN}; {where} holds none. "
            "What a Transformers model is built as is in its folder: leave into= out."
        )
    elsewhere = [name for name in ("variant", "subfolder", "gguf_file", "adapter_kwargs") if kwargs.get(name)]
    if elsewhere:
        raise StreamlineError(f"{elsewhere[0]} would load other files than those that are looked at; leave it out.")
    config = check_folder(where, code=bool(kwargs.get("trust_remote_code")))
    if as_original and config.get("model_type") == MODEL_TYPE:
        raise StreamlineError(
            f"{where} holds a {config.get('base_model_type')} with spliced modules, which its own class cannot hold: "
            "as the original it would lose its repair. Load it without as_original, or compress the original again "
            "with a kind that leaves a plain model (none, block, silenced, merged, folded, scale)."
        )
    if config.get("model_type") != MODEL_TYPE and _has_splices(config):
        raise StreamlineError(
            f"{where / CONFIG}: model_type is {config.get('model_type')!r} beside streamline_hooks.splices, which asks "
            f"for {MODEL_TYPE!r}. The file was changed since it was written; restore it, or save the model again."
        )
    try:
        model, info = _from_pretrained(where, **kwargs)
    except (StreamlineError, MemoryError, torch.OutOfMemoryError):  # says nothing about the folder
        raise
    except Exception as error:
        key = _mismatched(where, kwargs)
        if key is None:
            raise StreamlineError(
                f"{where} cannot be loaded: {reason_of(error)} Expected what `save` wrote. Copy the folder again, or "
                "save the model again."
            ) from error
        raise StreamlineError(
            f"{where / _file_of(where, key)}, {key}: its shape is not the one that {CONFIG} asks for. The two are of "
            "different models; save the model again."
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if info.get(what):
            key = sorted(info[what])[0]
            said = "is missing" if what == "missing_keys" else f"has no place in the model that {CONFIG} asks for"
            raise StreamlineError(
                f"{where / _file_of(where, key)}, {key}: the weight {said}. The two are of different models; save the "
                "model again."
            )
    if find_sentence_folder(where) is not None:
        model.name_or_path = str(where.absolute())  # where `save` finds it after a change of directory too
    return model.eval()  # type: ignore[no-any-return]


@checked()
def read_plans(model: nn.Module | str | Path) -> list[SurgeryPlan]:
    """Return the plans of the surgeries that a model had, each in the numbering that the one before left.

    Parameters
    ----------
    model : torch.nn.Module, str or Path
        A model in memory, or its folder, of which only ``config.json`` or ``streamline.json`` is read.

    Raises
    ------
    StreamlineError
        If no surgery was committed to it.
    """
    return [SurgeryPlan.from_dict(entry) for entry in read_history(model)]


def read_history(model: nn.Module | str | Path) -> list[dict[str, Any]]:
    """Return what was recorded of each surgery that a model had: its plan, and what `LayerSurgeon.commit` was given.

    Parameters
    ----------
    model : torch.nn.Module, str or Path
        As for `read_plans`.

    Raises
    ------
    StreamlineError
        If no surgery was committed to it.
    """
    if isinstance(model, (str, Path)):
        file, name = Path(model) / PLAIN, str(model)
        said = read_json(file if file.is_file() else Path(model) / CONFIG).get("streamline_hooks")
    else:
        said, name = getattr(getattr(model, "config", None), "streamline_hooks", None), type(model).__name__
        said = {"history": history_of(model)} if history_of(model) else said
    history = (said or {}).get("history") or []
    if not history:
        raise StreamlineError(f"{name} says of no surgery; only what LayerSurgeon.commit changed has a plan.")
    return [dict(entry) for entry in history]


def _load_plain(folder: Path, into: nn.Module | None, others: list[str]) -> nn.Module:
    """What is no Transformers model, put into the architecture that the caller has built."""
    if (folder / CONFIG).exists():
        raise StreamlineError(
            f"{folder} holds {CONFIG} and {PLAIN} both, of a Transformers model and of another one. Delete the one "
            "that is not meant."
        )
    if into is None:
        name = read_json(folder / PLAIN).get("class", "model that is no Transformers model")
        raise StreamlineError(
            f"{folder} holds a {name}, which has no configuration that it could be built from. Build the original "
            "architecture anew, with as many blocks as it had before the surgery, and give it: "
            "load(folder, into=model)."
        )
    if others:
        raise StreamlineError(
            f"{others[0]} is for Transformers models, and {folder} holds another one. Leave it out: precision and "
            "weights are those that were saved, the device is that of the model given as into=."
        )
    return load_into(folder, into)


def _from_pretrained(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The model, from safetensors in this folder alone, and which weights it lacks or has too many."""
    automatic = _auto_class(folder, bool(kwargs.get("trust_remote_code")))
    return load_as_pooled(automatic, folder, use_safetensors=True, local_files_only=True, **kwargs)


def _auto_class(folder: Path, code: bool) -> Any:
    """The Auto class that gives the class that was saved."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    usual = modeling_auto.AutoModelForCausalLM
    saved = (read_json(folder / CONFIG).get("architectures") or [""])[0]
    config = type(AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True))
    for auto in (usual, *vars(modeling_auto).values()):
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and config in mapping and getattr(mapping[config], "__name__", "") == saved:
            return auto
    return usual


def _has_splices(config: dict[str, Any]) -> bool:
    said = config.get("streamline_hooks")
    return "base_model_type" in config or bool(isinstance(said, dict) and said.get("splices"))


def _mismatched(folder: Path, kwargs: dict[str, Any]) -> str | None:
    """A weight whose shape is not the model's, if that is what keeps it from being loaded."""
    try:
        _, info = _from_pretrained(folder, ignore_mismatched_sizes=True, **kwargs)
    except (StreamlineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # not a matter of sizes: the caller reports its own error, which is the first
        return None
    found = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys") or ())
    return str(found[0]) if found else None


def _file_of(folder: Path, key: str) -> str:
    """The file that a weight is in, or would be."""
    if not (folder / INDEX).is_file():
        return WEIGHTS
    return str(read_json(folder / INDEX)["weight_map"].get(key, INDEX))

"""Save a compressed model to a folder atomically; files that this library did not write are never deleted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from streamline_hooks.checkpoint.card import CARD as CARD
from streamline_hooks.checkpoint.card import model_card
from streamline_hooks.checkpoint.custom_modules import write_module
from streamline_hooks.checkpoint.safety import CHECKSUMS as CHECKSUMS
from streamline_hooks.checkpoint.safety import CONFIG, DESCRIPTION, PICKLES, write_checksums
from streamline_hooks.core import (
    StreamlineError,
    atomic_folder,
    check_writable,
    has_unmapped_offload,
    load_offloaded_weights,
    read_json,
    refuse_adapters,
    validate_arguments,
    warn_caller,
)
from streamline_hooks.evaluation import drop_outdated_guarantees
from streamline_hooks.modeling import restore_4_bit_layout, saves_itself, sentence_folder_of
from streamline_hooks.surgery import is_elastic, is_splice_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT = "report.json"
# Names of files that `save`, tokenizers, processors and `write_report` write. The checksums list further files.
_NAMES = frozenset(
    {
        CHECKSUMS, CARD, CONFIG, DESCRIPTION, "generation_config.json", "report.json", "report.html", "evaluation.json",
        "measured.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json",
    }
)  # fmt: skip
_PATTERNS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(additional_)?chat_templates/[^/]+\.jinja"
)


@validate_arguments()
def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    base_model: str = "",
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a model, its tokenizer, a model card, checksums and a report.

    The content is written to a new folder, which is renamed at the end. An interruption or a full disk therefore leaves
    the previous content unchanged. Files of sentence-transformers (``modules.json``, ``1_Pooling``, ...) are copied
    from the original model, so the result uses the same pooling.

    Parameters
    ----------
    model : torch.nn.Module
        Model after `LayerSurgeon.commit`. A Transformers model without splices becomes a plain checkpoint of its
        architecture. With splices, the checkpoint loads through ``AutoModelForCausalLM`` if this library is imported,
        and loading fails otherwise. For any other model (timm, torchvision, custom) weights, buffers and a
        ``streamline.json`` are saved; ``load(folder, into=model)`` loads them into the original architecture.
    folder : str or Path
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    report : dict, optional
        Report, saved as ``report.json`` and summarized in the card.
    base_model : str
        Name of the original model on the hub, for the card; by default the name it was loaded by, or its class name.
    overwrite : bool
        Replace a folder that `save` wrote, such as the one the model was loaded from; default False. The working
        directory, and a folder with any other file, are never replaced.
    max_shard_size : int or str, optional
        Maximum size of a weights file of a Transformers model, such as ``"2GB"``; by default that of Transformers. With
        weights on disk by ``device_map``, the weights of one file are in memory at a time; with other offloading of
        Accelerate, all weights are.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the folder may not be replaced or cannot be written, a surgeon is still open on the model, its config
        describes weights that it does not have, it has PEFT adapters, or the sentence-transformers folder of the
        original is damaged. For a model outside Transformers, also if no surgery was committed to it, its blocks were
        changed afterwards, or safetensors cannot store its state (extra state, quantized or overlapping weights).

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model, folder = tiny_model("llama"), tempfile.mkdtemp()
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove([2, 3])
    ...     _ = surgeon.commit()
    >>> sorted(path.name for path in save(model, folder).iterdir())
    ['README.md', 'SHA256SUMS', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    target = Path(folder).resolve()
    writer: Any = model if saves_itself(model) else None
    if writer is None and max_shard_size is not None:
        raise StreamlineError(
            f"max_shard_size={max_shard_size!r} is for Transformers models, but the weights of a "
            f"{type(model).__name__} are written to one file. Omit it."
        )
    refuse_adapters(model, "saved")
    restore_4_bit_layout(model)
    check_not_source(model, target)
    warn_of_depths(model)
    drop_outdated_guarantees(model)
    sentence_folder = sentence_folder_of(model)
    with atomic_checkpoint(target, overwrite) as new_folder:
        if writer is not None:
            options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            if has_unmapped_offload(model):
                options["state_dict"] = load_offloaded_weights(model)
            writer.save_pretrained(new_folder, **options)
            require_complete(writer, new_folder)
            config = read_json(new_folder / CONFIG)
        else:
            config = write_module(model, new_folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(new_folder)
        if sentence_folder is not None:
            sentence_folder.copy_to(new_folder)
        if report is not None:
            (new_folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (new_folder / CARD).write_text(model_card(config, report, base_model), encoding="utf-8")
        write_checksums(new_folder)
    return target


def require_complete(model: Any, folder: Path) -> None:
    """Raise unless a folder has the weights that its config describes; warn if loading narrows or refuses weights.

    The model is built on the meta device, so that no weight is read. Quantized weights are not compared, and neither
    are modules that the model was built without, such as a pooler.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    try:
        with _quiet_transformers():
            described, info = type(model).from_pretrained(
                folder,
                # Transformers 4 reads nested settings of the same model type instead if it reads the file.
                config=type(model.config).from_dict(read_json(folder / CONFIG)),
                device_map="meta",
                dtype="auto",
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
                use_kernels=False,  # kernels of the hub, the default of Transformers 5.25, refuse the meta device
                output_loading_info=True,
            )
    except TypeError:  # a class whose constructor needs more than a config
        return
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    missing = [key for key in info["missing_keys"] if not _is_built_without(model, key)]
    if keys := sorted({*missing, *mismatched}):
        raise StreamlineError(
            f"{len(keys)} weights that the config describes are missing in this {type(model).__name__} or have another "
            f"shape, such as {keys[0]}. Expected the weights of the config. Remove blocks by LayerSurgeon instead of "
            "changing the module list, and set config.tie_word_embeddings if the head shares the embedding."
        )
    if info["unexpected_keys"]:
        warn_caller(
            f"The config of this {type(model).__name__} does not describe all of its weights, such as "
            f"{min(info['unexpected_keys'])}. They are saved, but `load` will refuse the folder. Remove these modules "
            "before saving, or load them with your own code."
        )
    loaded = dict(described.named_parameters())
    narrowed = [
        f"{name} ({parameter.dtype})"
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.dtype.itemsize > loaded.get(name, parameter).dtype.itemsize
        and not is_splice_parameter(name)  # warned about by the model itself
    ]
    if narrowed:
        warn_caller(
            f"Not all weights of this {type(model).__name__} have the dtype of the model: {narrowed[0]} is the first "
            f"of {len(narrowed)}. Loading casts them to {described.dtype}. Load with dtype=torch.float32 to keep their "
            "values."
        )


def _is_built_without(model: nn.Module, key: str) -> bool:
    """Whether a model lacks the module of a weight, other than an entry of a list."""
    module = model
    for name in key.split(".")[:-1]:
        if module._modules.get(name) is None:
            return not isinstance(module, (nn.ModuleList, nn.Sequential))
        module = cast("nn.Module", module._modules[name])
    return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide messages and progress bars of Transformers, for the duration of the context."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def warn_of_depths(model: nn.Module) -> None:
    """Warn if a model has several depths, of which a checkpoint with one depth contains the largest only."""
    if is_elastic(model):
        warn_caller(
            f"The other depths of this {type(model).__name__} are not saved, and their replacements are lost with the "
            "model in memory. Use save_elastic to save all depths."
        )


@contextmanager
def atomic_checkpoint(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that replaces the target unless an exception is raised; see `check_output_folder`."""
    check_output_folder(target, overwrite)
    with atomic_folder(target, overwrite=overwrite, is_disposable=lambda old: not foreign_files(old)) as new_folder:
        yield new_folder


def check_output_folder(folder: str | Path, overwrite: bool = False) -> None:
    """Raise unless `save` may write to a folder; call it before a long computation.

    Parameters
    ----------
    folder : str or Path
    overwrite : bool
        Whether a folder that contains only files written by `save` may be replaced; default False.

    Raises
    ------
    StreamlineError
        If the path is a file, a mount point, a folder that is not empty and may not be replaced, or not writable.
    """
    target = Path(folder).resolve()
    if os.path.isdir(target) and target.is_mount():
        raise StreamlineError(f"{target} is a mount point, which cannot be replaced. Choose a folder below it.")
    if os.path.isdir(target) and any(target.iterdir()):
        if _contains_working_directory(target):
            raise StreamlineError(
                f"{target} is the working directory or contains it, so it is not replaced. Choose another folder."
            )
        if not overwrite:
            raise StreamlineError(
                f"{target} is not empty. Choose another folder, or pass --overwrite (overwrite=True)."
            )
        if foreign := foreign_files(target):
            raise StreamlineError(
                f"{target} contains files that `save` did not write: "
                f"{', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}. Only a folder that `save` wrote is replaced. "
                "Move these files, or choose another folder."
            )
    check_writable(target, folder=True)


def _contains_working_directory(folder: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # deleted working directory
        return False
    return any(os.path.samefile(folder, parent) for parent in (here, *here.parents))


def check_not_source(model: nn.Module, target: Path) -> None:
    """Raise if offloaded weights of the model are read from the folder that would be replaced."""
    source = str(getattr(model, "name_or_path", ""))
    is_source = os.path.isdir(source) and os.path.isdir(target) and os.path.samefile(source, target)
    if is_source and any(tensor.is_meta for tensor in model.state_dict().values()):
        raise StreamlineError(
            f"{target} contains weights of this {type(model).__name__} that are not in memory and are read from there. "
            "Choose another folder, or load the model into memory."
        )


def foreign_files(folder: Path) -> list[str]:
    """Return relative paths of the first files in a folder that `save` did not write.

    Symbolic links and empty or unreadable sub-folders are foreign. All files are foreign unless `is_checkpoint`.
    """
    listed = _listed_files(folder) if is_checkpoint(folder) else None
    foreign: list[str] = []
    for path, folders, files in os.walk(folder, onerror=lambda error: foreign.append(str(error.filename))):
        folders.sort()
        here = Path(path).relative_to(folder)
        links = [name for name in folders if Path(path, name).is_symlink()]
        if not files and not folders and Path(path) != folder:
            foreign.append(f"{here.as_posix()}/")
        for name in sorted([*files, *links]):
            relative = (here / name).as_posix()
            if listed is None or not _is_known(relative, listed) or Path(path, name).is_symlink():
                foreign.append(relative)
        if len(foreign) > 3:  # enough for an error message
            break
    return foreign


def saved_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the relative paths of a checkpoint's files that this library wrote, and of all other files.

    Pickles, such as optimizer states, and files in hidden folders always belong to the other files.
    """
    listed = _listed_files(folder)
    saved: list[str] = []
    others: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        # Pages embed their figures; a folder `figures` may contain other files, which the checksums list too.
        is_refused = path.is_symlink() or path.suffix in PICKLES or name.startswith((".", "figures/")) or "/." in name
        (others if is_refused or not _is_known(name, listed) else saved).append(name)
    return saved, others


def _is_known(name: str, listed: set[str]) -> bool:
    """Whether this library writes files of this name, or the checksums list it."""
    return name in _NAMES or name in listed or _PATTERNS.fullmatch(name) is not None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has checksums, and a config, ``streamline.json`` or card that mentions this library."""
    if not (folder / CHECKSUMS).is_file():
        return False
    for name in (CONFIG, DESCRIPTION):
        with suppress(StreamlineError):
            if "streamline_hooks" in read_json(folder / name):
                return True
    header = _text(folder / CARD).split("\n---", 1)[0]
    return header.startswith("---") and "\n- streamline_hooks" in header


def _listed_files(folder: Path) -> set[str]:
    entries = [line.split(maxsplit=1) for line in _text(folder / CHECKSUMS).splitlines()]
    return {entry[1] for entry in entries if len(entry) == 2}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""

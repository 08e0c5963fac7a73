"""Write a compressed model to a folder, which is whole or untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.checkpoint.card import FILE as CARD
from streamline_hooks.checkpoint.card import model_card
from streamline_hooks.checkpoint.checksums import write_checksums
from streamline_hooks.checkpoint.ownership import foreign_files
from streamline_hooks.checkpoint.plain_writing import write_plain
from streamline_hooks.checkpoint.safety import CONFIG, read_json
from streamline_hooks.core.files import atomic_folder, check_writable
from streamline_hooks.errors import StreamlineError
from streamline_hooks.offload import brought, held_elsewhere
from streamline_hooks.sentence_folder import sentence_folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT = "report.json"


@checked()
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
    """Write a model, its tokenizer, a model card, checksums and a report.

    Everything is written to a new folder beside `folder` and renamed at the end, so that an interruption or a full
    disk leaves what was there before. Of a model that was loaded from a folder of sentence-transformers, its modules
    (``modules.json``, ``1_Pooling`` and all others that it names) are copied, so that the result pools as before.

    Parameters
    ----------
    model : torch.nn.Module
        After `LayerSurgeon.commit`. A Transformers model becomes a plain checkpoint of its architecture where it has no
        splices; with splices one that loads through ``AutoModelForCausalLM`` where this library is imported, and fails
        loudly elsewhere. Of any other model (timm's, torchvision's, your own) the weights are written, the buffers
        that are not persistent among them, and a ``streamline.json`` with what was done; `load` puts them into the
        original architecture, which you build: ``load(folder, into=model)``.
    folder : str or Path
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    report : dict, optional
        Written as ``report.json``, and told in the card.
    base_model : str
        What the card names as the original: its name on the hub, by default the one that it was loaded by, or the
        name of its class.
    overwrite : bool
        Replace a folder that `save` wrote, which may be the one that the model was loaded from. A folder with any file
        that `save` did not write is refused, and so is the working directory.
    max_shard_size : int or str, optional
        Of a file of weights, such as ``"2GB"``, of a Transformers model; by default Transformers' own. Of one whose
        ``device_map`` has weights on disk no more than one file's are in memory at a time; of one that accelerate
        offloads without such a map all are.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the folder is not empty and may not be replaced, if it cannot be written, if a surgeon is still open on the
        model, or if the folder of sentence-transformers that it was loaded from is damaged or has it in a sub-folder.
        Of a model that is no Transformers model also if no surgery was committed to it, or one to a part of it alone;
        if something else has changed its blocks since; or if something of it has no place in safetensors (extra state
        that is no tensor, quantised weights, weights that overlap).
    """
    target = Path(folder).resolve()
    own: Any = getattr(model, "save_pretrained", None)
    if not callable(own) and max_shard_size is not None:
        raise StreamlineError(
            f"max_shard_size={max_shard_size!r} is for Transformers models; the weights of a {type(model).__name__} "
            "are written to one file. Leave it out."
        )
    _require_not_read(model, target)
    sentence = sentence_folder_of(model)
    with whole_folder(target, overwrite) as beside:
        if callable(own):
            options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            if held_elsewhere(model):
                options["state_dict"] = brought(model)
            own(beside, **options)
            said = read_json(beside / CONFIG)
        else:
            said = write_plain(model, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if sentence is not None:
            sentence.copy_to(beside)
        if report is not None:
            (beside / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (beside / CARD).write_text(model_card(said, report, base_model), encoding="utf-8")
        write_checksums(beside)
    return target


@contextmanager
def whole_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to, which takes the place of the one that is named if all goes well.

    Raises
    ------
    StreamlineError
        If the place is not free, see `require_free`, or writing fails.
    """
    require_free(target, overwrite)
    with atomic_folder(target, overwrite=overwrite, is_disposable=lambda old: not foreign_files(old)) as new:
        yield new


def require_free(folder: str | Path, overwrite: bool = False) -> None:
    """Raise unless a model may be written to a folder; to be asked before hours of work.

    Parameters
    ----------
    folder : str or Path
    overwrite : bool
        Whether a folder that `save` wrote, and to which nothing was added since, is replaced.

    Raises
    ------
    StreamlineError
        If it is a file, a mount point, or not empty and not to be replaced; or if nothing can be written there.
    """
    target = Path(folder).resolve()
    if os.path.exists(target) and not os.path.isdir(target):
        raise StreamlineError(f"{target} is a file; give a folder to write the model to.")
    if os.path.isdir(target) and target.is_mount():
        raise StreamlineError(f"{target} is where a disk is mounted and cannot be replaced; give a folder below it.")
    if os.path.isdir(target) and any(target.iterdir()):
        if _contains_working_directory(target):
            raise StreamlineError(
                f"{target} is the working directory or contains it, and is not replaced. Choose another folder."
            )
        if not overwrite:
            raise StreamlineError(
                f"{target} is not empty. Choose another folder, or pass --overwrite (overwrite=True)."
            )
        if foreign := foreign_files(target):
            raise StreamlineError(
                f"{target} contains what `save` did not write: {', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}. "
                "Only a folder that `save` wrote is replaced. Move these files elsewhere, or choose another folder."
            )
    check_writable(target, folder=True)


def _contains_working_directory(folder: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        return False
    return any(os.path.samefile(folder, parent) for parent in (here, *here.parents))


def _require_not_read(model: nn.Module, target: Path) -> None:
    """Raise if the weights of a model are still read from the folder that would be replaced."""
    source = str(getattr(model, "name_or_path", ""))
    if not source or not os.path.isdir(source) or not os.path.isdir(target) or not os.path.samefile(source, target):
        return
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise StreamlineError(
            f"{target} holds the weights of this {type(model).__name__}, some of which are not in memory and are read "
            "from there. Choose another folder, or load the model into memory."
        )

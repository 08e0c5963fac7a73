"""A model as a plain checkpoint of its architecture, with no trace of this library; or why it cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint.writing import whole_folder
from streamline_hooks.errors import StreamlineError
from streamline_hooks.sentence_folder import sentence_folder_of
from streamline_hooks.stack import find_stacks
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_plain(model: PreTrainedModel) -> None:
    """Raise unless a model is of its architecture's own class, without splices.

    Raises
    ------
    StreamlineError
        The text says what can be done instead, and what that costs.
    """
    found = [
        (stack.parameters_per_block[0], several)
        for stack in find_stacks(model)
        for block in stack.blocks
        for place in (BEFORE, AFTER)
        if (several := spliced(block, place))
    ]
    if not found:
        return
    modules = [module for _, several in found for module in several]
    added = sum(p.numel() for module in modules for p in module.parameters())
    blocks, windows = sum(size for size, _ in found), len(found)
    names = ", ".join(sorted({type(module).__name__ for module in modules}))
    raise StreamlineError(
        f"No plain form of this {type(model).__name__} exists: its {names} runs between two blocks, for which its "
        f"architecture has no place. Its window can be fitted again from the original and the same text "
        f"(`streamline-hooks export ... --refit folded --original MODEL`), as one of two kinds that are plain: "
        f"folded, into the block before the window, {_signed(-added)} parameters and no cache slot, weaker than a "
        f"linear map; or silenced, a block without attention in its place, {_signed(blocks - added)} "
        f"parameters and {windows} cache slot{'s' * (windows > 1)} more. What each costs in quality is measured when "
        "it is made."
    )


def _signed(parameters: int) -> str:
    return f"{parameters / 1e6:+.2f} M"


def export_plain(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a plain checkpoint whose configuration says nothing of this library.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is left as it is.
    folder : str or Path
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    overwrite : bool
        Replace a folder that `save` wrote, see there; any other one that is not empty is refused.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the model has splices, see `require_plain`, or the folder is not free.
    """
    require_plain(model)
    target, sentence = Path(folder).resolve(), sentence_folder_of(model)
    said: Any = vars(model.config).pop("streamline_hooks", None)
    try:
        with whole_folder(target, overwrite) as beside:
            model.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            if sentence is not None:
                sentence.copy_to(beside)
    finally:
        if said is not None:
            model.config.streamline_hooks = said
    return target

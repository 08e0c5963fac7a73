"""Export a plain checkpoint of the architecture, without any trace of this library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.checkpoint.save import atomic_checkpoint, check_not_source, require_complete, warn_of_depths
from streamline_hooks.core import StreamlineError, refuse_adapters
from streamline_hooks.modeling import find_stacks, restore_4_bit_layout, sentence_folder_of
from streamline_hooks.surgery import AFTER, BEFORE, find_prompt_skip, spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_no_splices(model: PreTrainedModel) -> None:
    """Raise if a model has splices; the error names plain alternatives and their sizes."""
    check_no_prompt_skip(model)
    splices = [
        (stack.parameters_per_block[0], modules_at)
        for stack in find_stacks(model)
        for block in stack.blocks
        for position in (BEFORE, AFTER)
        if (modules_at := spliced(block, position))
    ]
    if not splices:
        return
    modules = [module for _, modules_at in splices for module in modules_at]
    added = sum(p.numel() for module in modules for p in module.parameters())
    blocks, windows = sum(size for size, _ in splices), len(splices)
    names = ", ".join(sorted({type(module).__name__ for module in modules}))
    raise StreamlineError(
        f"This {type(model).__name__} has no plain form: its {names} runs between two blocks, which its architecture "
        "does not support. Expected a model without splices. Fit the window again with a plain kind from the original "
        "and the same data: `streamline-hooks export ... --refit --original MODEL`. It uses the first of two kinds "
        f"that works. folded: a map in the block before the window, {-added:+,} parameters, no cache slot, "
        f"weaker than a linear map. silenced: a block without attention, {blocks - added:+,} parameters, "
        f"{windows} more cache slot{'s' * (windows > 1)}. The quality of the result is measured."
    )


def check_no_prompt_skip(model: PreTrainedModel) -> None:
    """Raise if the prompts of a model skip blocks, which no exported format describes."""
    committed = "prompt_skip" in (getattr(model.config, "streamline_hooks", None) or ())
    if committed or find_prompt_skip(model) is not None:
        raise StreamlineError(
            f"The prompts of this {type(model).__name__} skip blocks, and the exported model would not. Expected a "
            "model without a PromptSkip. Export the original, whose other weights are the same."
        )


def export_plain(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a plain checkpoint whose config does not mention this library.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model without splices. It is not changed.
    folder : str or Path
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    overwrite : bool
        Replace a folder that `save` wrote; default False.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the model has splices, PEFT adapters, or other weights than its config describes, or the folder may not be
        replaced or has weights of the model that are not in memory.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = export_plain(tiny_model("llama"), tempfile.mkdtemp())
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    return write_plain(model, folder, tokenizer, overwrite)


def write_plain(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    adapt: Callable[[Path], None] | None = None,
) -> Path:
    """Write a plain checkpoint, and call `adapt` with its folder before the folder gets its name."""
    target = Path(folder).resolve()
    refuse_adapters(model, "exported")
    check_no_splices(model)
    restore_4_bit_layout(model)
    check_not_source(model, target)
    warn_of_depths(model)
    sentence_folder = sentence_folder_of(model)
    record: Any = vars(model.config).pop("streamline_hooks", None)
    try:
        with atomic_checkpoint(target, overwrite) as new_folder:
            model.save_pretrained(new_folder)
            require_complete(model, new_folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(new_folder)
            if sentence_folder is not None:
                sentence_folder.copy_to(new_folder)
            if adapt is not None:
                adapt(new_folder)
    finally:
        if record is not None:
            model.config.streamline_hooks = record
    return target

"""Save one model with several depths: its weights once, unchanged, and the replacements of each depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamline_hooks.checkpoint.card import CARD, model_card
from streamline_hooks.checkpoint.safety import CONFIG, write_checksums
from streamline_hooks.checkpoint.save import atomic_checkpoint, check_not_source
from streamline_hooks.core import (
    StreamlineError,
    describe_blocks,
    has_unmapped_offload,
    load_offloaded_weights,
    read_json,
    refuse_adapters,
    validate_arguments,
)
from streamline_hooks.evaluation import drop_outdated_guarantees
from streamline_hooks.modeling import find_stack, restore_4_bit_layout
from streamline_hooks.replacements import build_replacement, replacement_config
from streamline_hooks.surgery import (
    DepthCut,
    DepthCuts,
    LayerSurgeon,
    attach_depths,
    base_class,
    depth_cuts_of,
    depths_of,
    refuse_open_surgery,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# In a sub-folder, because some engines load all safetensors files of a folder.
_FOLDER, _DESCRIPTION, _WEIGHTS, _FORMAT = "depths", "depths.json", "replacements.safetensors", 1


@validate_arguments()
def save_elastic(
    model: PreTrainedModel,
    folder: str | Path,
    depths: Sequence[int] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a model that runs at several depths.

    The folder is a plain checkpoint of the model at full depth, which every program loads as the original, and a
    sub-folder ``depths`` with the replacements. ``load(folder)`` returns the model with all depths for `at_depth`, and
    ``load(folder, depth=22)`` a model with 22 blocks. Like `save`, it writes to a new folder, which is renamed at the
    end.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with several depths, see `fit_depths`.
    folder : str or Path
    depths : sequence of int, optional
        The depths to save; by default all.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    overwrite : bool
        Replace a folder that this library wrote; default False.
    max_shard_size : int or str, optional
        See `save`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    StreamlineError
        If the model has one depth or lacks one of `depths`, a surgeon is open on it, it has splices of an earlier
        surgery (a plain program could not load it), a replacement cannot be stored, or the folder may not be replaced.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks import at_depth, load
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.surgery import DepthCut, set_depths
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> set_depths(model, [DepthCut((range(2, 4),), (LinearReplacement(32),))])
    >>> loaded = load(save_elastic(model, tempfile.mkdtemp()))
    >>> with at_depth(loaded, 6):
    ...     len(loaded.model.layers)
    6
    """
    cuts, target = depth_cuts_of(model), Path(folder).resolve()
    refuse_open_surgery(find_stack(model, cuts.stack), "save_elastic")
    refuse_adapters(model, "saved")
    if base_class(type(model)) is not type(model):
        raise StreamlineError(
            f"{type(model).__name__} has spliced modules, so that its folder cannot be loaded without this library. "
            "Expected a model without splices at full depth. Fit the depths of the original."
        )
    chosen = tuple(cuts.by_depth) if depths is None else tuple(depth for depth in depths if depth != cuts.blocks)
    if unknown := [depth for depth in chosen if depth not in cuts.by_depth]:
        raise StreamlineError(
            f"save_elastic: the model has no depth {unknown[0]}. Expected depths of "
            f"{', '.join(map(str, depths_of(model)))}. Choose from these, or call fit_depths first."
        )
    if (now := len(find_stack(model, cuts.stack))) != cuts.blocks:
        raise StreamlineError(
            f"save_elastic: the model has {now} blocks, but its depths were made for {cuts.blocks}. Expected the "
            "blocks of then. Call fit_depths again after a surgery."
        )
    weights: dict[str, Tensor] = {}
    description = {
        "format": _FORMAT,
        "stack": cuts.stack,
        "blocks": cuts.blocks,
        "depths": {str(depth): _describe(depth, cuts.by_depth[depth], weights) for depth in sorted(chosen)[::-1]},
    }
    restore_4_bit_layout(model)
    check_not_source(model, target)
    drop_outdated_guarantees(model)
    with atomic_checkpoint(target, overwrite) as new_folder:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        if has_unmapped_offload(model):
            options["state_dict"] = load_offloaded_weights(model)
        model.save_pretrained(new_folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(new_folder)
        (new_folder / _FOLDER).mkdir()
        (new_folder / _FOLDER / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        save_file(weights, new_folder / _FOLDER / _WEIGHTS, metadata={"format": "pt"})
        card = model_card(read_json(new_folder / CONFIG)) + _depths_section(cuts, chosen)
        (new_folder / CARD).write_text(card, encoding="utf-8")
        write_checksums(new_folder)
    return target


def has_depths(folder: Path) -> bool:
    """Whether `save_elastic` wrote a folder."""
    return (folder / _FOLDER / _DESCRIPTION).is_file()


def load_depths(model: nn.Module, folder: Path) -> None:
    """Read the depths of a folder that `save_elastic` wrote, and store them on the loaded model."""
    description = read_json(folder / _FOLDER / _DESCRIPTION)
    if description.get("format") != _FORMAT:
        raise StreamlineError(
            f"{folder / _FOLDER / _DESCRIPTION} has format {description.get('format')!r}. Expected {_FORMAT}. Upgrade "
            "streamline_hooks, or save the model again."
        )
    path = folder / _FOLDER / _WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StreamlineError(f"{path} cannot be read: {error}. Copy the folder again.") from error
    blocks = len(find_stack(model, description["stack"]))
    if blocks != description["blocks"]:
        raise StreamlineError(
            f"{folder} contains a model with {blocks} blocks, but its depths were made for {description['blocks']}. "
            "The files belong to different models. Copy the folder again."
        )
    cuts = {int(depth): _cut_of(depth, entries, weights, path) for depth, entries in description["depths"].items()}
    if weights:
        raise StreamlineError(
            f"{path}, {min(weights)}: the weight is in no depth that {_DESCRIPTION} lists. The files belong to "
            "different models. Copy the folder again."
        )
    attach_depths(model, DepthCuts(description["stack"], blocks, cuts))


def commit_depth(model: nn.Module, depth: int) -> None:
    """Remove the blocks that a model does not run at a depth."""
    cuts = depth_cuts_of(model)
    if depth not in (cuts.blocks, *cuts.by_depth):
        raise StreamlineError(
            f"load: depth={depth} is unknown. Expected one of {', '.join(map(str, depths_of(model)))}, the depths of "
            "the folder. Choose one of them."
        )
    attach_depths(model, DepthCuts(cuts.stack, cuts.blocks, {}))
    if depth == cuts.blocks:
        return
    with LayerSurgeon(model, cuts.stack, probe=False) as surgeon:
        cuts.by_depth[depth].apply(surgeon, despite_hazards=True)  # verified before they were saved
        surgeon.commit(depth=depth)


def _depths_section(cuts: DepthCuts, depths: Sequence[int]) -> str:
    """Return the section of the model card that lists the depths."""
    lines = ["", "## Depths", "", "Without some of its blocks the model is faster and less accurate:", ""]
    lines += ["| blocks | left out | in their place |", "|---|---|---|"]
    for depth in sorted(depths, reverse=True):
        cut = cuts.by_depth[depth]
        windows = ", ".join(
            describe_blocks(window).removeprefix("block ").removeprefix("blocks ") for window in cut.windows
        )
        modules = ", ".join("nothing" if module is None else type(module).__name__ for module in cut.modules)
        lines.append(f"| {depth} of {cuts.blocks} | {windows} | {modules} |")
    example = f"""
```python
import streamline_hooks

model = streamline_hooks.load(folder)
with streamline_hooks.at_depth(model, {min(depths, default=cuts.blocks)}):
    ...  # runs with fewer blocks
```
"""
    return "\n".join([*lines, example])


def _describe(depth: int, cut: DepthCut, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the description of a cut, and add the weights of its modules."""
    entries: list[dict[str, Any]] = []
    for number, (window, module) in enumerate(zip(cut.windows, cut.modules, strict=True)):
        entry: dict[str, Any] = {"window": [window.start, window.stop]}
        if module is not None:
            kind, config = replacement_config(module)
            entry |= {"kind": kind, "config": config}
            for name, tensor in module.state_dict().items():
                weights[f"{depth}.{number}.{name}"] = tensor.contiguous()
        entries.append(entry)
    return entries


def _cut_of(depth: str, entries: list[dict[str, Any]], weights: dict[str, Tensor], path: Path) -> DepthCut:
    """Build the cut of a depth, and remove its weights from the mapping."""
    modules: list[nn.Module | None] = []
    for number, entry in enumerate(entries):
        module = build_replacement(entry["kind"], entry["config"]) if "kind" in entry else None
        if module is not None:
            prefix = f"{depth}.{number}."
            own = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            try:
                module.load_state_dict(own, assign=True)
            except RuntimeError as error:
                raise StreamlineError(
                    f"{path}: the weights of depth {depth} do not fit its {entry['kind']}. {error} Copy the folder "
                    "again."
                ) from error
            module.eval()
        modules.append(module)
    windows = tuple(range(*entry["window"]) for entry in entries)
    return DepthCut(windows, tuple(modules))

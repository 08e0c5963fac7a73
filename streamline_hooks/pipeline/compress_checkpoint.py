"""Compress a checkpoint that is larger than memory, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from streamline_hooks.checkpoint import BlockwiseSource, open_checkpoint
from streamline_hooks.core import (
    StreamlineError,
    UnsupportedSurgery,
    current_processes,
    distributed_step,
    get_logger,
)
from streamline_hooks.data import PackedText, TokenSplit
from streamline_hooks.modeling import Task, find_sentence_folder
from streamline_hooks.pipeline.config import CompressionConfig, RunOptions
from streamline_hooks.pipeline.one_round import compress_once
from streamline_hooks.pipeline.result import CompressionResult
from streamline_hooks.repair import FoldedConfig, ScaleConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass(frozen=True)
class BlockwiseOptions:
    """Describe how a checkpoint is read and written when one block is in memory at a time.

    Attributes
    ----------
    dtype : torch.dtype, optional
        Data type of the weights. By default that of the checkpoint.
    disk : int, optional
        Maximum bytes of hidden states on disk, see `BlockwiseSource`. By default there is no limit.
    work_folder : str or Path, optional
        Folder for hidden states and results, from which an interrupted run continues when it is started again with the
        same arguments. It is deleted at the end. By default nothing is kept.
    offload_folder : str or Path, optional
        Folder for weights that are stored in another layout, see `open_checkpoint`. Most mixtures of experts need it.
    max_shard_size : int or str
        Maximum size of a written file, such as ``"500MB"``, the default. The weights of one file are in memory at a
        time.

    Examples
    --------
    >>> from streamline_hooks.pipeline import BlockwiseOptions
    >>> BlockwiseOptions(max_shard_size="2GB").disk is None
    True
    """

    dtype: torch.dtype | None = None
    disk: int | None = None
    work_folder: str | Path | None = None
    offload_folder: str | Path | None = None
    max_shard_size: int | str = "500MB"


@distributed_step("compress")
def compress_checkpoint(
    folder: str | Path,
    data: Sequence[str] | TokenSplit | Mapping[str, PackedText],
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    options: RunOptions | None = None,
    blockwise: BlockwiseOptions | None = None,
) -> CompressionResult:
    """Compress a checkpoint that is larger than memory.

    The result has the same blocks and weights as that of `streamline_hooks.compress`. The following is in memory: the
    weights outside the blocks, one block, ``config.hardware.state_memory`` bytes of hidden states, about ten float64
    matrices of shape (features, features) while a window is fitted, and the weights of one file while it is written.
    Maps that are folded, or that replace branches, are float64 matrices of this shape too: one for each that the
    shortlist needs.

    Parameters
    ----------
    folder : str or Path
        A checkpoint as for `open_checkpoint`. It is not changed.
    data : sequence of str, TokenSplit or mapping of str to PackedText
        Documents, their split, or packed text.
    config : CompressionConfig, optional
        Every built-in kind of replacement and search is supported. A criterion must be computed from the profile, and
        there must be no distillation and no target that is timed. Nothing is generated or timed. By default
        ``CompressionConfig()``.
    tokenizer : transformers.PreTrainedTokenizerBase
    output : str or Path
        Folder for the compressed model, as for `streamline_hooks.save`. It must not be `folder`.
    options : RunOptions, optional
        Only `overwrite` and `test_texts` may be set.
    blockwise : BlockwiseOptions, optional
        How the checkpoint is read and written. By default ``BlockwiseOptions()``.

    Returns
    -------
    CompressionResult
        The blocks of its model are on disk; `streamline_hooks.load` loads the compressed model. Seconds and peak memory
        are those of this process.

    Raises
    ------
    UnsupportedSurgery
        If the model or the config cannot be run block by block.
    StreamlineError
        If another argument is invalid, or the work folder was written with other arguments.

    Notes
    -----
    Each block is read once for each of these steps: the comparison with a forward of the whole model (twice if the last
    block is protected), the profile (for each group of batches if `disk` is set), the fits, the verification, the
    perplexity, and the writing of the blocks that stay. The last block is read again after the verification and the
    perplexity. About ten forwards of 16 tokens verify the removal, and packed text takes one more pass.

    Selections whose repair changes more than what runs after one window (several windows, zeroed branches, copied
    blocks, ``folded`` and ``scale``) take a pass each for their verification and their perplexity. ``folded`` reads the
    block before each window again, and ``scale`` all later blocks. The search ``greedy`` takes a pass for each block
    that it removes, and ``attention`` and ``mlp`` take one pass that reads each block twice.

    Examples
    --------
    >>> from streamline_hooks.selection import WindowSearch
    >>> config = CompressionConfig(search=WindowSearch(criterion="kl"))
    >>> try:
    ...     compress_checkpoint("large-model", ["Text."], config, tokenizer=None, output="small")
    ... except UnsupportedSurgery as error:
    ...     print(str(error).partition(", but")[0])
    compress: the config has the criterion kl, which runs the model for each window
    """
    config, run, blockwise = config or CompressionConfig(), options or RunOptions(), blockwise or BlockwiseOptions()
    unused = {
        "resume": run.resume,
        "checkpoint_file": run.checkpoint_file is not None,
        "profile": run.profile is not None,
        "teacher": run.teacher is not None,
        "callbacks": bool(run.callbacks),
        "guarantee_data": bool(run.guarantee_data),
    }
    if set_options := [name for name, is_set in unused.items() if is_set]:
        raise StreamlineError(
            f"compress_checkpoint: the options have {', '.join(set_options)}, which have no effect on blocks that are "
            "read from a checkpoint. Expected overwrite and test_texts. Leave the others out."
        )
    require_blockwise(folder, config, output)
    offload, processes = blockwise.offload_folder, current_processes()
    if offload is not None and processes.count > 1:  # every rank writes the weights that it reads
        offload = Path(offload) / f"rank_{processes.rank}"
    model = open_checkpoint(folder, dtype=blockwise.dtype, offload_folder=offload)
    memory = config.hardware.state_memory
    with BlockwiseSource(
        model, folder=blockwise.work_folder, stack=config.stack, memory=memory, disk=blockwise.disk
    ) as source:
        result = compress_once(
            source,
            data,
            config,
            recorded=config,
            max_shard_size=blockwise.max_shard_size,
            tokenizer=tokenizer,
            options=run,
            output=output,
        )
    logger.info(
        "collapse   was not looked for, since that takes both models in memory: compare their generations on a machine "
        "that holds both (evaluate --against MODEL --problems probes)"
    )
    return result


def require_blockwise(folder: str | Path, config: CompressionConfig, output: str | Path | None) -> None:
    """Raise unless a config can be run block by block on a checkpoint, and saved to the output."""
    known = bool(str(folder)) and Path(folder).is_dir()
    if output is not None and known and Path(output).exists() and Path(output).samefile(folder):
        raise StreamlineError(
            f"{output} is the model's own folder, from which its blocks are read during the run. Choose another folder."
        )
    if known:
        find_sentence_folder(folder)  # raises if it cannot be kept
    if reasons := unsupported_fields(config):
        raise UnsupportedSurgery(
            f"compress: the config has {' and '.join(reasons.values())}, but the blocks are on disk. Expected a "
            "criterion of the profile, such as cosine, a number or fraction of the blocks, parameters or bytes to "
            "remove, a built-in kind of replacement or a module of your own, and no distillation. Change it, or load "
            "the model into memory."
        )


def unsupported_fields(config: CompressionConfig) -> dict[str, str]:
    """Return the fields of a config that need the whole model in memory, each with its value and the reason."""
    search, kind, criterion = config.search, config.repair, config.search.resolved_criterion
    reasons = {  # a kind's own function may read weights, which are not in memory
        "repair": (
            kind.fit is not None and not isinstance(kind, (FoldedConfig, ScaleConfig)),
            f"the kind {kind.name!r}, which has a function of its own that fits it",
        ),
        "search": (
            search.runs_model and not search.takes_source,
            f"search={search.kind}, which runs a model in memory",
        ),
        "criterion": (
            criterion.needs != "profile",
            f"the criterion {criterion.name}, which runs the model for each window",
        ),
        "remove": (config.target.is_timed, f"the target {config.target}, which is timed"),
        "distillation": (config.distillation is not None, "distillation"),
        "at_most": (config.at_most is not None, "at_most, which compares whole models"),
        "task": (config.task not in (None, Task("causal-lm")), f"task={config.task}"),
    }
    return {field: text for field, (holds, text) in reasons.items() if holds}

"""The whole way for a checkpoint that does not fit into memory, with one block there at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.blockwise.boundaries import refuse_crossing
from streamline_hooks.blockwise.measuring import perplexity_of_candidates
from streamline_hooks.blockwise.opening import open_checkpoint
from streamline_hooks.blockwise.profiling import profile
from streamline_hooks.blockwise.repairing import require_map_kind
from streamline_hooks.blockwise.residence import identity_of
from streamline_hooks.blockwise.verifying import verified
from streamline_hooks.blockwise.work_folder import WorkFolder
from streamline_hooks.calibration import PackedText, TokenSplit
from streamline_hooks.carrying_out import carry_out, first_that_can_go, how_repaired
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.digests import batches_digest
from streamline_hooks.distributed import here
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.evaluation.reasoning import unmeasured_reasoning
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.preparation import Preparation, prepare_compression
from streamline_hooks.result import CompressionResult, findings
from streamline_hooks.run_figures import Clock, peak_memory_of_process, sizes_of
from streamline_hooks.selection import Criterion, VerifiedSelection
from streamline_hooks.sentence_folder import find_sentence_folder
from streamline_hooks.statistics.chosen_tokens import blocks_run
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def compress_checkpoint(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText],
    output: str | Path,
    config: CompressionConfig | None = None,
    *,
    test_texts: Sequence[str] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    disk: int | None = None,
    work_folder: str | Path | None = None,
    offload_folder: str | Path | None = None,
    max_shard_size: int | str = "500MB",
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Give up the window of blocks whose loss is repaired best, as `streamline_hooks.compress` does in memory.

    It chooses the same window and writes the same weights.

    In memory are what is no block of the model, one block, ``config.hardware.state_memory`` bytes of states, about ten
    d×d matrices in float64 while a window is solved for, and the weights of one file while it is written.

    A block is read once for each of: the check of a pass against a forward of the whole model (twice where the last
    block must stay, which the profile leaves out), the profile (each part of it, with `disk`), the fits and their
    judgement, the measurement of perplexity, and the writing of what stays. The last block is read once more after the
    judgement and after the measurement. The removal of the chosen window is held against the same blocks bypassed,
    which takes about ten forwards of 16 tokens that read all blocks. Packed text is held against its documents alone,
    which reads each once more.

    Parameters
    ----------
    folder : str or Path
        A checkpoint as for `open_checkpoint`. It is not changed.
    tokenizer, texts
        As for `streamline_hooks.compress`.
    output : str or Path
        A folder to save to, as `streamline_hooks.save` does; not the model's own.
    config : CompressionConfig, optional
        By default ``CompressionConfig()``. Block by block there is no training, the search is for single windows by a
        criterion that is read off a profile, the replacement starts at the least-squares map (``none``, ``linear``,
        ``mlp`` or ``swiglu``), and the target is no latency; anything else raises. Nothing is generated or timed.
    test_texts, overwrite
        As for `streamline_hooks.compress`.
    dtype : torch.dtype, optional
        Of the weights; by default that of the checkpoint.
    disk : int, optional
        Bytes that these may take, see `profile`.
    work_folder : str or Path, optional
        Keep all states and findings in this folder, so that a run that was interrupted, or killed, goes on at the
        block where it was when it is started again with the same arguments. It is emptied in the end.
    offload_folder : str or Path, optional
        See `open_checkpoint`; most mixtures of experts need one.
    max_shard_size : int or str
        Of a file that is written. The weights of one file are in memory at a time; one that is larger has a file of
        its own.
    say : callable
        Receives lines about what is planned and found.

    Returns
    -------
    CompressionResult
        Its model is that of the checkpoint, shortened, with its blocks on disk; `streamline_hooks.load` reads what was
        written. Seconds and peak memory are those of this process alone. Nothing is written by both models side by
        side.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block, or the kind or the target needs more.
    StreamlineError
        On anything else that cannot work; or if the work folder is of other arguments.
    """
    if here().count > 1:
        raise StreamlineError(
            f"compress_checkpoint is one process's work, and this is one of {here().count}. Call it in one alone."
        )
    require_free(output, overwrite)
    if Path(output).exists() and Path(output).samefile(folder):
        raise StreamlineError(
            f"{output} is the model's own folder, from which its blocks are read meanwhile. Choose another folder."
        )
    find_sentence_folder(folder)  # raises if it cannot be kept
    config = recorded = config or CompressionConfig()
    config = replace(config, repair=config.repair.seeded(config.seed))
    criterion = _require_streamable(config)
    chosen = config.repair
    clock = Clock()
    with clock("prepare"):
        model = open_checkpoint(folder, dtype=dtype, offload_folder=offload_folder)
        ready = prepare_compression(
            model,
            tokenizer,
            texts,
            config,
            task=Task("causal-lm"),
            test_texts=test_texts,
            say=say,
            refuse_crossing=refuse_crossing,
        )
        require_map_kind(ready.stack, chosen, ready.candidates[0])
        ready.require_writable()
        seed = {"seed": chosen.seed} if chosen.seed else {}
        shortlist = config.search.shortlist
        work = _work_folder(work_folder, ready, criterion=criterion.name, shortlist=shortlist, **seed)
    for line in ready.announcement():
        say(line)
    path = ready.stack.path
    options: dict[str, Any] = {"stack": path, "memory": config.hardware.state_memory}
    with clock("rank"):
        measured = work.profile(
            lambda room, kept: profile(
                model, ready.calibration, keep=ready.protected, disk=disk, folder=room, before_done=kept, **options
            )
        )
        problem = ready.problem(profile=measured)
        found = config.search.find(replace(problem, model=None, batches=None))  # nothing is read but the profile
    with clock("verify"):
        parts = (ready.fit, ready.held_out, ready.judging)
        unseen = blocks_run(ready.protected, len(ready.stack)) < len(ready.stack)  # by the check of the profile's pass
        judged = work.judged(
            ready.stack,
            chosen,
            lambda room, kept: verified(
                model, found, *parts, replacement=chosen, folder=room, check=unseen, before_done=kept, **options
            ),
        )
    with clock("choose"):
        best = first_that_can_go(model, judged, path, say)
    for line in findings(judged, best):
        say(line)
    first = next(one for one in judged if one.windows == found[0].windows)
    with clock("measure"):
        wanted = _wanted(best, first)
        perplexities = work.perplexities(
            list(wanted),
            lambda room, kept: perplexity_of_candidates(
                model, ready.test, list(wanted.values()), folder=room, check=False, before_done=kept, **options
            ),
        )
    before, data, size = sizes_of(model), {**ready.split.figures(), "seed": config.seed}, ready.size
    with clock("save"):
        with LayerSurgeon(model, path, probe=False) as surgeon:  # this window has been held against the truth
            carry_out(surgeon, best)
            plan = surgeon.commit(
                kind=chosen.name, calibration=data, config=recorded.to_dict(), repaired=how_repaired(best, chosen)
            )
        result = CompressionResult(
            model=model,
            tokenizer=tokenizer,
            plan=plan,
            config=recorded,
            kind=chosen.name,
            size=size,
            criterion=criterion.name,
            search=config.search.kind,
            candidates=[best, *(one for one in judged if one is not best)],
            perplexities=perplexities,
            parameters=(before[0], sizes_of(model)[0]),
            size_in_bytes=(before[1], sizes_of(model)[1]),
            seconds=clock.seconds,
            peak_memory=peak_memory_of_process(),
            data=data,
            profile=measured,
            warnings=unmeasured_reasoning(tokenizer),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # of 50 GB
            result.folder = save(
                model,
                output,
                tokenizer=tokenizer,
                report=result.report(),
                overwrite=overwrite,
                max_shard_size=max_shard_size,
            )
    result.peak_memory = peak_memory_of_process()
    say(
        "collapse   was not looked for, since that takes both models in memory: let it write and solve problems where "
        "they fit (evaluate --against, --probes)"
    )
    work.clear()
    return result


def _require_streamable(config: CompressionConfig) -> Criterion:
    """Return the criterion of a config that can be carried out block by block; raise for another config."""
    search, target = config.search, config.target
    criterion = search.resolved_criterion
    reasons = {
        f"search={search.kind}": search.kind != "window",
        f"the criterion {criterion.name}, which runs the model for each window": criterion.needs != "profile",
        f"the target {target}, which is timed": "latency" in target.unit,
        "distillation": config.distillation is not None,
        f"repeated={config.data.repeated:g}": bool(config.data.repeated),
        f"task={config.task}": config.task not in (None, Task("causal-lm")),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise UnsupportedSurgery(
            f"compress_checkpoint: the config has {' and '.join(found)}. Expected a search for single windows by a "
            "criterion of the profile, such as cosine, towards a number or fraction of the blocks or parameters, "
            "without a training. Change it, or load the model into memory and use compress."
        )
    return criterion


def _work_folder(folder: str | Path | None, ready: Preparation, **run: Any) -> WorkFolder:
    if folder is None:
        return WorkFolder(None, {})
    about = {
        **identity_of(ready.stack),
        "batches": batches_digest([ready.fit, ready.held_out, ready.judging, ready.test]),
        "target": str(ready.config.target),
        "kind": ready.kind.name,
        "keep": sorted(ready.protected),
        **run,
    }
    return WorkFolder(Path(folder), about)


def _wanted(best: VerifiedSelection, first: VerifiedSelection) -> dict[str, Candidate]:
    """Whose perplexity is measured: the chosen window's, and that of the search's first if it is another."""
    wanted: dict[str, Candidate] = {}
    for prefix, one in (("", best), ("first_", first)):
        if prefix and first is best:
            continue
        (repair,) = one.repairs
        wanted[f"{prefix}removed"] = Candidate(repair.window)
        if isinstance(repair.stand_in, nn.Module):
            wanted[f"{prefix}repaired"] = Candidate(repair.window, repair.stand_in)
    return wanted

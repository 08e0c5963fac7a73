"""The whole way in one call: rank, shortlist, fit, judge, remove, measure, save."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import TokenSplit, check_tokenizer, split_documents
from streamline_hooks.checkpoint import require_free, save
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Candidate, kl_of_candidates, perplexity, perplexity_of_candidates
from streamline_hooks.passes import progress
from streamline_hooks.repair import kind_named, solve
from streamline_hooks.result import LABELS, CompressionResult, JudgedWindow, findings
from streamline_hooks.selection import blocks_to_remove, protected_blocks, ranked, windows
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import measure_moments, measure_similarity
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.placement import move_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    remove: int | float = 0.25,
    kind: str = "linear",
    keep: Iterable[int] = (),
    test_texts: Sequence[str] | None = None,
    sequence_length: int = 512,
    calibration_tokens: int = 41_000,
    validation_tokens: int = 4_096,
    test_tokens: int = 12_288,
    batch_size: int = 4,
    shortlist: int = 8,
    seed: int = 0,
    stack: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Give up the window of blocks whose loss is repaired best.

    One pass compares all states; cosine makes a shortlist; a second pass, stopped after the last block needed, sums
    the moments of all shortlisted windows; each is repaired in closed form and judged by KL to the original on
    validation text; the best is committed, and measured on text that played no part in any of this.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model. It is changed; on an error it is as it was, unless the error comes after the surgery
        was committed, in measuring or saving: then it is compressed, and `save` can write it elsewhere.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str
        Documents. Calibration, validation and test text are split off them without overlap.
    remove : int or float
        Number of blocks, or a fraction below 1 of them (rounded half up).
    kind : {"linear", "none"}
        What stands in the window's place.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end.
    test_texts : sequence of str, optional
        Documents to score on instead of a part of `texts`.
    sequence_length, calibration_tokens, validation_tokens, test_tokens : int
        In tokens.
    batch_size : int
        Sequences at a time.
    shortlist : int
        How many windows are fitted and judged.
    seed : int
        Of the split.
    stack : str, optional
        Path of the stack, see `find_stack`.
    output : str or Path, optional
        A folder to save to.
    overwrite : bool
        Take the place of a folder that is not empty.
    say : callable
        Receives lines about what is planned and found.

    Returns
    -------
    CompressionResult

    Raises
    ------
    StreamlineError
        On anything that cannot work, before anything long is started where that can be known.
    """
    if output is not None:
        require_free(output, overwrite)
    slots = kind_named(kind).slots
    if shortlist < 1 or batch_size < 1:
        raise StreamlineError(f"shortlist={shortlist} and batch_size={batch_size} must be 1 or more.")
    found = find_stack(model, stack)
    count = blocks_to_remove(remove, len(found), slots)
    every = windows(len(found), count, protected_blocks(keep, len(found)))
    _require_positions(model, sequence_length)
    clock = _Clock()

    with clock("tokenise"):
        split = split_documents(
            texts,
            tokenizer,
            seed=seed,
            sequence_length=sequence_length,
            calibration_tokens=calibration_tokens,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            test_documents=test_texts,
        )
        check_tokenizer(tokenizer, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings, split)
    for line in _announcement(found, remove, count, len(every), min(shortlist, len(every)), kind, split):
        say(line)
    calibration, validation, test = (
        batches_of(part, batch_size) for part in (split.calibration, split.validation, split.test)
    )

    with clock("rank"):
        similarity = measure_similarity(model, calibration, stack=found.path)
    first = ranked(similarity, every)[:shortlist]
    chosen = [scored.window for scored in first]
    with clock("fit"):
        fitted, held_out = (
            measure_moments(model, batches_of(part, batch_size), chosen, stack=found.path, what=what)
            for part, what in zip(_held_out_apart(split.calibration), ("fit", "hold out"), strict=True)
        )
        solutions = []
        with progress(len(chosen), "solve least squares", "windows") as bar:
            for pair in zip(fitted, held_out, strict=True):
                solutions.append(solve(*pair))
                bar.update()
        modules = [_placed(kind_named(kind).start(solution), found) for solution in solutions]
    candidates = [Candidate(window, module) for window, module in zip(chosen, modules, strict=True)]
    with clock("judge"):
        kls = kl_of_candidates(model, validation, candidates, stack=found.path)
    order = sorted(range(len(chosen)), key=lambda k: (not math.isfinite(kls[k]), kls[k]))
    if not math.isfinite(kls[order[0]]):
        raise StreamlineError(
            f"Not one of the {len(chosen)} shortlisted windows leaves a model with finite logits. Remove less, protect "
            "other blocks, or run in a wider precision (float32 or bfloat16)."
        )
    judged = [
        JudgedWindow(
            chosen[k].start,
            chosen[k].stop,
            first[k].score,
            solutions[k].removal_error,
            solutions[k].held_out_error if kind != "none" else solutions[k].removal_error,
            solutions[k].ridge,
            kls[k],
        )
        for k in order
    ]
    best = order[0]
    for line in findings(judged):
        say(line)

    with clock("measure"):
        perplexities = _perplexities(model, test, candidates[best], candidates[0], found.path)
        before = _sizes(model)
        path = found.path
        del found  # it holds the blocks that go
        with LayerSurgeon(model, path) as surgeon:
            surgeon.replace(chosen[best], modules[best])
            plan = surgeon.commit(kind=kind, calibration=_data(split, seed))
        perplexities["repaired" if kind != "none" else "removed"] = perplexity(model, test, "perplexity").value
    after = _sizes(model)
    result = CompressionResult(
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        kind=kind,
        candidates=judged,
        perplexities={name: perplexities[name] for name in LABELS if name in perplexities},
        parameters=(before[0], after[0]),
        size_in_bytes=(before[1], after[1]),
        seconds=clock.seconds,
        peak_memory=_peak_memory(),
        data=_data(split, seed),
        similarity=similarity,
    )
    if output is not None:
        with clock("save"):
            result.folder = save(model, output, tokenizer=tokenizer, report=result.report(), overwrite=overwrite)
    return result


def _held_out_apart(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Four fifths to fit on, and the last fifth, which comes from other documents, to choose the ridge by."""
    if len(sequences) < 2:
        raise StreamlineError(
            f"The calibration text fills {len(sequences)} sequence of {sequences.shape[1]} tokens; expected two at "
            "least, one to fit on and one to choose the ridge by. Give more text or a smaller --sequence-length."
        )
    held_out = max(1, len(sequences) // 5)
    return sequences[:-held_out], sequences[-held_out:]


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started


def _perplexities(
    model: nn.Module, test: Any, best: Candidate, cosine_first: Candidate, stack: str
) -> dict[str, float]:
    wanted = {"removed": Candidate(best.window)}
    if cosine_first.window != best.window:
        wanted["cosine_first_removed"] = Candidate(cosine_first.window)
        if cosine_first.module is not None:
            wanted["cosine_first_repaired"] = cosine_first
    what = f"perplexity of the original and {len(wanted)} others"
    original, each = perplexity_of_candidates(model, test, list(wanted.values()), what, stack=stack)
    return {"original": original.value, **{name: p.value for name, p in zip(wanted, each, strict=True)}}


def _placed(module: nn.Module | None, stack: BlockStack) -> nn.Module | None:
    if module is not None:
        move_beside(module, stack[0])
    return module


def _announcement(
    stack: BlockStack, remove: int | float, count: int, free: int, shortlist: int, kind: str, split: TokenSplit
) -> list[str]:
    share = count / len(stack)
    return [
        f"stack      {stack}",
        f"remove     {remove} comes to {count} of {len(stack)} blocks ({share:.1%}), {kind} in their place",
        f"candidates {free} windows, of which {shortlist} are fitted and judged",
        f"text       {split.describe()}",
    ]


def _data(split: TokenSplit, seed: int) -> dict[str, Any]:
    return {
        "calibration_tokens": split.calibration.numel(),
        "validation_tokens": split.validation.numel(),
        "test_tokens": split.test.numel(),
        "sequence_length": split.sequence_length,
        "seed": seed,
        "fingerprint": split.fingerprint,
        "notes": list(split.notes),
    }


def _require_positions(model: PreTrainedModel, sequence_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < sequence_length:
        raise StreamlineError(
            f"sequence_length={sequence_length} is more than the {limit} positions that the model has; use "
            f"--sequence-length {limit} or less."
        )


def _sizes(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

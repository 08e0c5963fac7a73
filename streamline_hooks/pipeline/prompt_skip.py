"""Choose the blocks that a prompt skips, and fit and train the maps that estimate their states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from streamline_hooks.core import (
    IGNORE_INDEX,
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    check_field_names,
    current_processes,
    describe_blocks,
    get_logger,
    prepare_inputs,
    progress_bar,
    validate_arguments,
)
from streamline_hooks.data import documents_of
from streamline_hooks.distillation import PromptSkipStudent, TrainingResult, prompt_of, skips_any, train
from streamline_hooks.modeling import Task, find_stack, inference, logits_to_keep, select_tokens, summed_kl
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.prepare import CompressionData, Preparation, parts_of, prepare_compression
from streamline_hooks.repair import fit_windows
from streamline_hooks.selection import Target
from streamline_hooks.statistics import Profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import LAST_TOKENS, ModelSource, PromptSkip, checked_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)

Continuation = Literal["text", "repeated"]
_LEAST = 0.25  # of a sequence: the shortest prompt of a training batch, and the shortest continuation


@dataclass(frozen=True, eq=False)
class FittedPromptSkip:
    """Blocks that a prompt skips, with the maps that estimate their states.

    Attributes
    ----------
    window : range
        The skipped blocks.
    maps : tuple of torch.nn.Module or None
        For each block, the map from the state that enters the window, (batch, tokens, features), to an estimate of the
        state that leaves the block. It is None for the last block of the model, whose output no other token reads.
    kl : dict of str to float
        KL(full model ‖ skipping model) in nats per token of the second half of a sequence, whose first half is the
        prompt: of validation text ("text"), and of a passage that is the same as the prompt ("repeated").
    training : TrainingResult or None
        The training run of the maps; None if they are in closed form.
    last_tokens : int
        Number of tokens at the end of a prompt that run every block.

    Examples
    --------
    >>> FittedPromptSkip(range(6, 8), (None, None), {"text": 0.02, "repeated": 0.04}).distance
    0.03
    """

    window: range
    maps: tuple[nn.Module | None, ...]
    kl: Mapping[Continuation, float]
    training: TrainingResult | None = None
    last_tokens: int = field(default_factory=lambda: LAST_TOKENS)  # no default of the class for older pickles

    @property
    def distance(self) -> float:
        """Mean of the two KL divergences, by which windows are compared."""
        return sum(self.kl.values()) / len(self.kl)

    def open(self, model: nn.Module, *, stack: str | None = None) -> PromptSkip:
        """Return a `PromptSkip` with this window and these maps.

        Parameters
        ----------
        model : torch.nn.Module
            The model that they were fitted on.
        stack : str, optional
            Path of the stack; see `find_stack`.
        """
        return PromptSkip(model, self.window, self.maps, last_tokens=self.last_tokens, stack=stack)


@validate_arguments(last_tokens=1)
def fit_prompt_skip(
    model: PreTrainedModel,
    data: CompressionData,
    blocks: int | range,
    /,
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    last_tokens: int = LAST_TOKENS,
    checkpoint_file: str | Path | None = None,
    **fields: Any,
) -> FittedPromptSkip:
    """Choose the blocks that a prompt skips, fit a map for each, and optionally train the maps.

    Each map is fitted from the state that enters the window, which a token of the prompt really has, to the state that
    leaves the block in the full model. The windows are ranked by a profile; for the best of them, as many as
    ``config.search.shortlist``, maps are fitted, and the window whose continuations are closest to those of the full
    model is returned. Half of the continuations repeat the prompt, because perplexity hides whether a model still reads
    its prompt. With ``config.distillation`` the maps of the chosen window are then trained by the divergence of
    continuations of the calibration text: every second batch continues the text at a random position, the others repeat
    the first half of each sequence. The model does not change.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    data : sequence of str, datasets.Dataset, TokenSplit, batches, or mapping of parts
        See `compress`. Its test part is not used.
    blocks : int or range
        Number of consecutive blocks to skip, or the blocks.
    config : CompressionConfig, optional
        Data, search (`protect` and `shortlist`), kind of map (`repair`) and training (`distillation`, `hardware`);
        `remove` is not used. By default ``CompressionConfig()``, with linear maps and without training.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizer for documents.
    last_tokens : int
        Number of tokens at the end of a prompt that run every block; see `PromptSkip`. Default 16.
    checkpoint_file : str or Path, optional
        File to save the training run to. If it exists, the run in it continues, and must have the same settings and
        data; the closed-form part is computed again.
    **fields
        Fields of `CompressionConfig` (except `data`) that override those of `config`.

    Returns
    -------
    FittedPromptSkip

    Raises
    ------
    UnsupportedSurgery
        If no window of this length can be skipped; see `PromptSkip`.
    StreamlineError
        If the arguments are invalid, the kind of map is no module, the config heals blocks, or there are several
        processes.

    Notes
    -----
    The cost is one profile, and for each window of the shortlist one pass over the fitting text and two passes over the
    validation text. The maps of all windows of the shortlist are in memory.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> batches = [torch.randint(3, 60, (2, 16)) for _ in range(12)]
    >>> fitted = fit_prompt_skip(model, batches, 3, last_tokens=2)
    >>> len(fitted.window), len(fitted.maps)
    (3, 3)
    >>> with fitted.open(model):
    ...     model.generate(batches[0], max_new_tokens=2, do_sample=False).shape
    torch.Size([2, 18])
    """
    config = config or CompressionConfig()
    if fields:
        check_field_names(CompressionConfig, fields)
        config = replace(config, **fields)
    _check_config(config)
    if config.distillation is None and checkpoint_file is not None:
        raise StreamlineError(
            "fit_prompt_skip: checkpoint_file was given without a distillation, so nothing is trained. "
            "Expected both. Pass distillation=DistillationConfig() as well."
        )
    stack = find_stack(model, config.stack)
    window = checked_window(blocks, len(stack)) if isinstance(blocks, range) else None
    count = len(blocks) if isinstance(blocks, range) else blocks
    if not 0 < count < len(stack):
        raise StreamlineError(
            f"fit_prompt_skip: blocks={blocks!r}. Expected 1 to {len(stack) - 1} blocks, because the model has "
            f"{len(stack)}. Skip fewer."
        )
    task = config.task or Task.of(model)
    if not task.is_causal_lm:
        raise StreamlineError(
            f"fit_prompt_skip: the task of {type(model).__name__} is {task}. Expected a causal language model, which "
            "has a prompt. Load the model with AutoModelForCausalLM."
        )
    target = replace(config, remove=Target(blocks=count), repair=config.repair.seeded(config.seed))
    ready = prepare_compression(model, tokenizer, parts_of(data), target, task=task)
    windows = [window] if window is not None else _ranked_windows(ready, count)
    fitted = _fit_maps(ready, windows, last_tokens)
    compared = _compared(ready, fitted)
    for candidate in compared:
        logger.info(
            f"skip       {describe_blocks(candidate.window)}: KL {candidate.kl['text']:.4f} nats per token of text, "
            f"{candidate.kl['repeated']:.4f} of repeated text"
        )
    best = min(compared, key=lambda candidate: candidate.distance)
    if config.distillation is None:
        return best
    if not any(True for module in best.maps if module is not None for _ in module.parameters()):
        logger.info("There is no map to train: no other token reads the output of the last block.")
        return best
    student = PromptSkipStudent(model, best.window, best.maps, last_tokens=last_tokens, stack=stack.path)
    training = train(
        student,
        list(_training_batches(ready.training, config.seed)),
        [batch for _, batch in _continuations(ready.validation)],
        config.distillation.seeded(config.seed),
        hardware=config.hardware,
        checkpoint_file=checkpoint_file,
        resume=checkpoint_file is not None and Path(checkpoint_file).exists(),
    )
    (trained,) = _compared(ready, [replace(best, maps=tuple(m and m.eval() for m in best.maps), training=training)])
    return trained


def _check_config(config: CompressionConfig) -> None:
    if config.healing is not None or config.rounds > 1 or config.train_until is not None or config.at_most is not None:
        raise StreamlineError(
            "fit_prompt_skip: the config has healing, several rounds, train_until or at_most. Expected none of them, "
            "because no block is removed. Leave them out."
        )
    if config.distillation is not None and config.distillation.objective.needs_states:
        raise StreamlineError(
            f"fit_prompt_skip: the loss {config.distillation.objective} compares hidden states, which only some tokens "
            "have. Expected a loss on outputs. Use kl, reverse_kl or lm."
        )
    if config.repair.slots or config.repair.fit is not None:
        raise StreamlineError(
            f"fit_prompt_skip: the kind {config.repair.name!r} is no map of one state. Expected a module that runs in "
            "place of a window. Use for example LinearConfig."
        )
    if current_processes().count > 1:
        raise StreamlineError(
            f"fit_prompt_skip: {current_processes().count} processes were given. Expected one. Run it outside of "
            "torchrun."
        )


def _ranked_windows(ready: Preparation, count: int) -> list[range]:
    """Return the windows of a length, those with the smallest expected error first."""
    blocks = len(ready.stack)
    profile = measure_profile(ModelSource(ready.stack.model, ready.stack), ready.calibration, protect=ready.protected)
    windows = [range(start, start + count) for start in range(blocks - count + 1)]
    allowed = [window for window in windows if not ready.protected.intersection(window)]
    ranked = sorted(allowed, key=lambda window: _expected_error(profile, window))
    return ranked[: ready.config.search.shortlist]


def _expected_error(profile: Profile, window: range) -> float:
    """Return the sum, over the blocks whose keys and values change, of the distance that their input would have."""
    distance = 1.0 - profile.matrix("cosine")[window.start]
    inside = sum(float(distance[k]) for k in window[1:])
    return inside + (profile.length - window.stop) * float(distance[window.stop])


def _fit_maps(ready: Preparation, windows: Sequence[range], last_tokens: int) -> list[FittedPromptSkip]:
    """Fit the maps of each window that can be skipped."""
    stack, refusal = ready.stack, None
    fitted: list[FittedPromptSkip] = []
    for window in windows:
        try:
            PromptSkip(stack.model, window, last_tokens=last_tokens, stack=stack.path)
        except UnsupportedSurgery as error:
            refusal = refusal or error
            continue
        # No other token reads the output of the last block, so its map would have no effect.
        parts = [range(window.start, k + 1) for k in window if k < len(stack) - 1]
        source = ModelSource(stack.model, stack)
        repairs = fit_windows(source, parts, ready.kind, ready.fit, ready.held_out) if parts else []
        fits = [repair.replacement_module for repair in repairs]
        modules = tuple(module.eval() if isinstance(module, nn.Module) else None for module in fits)
        maps = modules + (None,) * (len(window) - len(parts))
        fitted.append(FittedPromptSkip(window, maps, {}, last_tokens=last_tokens))
    if refusal is not None and not fitted:
        raise refusal
    return fitted


def _compared(ready: Preparation, fitted: Sequence[FittedPromptSkip]) -> list[FittedPromptSkip]:
    """Measure the KL divergence of the continuations with each window."""
    sums: list[dict[Continuation, float]] = [{"text": 0.0, "repeated": 0.0} for _ in fitted]
    tokens: dict[Continuation, int] = {"text": 0, "repeated": 0}
    continuations = list(_continuations(ready.verification))
    last_tokens = fitted[0].last_tokens
    if not any(skips_any(batch, last_tokens) for _, batch in continuations):
        raise StreamlineError(
            "fit_prompt_skip: the first half of a validation sequence is its prompt, and none has more than "
            f"{last_tokens + 1} tokens, of which the first and the last {last_tokens} run every block. Expected longer "
            "sequences. Pass longer texts, or a smaller last_tokens."
        )
    total = sum(int(batch["attention_mask"].sum()) for _, batch in continuations)
    model = ready.stack.model
    options: dict[str, Any] = {"stack": ready.stack.path, "probe": False}
    skips = [PromptSkip(model, c.window, c.maps, last_tokens=last_tokens, **options) for c in fitted]
    with inference(model), progress_bar(total * (1 + len(fitted)), "compare") as bar:
        for kind, batch in continuations:
            mask, prompt = batch["attention_mask"], prompt_of(batch, last_tokens)
            scored = mask.bool() & ~prompt_of(batch, last_tokens=1)
            width = scored.shape[1] - int(scored.any(dim=0).int().argmax())  # from the first continuation on
            scored = scored[:, -width:]
            inputs = prepare_inputs(model, {"input_ids": batch["input_ids"], "attention_mask": mask})
            inputs |= logits_to_keep(model, width)
            reference = select_tokens(model(**inputs).logits[:, -width:], scored).float().log_softmax(dim=-1)
            bar.update(int(mask.sum()))
            for skip, nats in zip(skips, sums, strict=True):
                with skip, skip.marked(prompt):
                    nats[kind] += summed_kl(reference, select_tokens(model(**inputs).logits[:, -width:], scored))
                bar.update(int(mask.sum()))
            tokens[kind] += len(reference)
    return [
        replace(candidate, kl={kind: value / tokens[kind] for kind, value in nats.items()})
        for candidate, nats in zip(fitted, sums, strict=True)
    ]


def _continuations(batches: Sequence[Batch | Tensor]) -> Iterator[tuple[Continuation, dict[str, Tensor]]]:
    """Yield each batch twice, continued from half of its text and repeating this half."""
    for rows in (rows for batch in batches for rows in _documents(batch)):
        halves = [row[: len(row) // 2] for row in rows]
        yield "text", _continuation(rows, [len(half) for half in halves])
        yield "repeated", _repeated(halves)


def _training_batches(batches: Sequence[Batch | Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield each batch once: continued from a random position, or repeating its first half."""
    generator = torch.Generator().manual_seed(seed)
    for number, rows in enumerate(rows for batch in batches for rows in _documents(batch)):
        if number % 2:
            yield _repeated([row[: len(row) // 2] for row in rows])
        else:
            # One share for the batch: a block runs the columns that belong to a continuation in any sequence.
            share = _LEAST + (1 - 2 * _LEAST) * float(torch.rand((), generator=generator))
            yield _continuation(rows, [int(len(row) * share) for row in rows])


def _documents(batch: Batch | Tensor) -> Iterator[list[Tensor]]:
    """Yield the documents of a batch that have at least two tokens, without padding.

    Those of packed rows are divided by length, so that a padded group is no larger than the batch.
    """
    size = (batch if isinstance(batch, Tensor) else batch["input_ids"]).numel()
    documents = [document for row in documents_of(batch) for document in row if len(document) > 1]
    if len(documents) * max(map(len, documents), default=0) <= size:
        if documents:
            yield documents
        return
    group: list[Tensor] = []
    for document in sorted(documents, key=len):
        if (len(group) + 1) * len(document) > size:
            yield group
            group = []
        group.append(document)
    yield group


def _repeated(halves: Sequence[Tensor]) -> dict[str, Tensor]:
    return _continuation([torch.cat([half, half]) for half in halves], [len(half) for half in halves])


def _continuation(sequences: Sequence[Tensor], prompts: Sequence[int]) -> dict[str, Tensor]:
    """Return a padded batch whose labels are those after the first tokens of each sequence."""
    ids = pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(row) for row in sequences], device=ids.device)[:, None]
    position, start = torch.arange(ids.shape[1], device=ids.device), torch.tensor(prompts, device=ids.device)[:, None]
    real = position < lengths
    labels = ids.masked_fill(~real | (position < start), IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}

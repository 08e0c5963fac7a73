"""Refit the windows of a model with splices with a replacement that gives a plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from streamline_hooks.checkpoint import CONFIG, compare_blocks, load, load_tokenizer, read_plans
from streamline_hooks.core import StreamlineError, get_logger, hide_progress, read_json, split_into_batches
from streamline_hooks.data import MixedSource, TokenSplit, mixed_split, read_recorded_source, split_documents
from streamline_hooks.evaluation import perplexity
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig, RunOptions
from streamline_hooks.pipeline.result import CompressionResult
from streamline_hooks.repair import REPLACEMENTS, ReplacementConfig, fit_windows
from streamline_hooks.selection import DisjointSearch, WindowSearch
from streamline_hooks.surgery import SurgeryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)

PLAIN_KINDS = ("folded", "silenced")
"""Replacements that give a plain model, in the order of preference; see `refit_kinds`."""
_SPLIT = ("calibration_tokens", "validation_tokens", "test_tokens", "sequence_length", "seed")


@dataclass(frozen=True)
class RefitResult:
    """A plain model in place of a model with splices, and the differences between them.

    Attributes
    ----------
    result : CompressionResult
        The result for the plain model.
    spliced_perplexity : float
        Perplexity of the spliced model on the same test text.
    spliced_parameters : int
        Number of parameters of the spliced model.
    slots : int
        Number of additional blocks, and cache slots, of the plain model.
    same_text : bool
        True if the plain model was fitted on the calibration text of the spliced model.

    Examples
    --------
    >>> from streamline_hooks.pipeline import refit
    >>> refit("models/spliced", original).slots  # doctest: +SKIP
    0
    """

    result: CompressionResult
    spliced_perplexity: float
    spliced_parameters: int
    slots: int
    same_text: bool = True

    def __str__(self) -> str:
        label = next(name for name in ("trained", "repaired", "removed") if name in self.result.perplexities)
        now, parameters = self.result.perplexities[label], self.result.parameters[1]
        more = parameters - self.spliced_parameters
        other = "" if self.same_text else "; fitted on a different text than the spliced model"
        return (
            f"{self.result.kind}: perplexity {now:.2f}, with splices {self.spliced_perplexity:.2f} (x "
            f"{now / self.spliced_perplexity:.3f}); {more:+,} parameters, {self.slots:+d} cache slots{other}"
        )


def refit_kinds(folder: str | Path, original: PreTrainedModel) -> dict[str, str]:
    """Check which plain kinds can replace the windows of a checkpoint.

    Each kind is tried on a few tokens. The original is not changed.

    Parameters
    ----------
    folder : str or Path
        A model with splices that `compress` wrote.
    original : transformers.PreTrainedModel
        The original of the model.

    Returns
    -------
    dict of str to str
        For each kind of `PLAIN_KINDS` the reason why it cannot be used, or an empty string.

    Raises
    ------
    StreamlineError
        If the checkpoint was not made by one surgery that replaces windows.

    Examples
    --------
    >>> from streamline_hooks.pipeline import refit_kinds
    >>> refit_kinds("models/spliced", original)  # doctest: +SKIP
    {'folded': '', 'silenced': ''}
    """
    plan, windows = _replaced_windows(folder)
    generator = torch.Generator().manual_seed(0)
    words = cast(nn.Embedding, original.get_input_embeddings()).num_embeddings
    batches = split_into_batches(torch.randint(0, words, (4, 16), generator=generator), 2)
    reasons = {}
    for kind in PLAIN_KINDS:
        config = REPLACEMENTS[kind]()
        reasons[kind] = ""
        if any(len(window) <= config.slots for window in windows):
            reasons[kind] = f"it keeps a block of each window, but one of the windows {windows} is too short"
            continue
        try:
            with hide_progress():
                fit_windows(original, windows, config, batches[:1], batches[1:], stack=plan.stack)
        except StreamlineError as error:
            reasons[kind] = str(error)
    return reasons


def refit(
    folder: str | Path,
    original: PreTrainedModel,
    texts: Sequence[str] | TokenSplit | None = None,
    *,
    replacement: ReplacementConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> RefitResult:
    """Remove the windows of a spliced checkpoint from the original again, with a replacement that gives a plain model.

    Parameters
    ----------
    folder : str or Path
        A model with splices that `compress` wrote.
    original : transformers.PreTrainedModel
        The original of the model. It is changed in place, as by `compress`.
    texts : sequence of str or TokenSplit, optional
        The calibration text. By default it is read from the sources that the checkpoint records. A warning is logged if
        it differs from the calibration text of the checkpoint.
    replacement : FoldedConfig or SilencedConfig, optional
        By default the first usable kind of `refit_kinds`.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        By default the tokenizer in the folder.
    test_texts : sequence of str, optional
        Documents for the test part, in addition to `texts`.
    output, overwrite
        As in `compress`.

    Returns
    -------
    RefitResult

    Raises
    ------
    StreamlineError
        If the checkpoint was not made by one surgery that replaces windows, `original` is not its original, the kind
        cannot be used, or the text is not recorded or cannot be read.

    Examples
    --------
    >>> from streamline_hooks.pipeline import refit
    >>> print(refit("models/spliced", original, output="models/plain"))  # doctest: +SKIP
    """
    plan, windows = _replaced_windows(folder)
    if not Task.of(original).is_causal_lm:
        raise StreamlineError(
            f"{folder} was calibrated on batches for {Task.of(original)}, which a checkpoint does not record. Expected "
            "a causal language model. Compress the original again, with repair=FoldedConfig()."
        )
    data = _calibration_data(folder)
    replacement = _usable_kind(refit_kinds(folder, original), replacement, folder)
    tokenizer = tokenizer or load_tokenizer(Path(folder))
    if tokenizer is None:
        raise StreamlineError(
            f"{folder} has no tokenizer. Expected the tokenizer of the compression. Pass tokenizer=..."
        )
    split = _split_again(folder, data, texts, test_texts, tokenizer)
    same_text = split.fingerprint == data["fingerprint"]
    if not same_text:
        logger.warning(
            f"The text differs from the calibration text of {folder}: its fingerprint is {split.fingerprint[:12]}, not "
            f"{data['fingerprint'][:12]}. The windows are fitted on the new text, and the test text may include text "
            "on which the splices were fitted."
        )
    model = _load_like(original, folder)
    kept = tuple(match.source for match in compare_blocks(original, model, stack=plan.stack) if not match.changed)
    if kept != plan.kept:
        raise StreamlineError(
            f"{folder} was not made from this original: of its kept blocks {list(plan.kept)}, only {list(kept)} are "
            "equal. Expected equal kept blocks. Pass the model it was made from; a healed checkpoint cannot be "
            "refitted."
        )
    value = perplexity(model, split_into_batches(split.test, 4), "with splices").value
    before, blocks = model.num_parameters(), len(plan.slots)
    del model
    removed = {k for window in windows for k in window}
    protect = tuple(k for k in range(plan.old_length) if k not in removed)
    config = CompressionConfig(
        remove=len(removed) - replacement.slots * len(windows),
        repair=replacement,
        search=WindowSearch(protect=protect)
        if len(windows) == 1
        else DisjointSearch(windows=len(windows), protect=protect),
        data=DataConfig(**{name: data[name] for name in _SPLIT if name != "seed"}),
        seed=data["seed"],
        stack=plan.stack,
    )
    options = RunOptions(overwrite=overwrite)
    result = compress(original, split, config, tokenizer=tokenizer, output=output, options=options)
    return RefitResult(result, value, before, len(result.plan.slots) - blocks, same_text)


def _load_like(original: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Load a checkpoint on the device of its original, in the less precise data type of the two."""
    model: PreTrainedModel = load(folder)
    if torch.finfo(original.dtype).eps > torch.finfo(model.dtype).eps:
        model = model.to(original.dtype)  # type: ignore[arg-type]
    model.to(original.device)  # type: ignore[arg-type]
    return model


def _replaced_windows(folder: str | Path) -> tuple[SurgeryPlan, list[range]]:
    """Return the plan of a checkpoint and its replaced windows; raise if they cannot be refitted."""
    plans = read_plans(folder)
    windows = [range(*splice.replaces) for splice in plans[0].splices if splice.replaces]
    if len(plans) != 1 or not windows or len(windows) != len(plans[0].splices):
        raise StreamlineError(
            f"{folder} was made by {len(plans)} surgeries with {len(windows)} replaced windows. Expected one surgery "
            "in which every module replaces a window. Compress the original again."
        )
    if any(before.stop == after.start for before, after in pairwise(windows)):
        raise StreamlineError(
            f"The windows {windows} of {folder} are adjacent, and would be refitted as one. Compress the original "
            "again."
        )
    return plans[0], windows


def _calibration_data(folder: str | Path) -> dict[str, Any]:
    """Return the data entry of a checkpoint; raise if the split cannot be reproduced from it."""
    entry = read_json(Path(folder) / CONFIG)["streamline_hooks"]["history"][0]
    data: dict[str, Any] = entry.get("calibration") or {}
    missing = [name for name in (*_SPLIT, "fingerprint") if name not in data]
    if missing:
        raise StreamlineError(
            f"{folder} does not record {', '.join(missing)} of its calibration text. Expected a checkpoint that "
            "`compress` wrote. Compress the original again."
        )
    return data


def _usable_kind(
    reasons: Mapping[str, str], replacement: ReplacementConfig | None, folder: str | Path
) -> ReplacementConfig:
    """Return the given replacement, or the first usable kind; raise if it cannot be used."""
    usable = [kind for kind, reason in reasons.items() if not reason]
    if not usable:
        listed = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        raise StreamlineError(
            f"No kind that gives a plain model can replace the windows of {folder}: {listed} Compress the original "
            "again with other windows (search.protect)."
        )
    if replacement is None:
        return REPLACEMENTS[usable[0]]()
    if replacement.kind not in usable:
        reason = reasons.get(replacement.kind) or "it does not give a repaired plain model"
        raise StreamlineError(
            f"replacement={replacement} cannot be used for {folder}: {reason.rstrip('.')}. Expected "
            f"{' or '.join(usable)}. Choose {usable[0]}."
        )
    return replacement


def _split_again(
    folder: str | Path, data: Mapping[str, Any], texts: Any, test_texts: Sequence[str] | None, tokenizer: Any
) -> TokenSplit:
    """Split the given text, or the recorded text, into parts of the recorded sizes."""
    if isinstance(texts, TokenSplit):
        return texts
    sizes: dict[str, Any] = {name: data[name] for name in _SPLIT}
    if texts is not None:
        return split_documents(texts, tokenizer, test_documents=test_texts, **sizes)
    try:
        documents, test_documents, shares, conversations = read_recorded_source(data.get("source") or {})
    except StreamlineError as error:
        raise StreamlineError(
            f"The calibration text of {folder} cannot be read again. {error} Pass the same text, with texts=... in "
            "Python or --calibration on the command line."
        ) from error
    tested = test_documents if test_texts is None else test_texts
    if not shares:
        return split_documents(documents, tokenizer, test_documents=tested, **sizes)
    mixture = {name: MixedSource(documents[name], share, name in conversations) for name, share in shares.items()}
    return mixed_split(mixture, tokenizer, test_documents=tested, **sizes)

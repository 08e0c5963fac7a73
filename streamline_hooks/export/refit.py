"""Fit the window of a model with splices again, from its original and the same text, as a kind that is plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.batch import batches_of
from streamline_hooks.calibration import split_documents
from streamline_hooks.checkpoint import compare_blocks, load, read_plans
from streamline_hooks.checkpoint.safety import CONFIG, read_json
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import perplexity
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig
from streamline_hooks.repair import FoldedConfig, ReplacementConfig
from streamline_hooks.result import CompressionResult
from streamline_hooks.selection import DisjointSearch, WindowSearch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = ("folded", "silenced")
_SPLIT = ("calibration_tokens", "validation_tokens", "test_tokens", "sequence_length", "seed")


@dataclass(frozen=True)
class Refitted:
    """A plain model in the place of one with splices, and what that costs.

    Attributes
    ----------
    result : CompressionResult
        Of the plain one.
    spliced_perplexity : float
        Of the one with splices, on the same test text.
    spliced_parameters : int
    slots : int
        Blocks, and so cache slots, that the plain one has more.
    """

    result: CompressionResult
    spliced_perplexity: float
    spliced_parameters: int
    slots: int

    def __str__(self) -> str:
        label = next(name for name in ("trained", "repaired", "removed") if name in self.result.perplexities)
        now, parameters = self.result.perplexities[label], self.result.parameters[1]
        more = (parameters - self.spliced_parameters) / 1e6
        return (
            f"{self.result.kind}: perplexity {now:.2f}, with splices {self.spliced_perplexity:.2f} "
            f"(x {now / self.spliced_perplexity:.3f}); {more:+.2f} M parameters, {self.slots:+d} cache slots"
        )


def refit(
    folder: str | Path,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    replacement: ReplacementConfig = FoldedConfig(),
    test_texts: Sequence[str] | None = None,
    stack: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Refitted:
    """Give up the same windows of the original again, with something plain in their place.

    Parameters
    ----------
    folder : str or Path
        Of a model with splices that `compress` made.
    original : transformers.PreTrainedModel
        What it was made of. It is changed, as by `compress`.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts, test_texts : sequence of str
        The same as then.
    replacement : FoldedConfig or SilencedConfig
    stack : str, optional
        Path of the stack, see `find_stack`.
    output, overwrite, say
        As for `compress`.

    Returns
    -------
    Refitted

    Raises
    ------
    StreamlineError
        If the folder's plan is not of one surgery with windows, if the original or the text is another one, or as
        `compress`.
    """
    if replacement.kind not in PLAIN:
        raise StreamlineError(
            f"refit: replacement={replacement} leaves no plain model, or none that is repaired. Expected one of "
            f"{PLAIN}. Pass FoldedConfig()."
        )
    plans = read_plans(folder)
    windows = [range(*splice.replaces) for splice in plans[0].splices if splice.replaces]
    if len(plans) != 1 or not windows or len(windows) != len(plans[0].splices):
        raise StreamlineError(
            f"{folder} was made by {len(plans)} surgeries with {len(windows)} windows that something stands for; only "
            "what one surgery put in the place of windows can be fitted again. Compress the original again instead."
        )
    if any(before.stop == after.start for before, after in pairwise(windows)):
        raise StreamlineError(
            f"The windows {windows} of {folder} touch, and would be fitted again as one. Compress the original again."
        )
    entry = read_json(Path(folder) / CONFIG)["streamline_hooks"]["history"][0]
    data: dict[str, Any] = entry.get("calibration") or {}
    lost = [name for name in (*_SPLIT, "fingerprint") if name not in data]
    if lost:
        raise StreamlineError(f"{folder} does not say on what it was calibrated ({', '.join(lost)}); compress again.")
    model = load(folder)
    kept = tuple(match.source for match in compare_blocks(original, model, stack=stack) if not match.changed)
    if kept != plans[0].kept:
        raise StreamlineError(
            f"The blocks of {folder} are not those of this original, which has {list(kept)} of the kept "
            f"{list(plans[0].kept)}. Name the model that it was made of; of a healed one that is not enough."
        )
    asked = {name: data[name] for name in _SPLIT}
    dealt = split_documents(texts, tokenizer, test_documents=test_texts, **asked)
    if dealt.fingerprint != data["fingerprint"]:
        raise StreamlineError(
            f"This is other text than {folder} was calibrated on (fingerprint {dealt.fingerprint}, then "
            f"{data['fingerprint']}). Give the same sources, with the same tokenizer, and the same text to test on, "
            "where there was some: what is in both is left out of the calibration."
        )
    value = perplexity(model, batches_of(dealt.test, 4), "with splices").value
    before, blocks = model.num_parameters(), len(plans[0].slots)
    del model
    gone = {k for window in windows for k in window}
    keep = tuple(k for k in range(plans[0].old_length) if k not in gone)
    config = CompressionConfig(
        remove=len(gone) - replacement.slots * len(windows),
        repair=replacement,
        search=WindowSearch(keep=keep) if len(windows) == 1 else DisjointSearch(windows=len(windows), keep=keep),
        data=DataConfig(**{name: value for name, value in asked.items() if name != "seed"}),
        seed=asked["seed"],
        stack=stack,
    )
    result = compress(
        original, tokenizer, texts, config, test_texts=test_texts, output=output, overwrite=overwrite, say=say
    )
    return Refitted(result, value, before, len(result.plan.slots) - blocks)

"""Compress a model: find the blocks that contribute least, replace them, train, measure and save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.calibration import PackedText, TokenSplit
from streamline_hooks.distributed import distributed_step
from streamline_hooks.errors import StreamlineError
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.pipeline.iterative import compress_in_rounds
from streamline_hooks.pipeline.one_round import compress_once
from streamline_hooks.repair import TrainingCallback
from streamline_hooks.result import CompressionResult
from streamline_hooks.statistics import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@distributed_step("compress")
@checked()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | TokenSplit | Mapping[str, PackedText] | Mapping[str, Sequence[Batch | Tensor]],
    config: CompressionConfig | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    profile: Profile | None = None,
    test_texts: Sequence[str] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    say: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Remove the blocks whose loss is repaired best. The model is changed in place.

    The hidden states at all block boundaries are compared in one pass. The search makes a shortlist of windows. Each is
    replaced by what ``config.repair`` describes, fitted by least squares, and verified: how far are the outputs from
    the original's on validation text? The best one is trained, if ``config.distillation`` is set, made permanent, and
    measured on text that nothing was chosen or fitted on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place. After an error it is as it was, unless the error occurs in measuring or saving at the end:
        then it is compressed, and `save` can write it.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Tokenizes documents, and is saved with the model. With batches it may be None, or an image processor.
    texts : sequence of str, TokenSplit, mapping of str to PackedText, or mapping of str to sequence of batches
        Documents, which are divided into disjoint parts for calibration, validation and test as ``config.data`` says.
        Or what is divided already: a `TokenSplit`, such as `mixed_split` returns for several sources; the three parts
        that `packed_text` returns, for models that keep the documents of a row apart; or batches for ``"calibration"``,
        ``"validation"`` and ``"test"``, as `image_parts`, `text_parts` and `pair_parts` return them, for any model. A
        classifier's accuracy is measured if the test batches have ``labels``.
    config : CompressionConfig, optional
        By default ``CompressionConfig()``: a quarter of the blocks, replaced by a linear map.
    teacher : transformers.PreTrainedModel, optional
        The original, if earlier surgery made `model` from it: the training learns from it, and the result is measured
        against it. By default the model itself. Windows are always verified against `model`.
    profile : Profile, optional
        A profile of this model, used instead of a pass.
    test_texts : sequence of str, optional
        Documents for the test part, if `texts` are documents. By default a part of them.
    output : str or Path, optional
        A folder to save the model to, with ``report.json``; see `streamline_hooks.report.write_report`.
    overwrite : bool
        Replace a folder that `save` wrote. Other folders that are not empty are refused.
    resume : bool
        Continue an interrupted training: call again with the same arguments. What comes before it is done again.
    checkpoint : str or Path, optional
        The file that an interrupted training is resumed from. By default beside `output`, if that is given.
    callbacks : sequence of TrainingCallback
        Called before and after each step and each validation of the training.
    say : callable
        Receives lines about what is planned and found.

    Returns
    -------
    CompressionResult

    Raises
    ------
    StreamlineError
        If the arguments are invalid. They are checked before any expensive step. In a distributed run every rank
        raises.

    Notes
    -----
    Ctrl-C during training ends the training: the best weights so far are kept and saved, and
    ``CompressionResult.training.interrupted`` is True; the command line exits with code 130. In several rounds it
    raises `TrainingInterrupted`. At any other time KeyboardInterrupt is raised.

    In a distributed run (an initialised `torch.distributed` group) every rank holds the whole model and is given the
    same arguments. All end with the same model, bit for bit. They share the profile, the moments, the verification, the
    training and the perplexities. What is searched for and solved is taken from rank 0, which alone saves, reports,
    shows bars, and lets the models generate and be timed, while the others wait.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import CompressionConfig, compress
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.randint(3, 60, (2, 8)) for _ in range(12)]
    >>> parts = {"calibration": batches[:8], "validation": batches[8:10], "test": batches[10:]}
    >>> result = compress(tiny_model("llama"), None, parts, CompressionConfig(remove=2))
    >>> len(result.plan.slots)
    6
    """
    config = config or CompressionConfig()
    common: dict[str, Any] = {
        "test_texts": test_texts,
        "output": output,
        "overwrite": overwrite,
        "resume": resume,
        "checkpoint": checkpoint,
        "callbacks": callbacks,
        "say": say,
    }
    if config.rounds == 1:
        return compress_once(
            model, tokenizer, texts, config, recorded=config, teacher=teacher, profile=profile, **common
        )
    if profile is not None or teacher is not None:
        raise StreamlineError(
            f"compress: a profile or a teacher was given for {config.rounds} rounds. Expected neither: each round "
            "ranks the repaired model again, and the original is the teacher. Leave it out, or use one round."
        )
    return compress_in_rounds(model, tokenizer, texts, config, **common)

"""The student whose prompts skip blocks: the maps that estimate the skipped states are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from streamline_hooks.core import IGNORE_INDEX, Batch, StreamlineError, get_logger, padding_mask, validate_arguments
from streamline_hooks.distillation.student import Student
from streamline_hooks.modeling import Task, get_logits, logits_to_keep, select_tokens
from streamline_hooks.surgery import LAST_TOKENS, PromptSkip, resume

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Continuation(Task):
    """A causal language model whose answers are those of the tokens that do not belong to the prompt."""

    name: str = "causal-lm"

    def answer_mask(self, batch: Batch | Tensor) -> Tensor:
        return _real_tokens(batch) & ~prompt_of(batch, last_tokens=1)

    def answers(self, output: Any, batch: Batch | Tensor) -> Tensor:
        logits, mask = get_logits(output), self.answer_mask(batch)
        return select_tokens(logits, mask[:, -logits.shape[1] :])  # a model may give only the last logits


class PromptSkipStudent(Student):
    """A model whose prompts skip a window of blocks, for `train`.

    The maps are trained in place, and the model does not change. In a training step the tokens of a prompt skip the
    window, the others run every block, and their answers are compared with those of the full model. As usual in
    fine-tuning, the labels of a batch are -100 at its prompt. Padding needs an ``attention_mask``; without one, every
    token counts as real.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    window : range
        The blocks that prompts skip.
    maps : sequence of torch.nn.Module or None
        For each block, the map from the state that enters the window to an estimate of the state that leaves the block;
        see `PromptSkip`.
    last_tokens : int
        Number of tokens at the end of a prompt that run every block; default 16.
    stack : str, optional
        Path of the block stack, see `find_stack`.

    Raises
    ------
    UnsupportedSurgery
        If prompts cannot skip the window; see `PromptSkip`.
    StreamlineError
        If there is no map to train, or a map shares weights with the model.

    Notes
    -----
    The projections of keys and values keep the weights of the model. If keys and values together have at most as many
    features as the hidden state (grouped-query attention), training these projections for prompts would add little: a
    map in front of them can already give every linear function of the state, apart from the norm in between.

    Examples
    --------
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> from streamline_hooks.distillation import DistillationConfig, train
    >>> student = PromptSkipStudent(tiny_model("llama"), range(6, 8), [LinearReplacement(32), None], last_tokens=1)
    >>> ids = torch.arange(3, 23).view(2, 10)
    >>> batches = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < 5, -100)}]
    >>> train(student, batches, batches, DistillationConfig(validations=1)).tokens
    20
    """

    compares_states: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        window: range,
        maps: Sequence[nn.Module | None],
        *,
        last_tokens: int = LAST_TOKENS,
        stack: str | None = None,
    ) -> None:
        for module in maps:
            if isinstance(module, nn.Module):
                module.eval()  # for the probe
        self._warned = False
        self.skip = PromptSkip(model, window, maps, last_tokens=last_tokens, stack=stack)
        named = {str(k): module for k, module in zip(self.skip.window, maps, strict=True) if module is not None}
        self._maps = nn.ModuleDict(named)  # by block, so that a run is not resumed with the maps of other blocks
        if not any(True for _ in self._maps.parameters()):
            raise StreamlineError(
                "PromptSkipStudent: there is no parameter to train. Expected a map with parameters for at least one "
                "block. Fit the maps with fit_prompt_skip."
            )
        super().__init__(model, [(window, self._maps)], stack=stack, task=_Continuation())
        if last_tokens != 1:  # files of runs before this setting, with 1, can be resumed
            self.settings = (f"last_tokens={last_tokens}",)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the mode of the maps; the model skips blocks only inside `run`."""
        self.modules = {"maps": [self._maps.train(self.training)]}
        try:
            yield
        finally:
            self._maps.eval()

    def run(self, entrance: Tensor, batch: Batch | Tensor, *, logits: bool, states: bool) -> tuple[Any, list[Tensor]]:
        """Run the model from the window on the states that enter it, (batch, tokens, features)."""
        last_tokens = self.skip.last_tokens
        prompt = prompt_of(batch, last_tokens)
        with self.applied():
            output = self.skip.resume(entrance.clone(), self._inputs(batch), prompt)
        if torch.is_grad_enabled() and not skips_any(batch, last_tokens):  # no map ran
            if not self._warned:
                logger.warning(
                    f"A training batch has no prompt of more than {last_tokens + 1} tokens, of which the first and the "
                    f"last {last_tokens} run every block, so it trains nothing. Use longer prompts, or a smaller "
                    "last_tokens."
                )
                self._warned = True
            zero = sum(parameter.sum() * 0 for parameter in self._maps.parameters())
            return get_logits(output) + zero, []
        return output, []

    def original_answers(self, exit_: Tensor | None, batch: Batch | Tensor) -> Tensor:
        """Return the answers of the full model for outputs of its last block, without a graph."""
        assert exit_ is not None
        with torch.no_grad():
            output = resume(self.model, len(self.stack), exit_.clone(), self._inputs(batch), stack=self.stack.path)
        return self.task.answers(output, batch)

    def _inputs(self, batch: Batch | Tensor) -> dict[str, Any]:
        """Return the arguments of the forward, which limit the LM head to the continuation if the model can.

        The labels are left out, because the model would compute a loss.
        """
        assert not isinstance(batch, Tensor)
        columns = self.task.answer_mask(batch).any(dim=0)  # type: ignore[union-attr]
        kept = len(columns) - int(columns.int().argmax())
        return {name: value for name, value in batch.items() if name != "labels"} | logits_to_keep(self.model, kept)


@validate_arguments(last_tokens=1)
def prompt_of(batch: Batch | Tensor, last_tokens: int = LAST_TOKENS) -> Tensor:
    """Return which tokens of a batch belong to its prompt and may skip blocks.

    These are the tokens that are followed by `last_tokens` tokens without label. The last tokens of a prompt are not
    among them; at least the last one predicts the first token after it.

    Parameters
    ----------
    batch : mapping
        ``input_ids`` and ``labels``, (batch, tokens), with the label -100 at the prompt; with padding also
        ``attention_mask``.
    last_tokens : int
        Number of tokens at the end of a prompt that run every block; default 16.

    Returns
    -------
    torch.Tensor
        Boolean mask, (batch, tokens), of real tokens.

    Raises
    ------
    StreamlineError
        If the batch has no labels.

    Examples
    --------
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100, 8]])}
    >>> prompt_of(batch, last_tokens=1)
    tensor([[ True,  True, False, False]])
    """
    labels = None if isinstance(batch, Tensor) else batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        raise StreamlineError(
            "The batch has no labels of shape (batch, tokens), which separate its prompt from its continuation. "
            f"Expected input_ids and labels, with the label {IGNORE_INDEX} at the prompt. Add them."
        )
    real = _real_tokens(batch)
    prompt, unlabeled = real.clone(), real & (labels == IGNORE_INDEX)
    document = _first_tokens(batch).cumsum(dim=1)
    for distance in range(1, last_tokens + 1):
        prompt[:, :-distance] &= unlabeled[:, distance:] & (document[:, :-distance] == document[:, distance:])
        prompt[:, -distance:] = False
    return prompt


def skips_any(batch: Batch | Tensor, last_tokens: int) -> bool:
    """Whether a token of a batch skips blocks: one of a prompt that is not the first of its sequence."""
    prompt = prompt_of(batch, last_tokens)
    return bool((prompt & ~_first_tokens(batch)).any())


def _first_tokens(batch: Batch | Tensor) -> Tensor:
    """Return the mask of the first real tokens of sequences and packed documents, (batch, tokens)."""
    assert not isinstance(batch, Tensor)
    real, positions = _real_tokens(batch), batch.get("position_ids")
    first = real & (real.cumsum(dim=1) == 1)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        first[:, 1:] |= real[:, 1:] & (positions.to(real.device).diff(dim=1) != 1)
    return first


def _real_tokens(batch: Batch | Tensor) -> Tensor:
    """Return the mask of the tokens of a batch with labels that are not padding, (batch, tokens)."""
    assert not isinstance(batch, Tensor)
    mask = padding_mask(batch)
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()

"""Define the task of a model: its answers in the output, and the distance between two answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamline_hooks.core import (
    Batch,
    Config,
    StreamlineError,
    batch_rows,
    count_tokens,
    rows_at_once,
    widest_float,
)
from streamline_hooks.core import padding_mask as mask_of
from streamline_hooks.modeling.hidden_state import require_batch_first, token_mask
from streamline_hooks.modeling.sentence_transformers import sentence_folder_of

TASKS = ("causal-lm", "masked-lm", "seq2seq", "image-classification", "text-classification", "embedding")
POOLINGS = ("mean", "first", "last", "pooler")

_UNITS = {"image-classification": "image", "text-classification": "text", "embedding": "embedding"}
_PROJECTED = ("image_embeds", "video_embeds", "audio_embeds", "text_embeds")
# Transformers' lists of classes. The first list with a model's class determines the task.
_LISTS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked-lm",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image-classification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "text-classification",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES": "embedding",
    "MODEL_MAPPING_NAMES": "embedding",
}


@dataclass(frozen=True)
class Task(Config):
    """The task of a model, which determines what its answers are and how they are compared.

    The answers of a language model are distributions over the vocabulary: for ``causal-lm`` one per real token, for
    ``seq2seq`` one per decoder token, for ``masked-lm`` one per token with a label (per real token without labels).
    Image positions in a text count as tokens. The answers of a classifier are distributions over the classes, one per
    image or text. The answers of an embedding model are vectors, one per text, image or sound.

    Attributes
    ----------
    name : {"causal-lm", "masked-lm", "seq2seq", "image-classification", "text-classification", "embedding"}
        The name of the task.
    pooling : {"", "mean", "first", "last", "pooler"}
        How hidden states become an embedding: the mean over the real tokens, the first or last real token, or the
        model's pooler. Default: the projection of models like CLIP, else the model's pooler for images and sounds, and
        the mean for text.

    Raises
    ------
    StreamlineError
        If the task or the pooling is unknown, or a pooling is set for another task than ``embedding``.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> Task.of(tiny_model("llama"))
    Task(name='causal-lm', pooling='')
    >>> print(Task("embedding", pooling="mean"))
    embedding:pooling=mean
    """

    name: str
    pooling: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in TASKS:
            raise StreamlineError(f"The task {self.name!r} is unknown. Expected one of {', '.join(TASKS)}. Choose one.")
        if self.pooling and (self.pooling not in POOLINGS or self.name != "embedding"):
            raise StreamlineError(
                f"The task {self.name!r} has no pooling {self.pooling!r}. Expected one of {', '.join(POOLINGS)}, and "
                "only for the task embedding. Change the pooling or the task."
            )

    def __str__(self) -> str:
        return f"{self.name}:pooling={self.pooling}" if self.pooling else self.name

    @classmethod
    def of(cls, model: nn.Module) -> Task:
        """Return the task of a model, from its class.

        The pooling of a sentence-transformers model is read from the folder from which it was loaded.

        Parameters
        ----------
        model : torch.nn.Module
            A Transformers model, with or without PEFT, or a model with ``num_classes`` as in timm and torchvision. A
            model with 0 classes returns embeddings.

        Raises
        ------
        StreamlineError
            If the task cannot be determined, or the sentence-transformers folder has an unknown pooling.
        """
        plain = _unwrap(model)
        config = getattr(plain, "config", None)
        names = [kind.__name__ for kind in type(plain).__mro__]
        name = task_from_class_names(names, getattr(config, "is_encoder_decoder", None)) or _task_from_attributes(plain)
        if not name:
            raise StreamlineError(
                f"The task of {type(plain).__name__} is unknown. Expected one of {', '.join(TASKS)}. Set it with "
                "Task(name) or --task."
            )
        # The embedding of CLIP's text model is at the end token; the model's pooler selects it.
        has_pooler = name == "embedding" and str(getattr(config, "model_type", "")).endswith("_text_model")
        sentence_folder = sentence_folder_of(plain) if name == "embedding" else None
        pooling = (
            sentence_folder.pooling
            if sentence_folder is not None and sentence_folder.is_embedding
            else "pooler"
            if has_pooler
            else ""
        )
        task = cls(name, pooling)
        task.check_model(plain)
        return task

    def check_model(self, model: nn.Module) -> None:
        """Raise if the head of a model is for several labels or regression, or its states have the tokens first."""
        if self.name == "embedding":
            for module in model.modules():
                require_batch_first(module)
        problem = getattr(getattr(_unwrap(model), "config", None), "problem_type", None)
        if self.name in _UNITS and self.gives_distributions and problem not in (None, "single_label_classification"):
            raise StreamlineError(
                f"{type(model).__name__} is for {problem}, so its logits are not a distribution over classes and "
                "have no KL divergence. Expected single_label_classification. Repair its hidden states instead: "
                "fit_windows, or the loss mse, relative or cosine with Task('embedding') on the model without its head."
            )

    @property
    def gives_distributions(self) -> bool:
        """Whether the answers are distributions, given by logits, and not vectors."""
        return self.name != "embedding"

    @property
    def is_causal_lm(self) -> bool:
        """Whether the model has a perplexity on text without labels."""
        return self.name == "causal-lm"

    @property
    def unit(self) -> str:
        """Name of what one answer belongs to: token, image, text or embedding."""
        return _UNITS.get(self.name, "token")

    @property
    def distance(self) -> str:
        """Name of the distance between two answers."""
        return f"KL (nats per {self.unit})" if self.gives_distributions else "1 - cosine"

    def count(self, batch: Batch | Tensor) -> int:
        """Return the number of answers for a batch, without running the model."""
        if self.name in _UNITS:
            return batch_rows(batch)
        mask = self.answer_mask(batch)
        return count_tokens(batch) if mask is None else int(mask.sum())

    def answer_mask(self, batch: Batch | Tensor) -> Tensor | None:
        """Return the mask of the tokens with an answer, (batch, tokens); None if all real tokens have one."""
        if self.name == "masked-lm":
            return None if isinstance(batch, Tensor) else _label_mask(batch)
        return _decoder_mask(batch) if self.name == "seq2seq" else None

    def answers(self, output: Any, batch: Batch | Tensor) -> Tensor:
        """Return the answers in the output of a model.

        Parameters
        ----------
        output : Any
            An output of a Transformers model, or a tensor.
        batch : mapping or torch.Tensor
            The batch, or the keyword arguments of the forward.

        Returns
        -------
        torch.Tensor
            Logits or embeddings of shape (answers, features); a view of the output if no token is excluded.

        Raises
        ------
        StreamlineError
            If the output contains no answers for this task.

        Examples
        --------
        >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> tuple(Task("causal-lm").answers(torch.zeros(1, 3, 9), batch).shape)
        (2, 9)
        >>> Task("embedding").answers(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]), batch)
        tensor([[0.5000, 0.5000]])
        """
        if not self.gives_distributions:
            return self._embeddings(output, batch)
        logits = get_logits(output)
        if self.name not in _UNITS:
            mask = self.answer_mask(batch)
            return select_tokens(logits, token_mask(logits, _attention_mask(batch) if mask is None else mask))
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise StreamlineError(
                f"The logits of the model have the shape {tuple(logits.shape)}. Expected (batch, classes) with at "
                f"least two classes for the task {self.name}. Choose another task or model."
            )
        return logits

    def _embeddings(self, output: Any, batch: Batch | Tensor) -> Tensor:
        projected = [vectors for name in _PROJECTED if (vectors := _output_tensor(output, name)) is not None]
        if projected and not self.pooling:
            if len({vectors.shape for vectors in projected}) > 1:
                raise StreamlineError(
                    f"The model returned {' and '.join(str(len(vectors)) for vectors in projected)} embeddings of "
                    "paired inputs, such as images and texts. Expected equal numbers. Pass batches of pairs."
                )
            return torch.cat([normalize(vectors.float(), dim=-1) for vectors in projected], dim=-1)
        states = output if isinstance(output, Tensor) else _output_tensor(output, "last_hidden_state")
        pooled = _output_tensor(output, "pooler_output")
        is_text = not batch.is_floating_point() if isinstance(batch, Tensor) else "input_ids" in batch
        if pooled is not None and (self.pooling == "pooler" or not (self.pooling or is_text)):
            return pooled.flatten(1)
        if states is None or self.pooling == "pooler":
            raise StreamlineError(
                f"The model returned a {type(output).__name__} without "
                f"{'hidden states' if states is None else 'pooler_output'}. Expected last_hidden_state, image_embeds "
                "or a tensor. Pass a model that returns them, or choose another pooling."
            )
        if states.ndim == 2:
            return states
        # The labels of a batch say which tokens are predicted, not which are real.
        inputs = batch if isinstance(batch, Tensor) else {name: batch[name] for name in batch if name != "labels"}
        decoder_mask = _decoder_mask(inputs)
        mask = token_mask(states, _attention_mask(batch) if decoder_mask is None else decoder_mask)
        if not bool(mask.any(dim=1).all()):
            raise StreamlineError(
                "A sequence has no real token and no embedding. Expected at least one real token. Remove the sequence."
            )
        if self.pooling in ("first", "last"):
            count = mask.long().cumsum(dim=1)
            return states[(count == (1 if self.pooling == "first" else count[:, -1:])) & mask]
        weights = mask[..., None].float()
        return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def task_from_class_names(names: list[str], encoder_decoder: bool | None = None) -> str:
    """Return the task of a model from the names of its class and base classes; "" if unknown.

    `encoder_decoder` is ``config.is_encoder_decoder``: some lists of Transformers contain both kinds of models.
    """
    from transformers.models.auto import modeling_auto

    for name in names:
        for listed, task in _LISTS.items():
            for known in getattr(modeling_auto, listed, {}).values():
                if name == known or (isinstance(known, (tuple, list)) and name in known):
                    if task == "seq2seq" and encoder_decoder is False:
                        return "causal-lm"
                    takes_images = listed == "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
                    return "seq2seq" if takes_images and encoder_decoder else task
    return ""


def get_logits(output: Any) -> Tensor:
    """Return the logits in the output of a model; raise `StreamlineError` if there are none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise StreamlineError(
            f"The model returned a {type(output).__name__} without logits. Expected a model with its LM head. Pass one."
        )
    return logits


def select_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of the real tokens, (tokens, vocabulary); a view of `logits` if there is no padding."""
    real = mask.to(logits.device)
    return logits.flatten(0, 1) if bool(real.all()) else logits[real]


def _task_from_attributes(model: nn.Module) -> str:
    head, can_generate = getattr(model, "get_output_embeddings", None), getattr(model, "can_generate", None)
    if callable(head) and head() is not None and callable(can_generate) and can_generate():
        return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal-lm"
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        return "image-classification" if classes else "embedding"
    return ""


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of PEFT and torch (compiled, data-parallel)."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = get_base_model() if callable(get_base_model) else model
    return base


def _output_tensor(output: Any, name: str) -> Tensor | None:
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _label_mask(batch: Batch) -> Tensor | None:
    labels = batch.get("labels")
    return labels != -100 if isinstance(labels, Tensor) and labels.ndim == 2 else None


def _decoder_mask(batch: Batch | Tensor) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None
    if isinstance(mask := batch.get("decoder_attention_mask"), Tensor):
        return mask
    ids = batch.get("decoder_input_ids")
    label_mask = _label_mask(batch)
    return torch.ones_like(ids) if label_mask is None and isinstance(ids, Tensor) else label_mask


def _attention_mask(batch: Batch | Tensor) -> Tensor | None:
    return None if isinstance(batch, Tensor) else mask_of(batch)


def reference_outputs(task: Task, answers: Tensor) -> Tensor:
    """Convert the original's answers, (answers, features), to log-probabilities or unit vectors, at least float32."""
    upcast = answers.float()
    return upcast.log_softmax(dim=-1) if task.gives_distributions else normalize(upcast, dim=-1)


def sum_distance(task: Task, reference: Tensor, answers: Tensor) -> float:
    """Return the sum of KL(original ‖ other) in nats, or of 1 − cosine, over answers of shape (answers, features).

    `reference` is the result of `reference_outputs`.
    """
    if task.gives_distributions:
        return summed_kl(reference, answers)
    # Half the squared distance of unit vectors is 1 - cos, without cancellation near 1.
    return float((reference - normalize(answers.float(), dim=-1)).square().sum(dtype=torch.float64)) / 2


def summed_kl(reference: Tensor, other: Tensor) -> float:
    """Return the sum of the KL divergence over tokens, from log-probabilities and logits."""
    wide, rows = widest_float(reference.device), rows_at_once(reference.shape[-1], reference.device)
    total = torch.zeros((), dtype=wide, device=reference.device)
    for p, q in zip(reference.split(rows), other.split(rows), strict=True):
        total += kl_by_token(p, q).sum(dtype=wide)
    return float(total)


def kl_by_token(reference: Tensor, other: Tensor) -> Tensor:
    """Return the KL divergence of each token in nats, from log-probabilities and logits."""
    difference = reference - other.float().log_softmax(dim=-1)
    return difference.mul_(reference.exp()).sum(dim=-1)

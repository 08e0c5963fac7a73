"""What a model is for: which of its output is its answer, and how two answers are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.batch import real_tokens as mask_of
from streamline_hooks.core.config import Config
from streamline_hooks.distributed import sequences_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import require_batch_first, token_mask
from streamline_hooks.sentence_folder import sentence_folder_of

TASKS = ("causal-lm", "masked-lm", "seq2seq", "image-classification", "text-classification", "embedding")
POOLINGS = ("mean", "first", "last", "pooler")

_UNITS = {"image-classification": "image", "text-classification": "text", "embedding": "embedding"}
_PROJECTED = ("image_embeds", "video_embeds", "audio_embeds", "text_embeds")
# Transformers' own lists of classes; the first that has a model's class says what it is for.
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
    """What a model is for.

    Attributes
    ----------
    name : {"causal-lm", "masked-lm", "seq2seq", "image-classification", "text-classification", "embedding"}
        The answer is a distribution over the vocabulary for each real token (of a ``seq2seq`` model for each of the
        decoder's, of a ``masked-lm`` for each that its ``labels`` name, where a batch has some), one over the classes
        for each image or text, or a vector for each. The places of images among text count as tokens.
    pooling : {"", "mean", "first", "last", "pooler"}
        What an embedding is made of, where a model gives states: their mean over the real tokens, the first or the last
        real token's, or what the model pools itself. Left empty, it is the projection that CLIP's kin return; else the
        model's own for images and sounds, where it has one, and the mean for text.

    Raises
    ------
    StreamlineError
        If there is no such task or pooling, or a pooling for what is no embedding.

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
            raise StreamlineError(f"There is no task {self.name!r}; expected one of {', '.join(TASKS)}.")
        if self.pooling and (self.pooling not in POOLINGS or self.name != "embedding"):
            raise StreamlineError(
                f"The pooling {self.pooling!r} of the task {self.name!r} is not known; expected one of "
                f"{', '.join(POOLINGS)}, of the task embedding alone."
            )

    def __str__(self) -> str:
        return f"{self.name}:pooling={self.pooling}" if self.pooling else self.name

    @classmethod
    def of(cls, model: nn.Module) -> Task:
        """The task of a model, where it is clear from its class; the pooling of sentence-transformers, if it is theirs.

        Parameters
        ----------
        model : torch.nn.Module
            Of Transformers, in PEFT's wrapper or not, or with a number of classes (``num_classes``), as timm's and
            torchvision's have it; 0 of them make embeddings.

        Raises
        ------
        StreamlineError
            If it is not clear, or the folder of sentence-transformers that it was loaded from pools in another way.
        """
        plain = _inside(model)
        config = getattr(plain, "config", None)
        names = [kind.__name__ for kind in type(plain).__mro__]
        name = task_of_classes(names, getattr(config, "is_encoder_decoder", None)) or _task_of_parts(plain)
        if not name:
            raise StreamlineError(
                f"It is not clear what {type(plain).__name__} is for. Say it: Task(name), or --task, with one of "
                f"{', '.join(TASKS)}."
            )
        # CLIP's text is what its end token says, which its model pools itself.
        pools = name == "embedding" and str(getattr(config, "model_type", "")).endswith("_text_model")
        sentence = sentence_folder_of(plain) if name == "embedding" else None
        pooling = sentence.pooling if sentence is not None and sentence.is_embedding else "pooler" if pools else ""
        task = cls(name, pooling)
        task.require_fits(plain)
        return task

    def require_fits(self, model: nn.Module) -> None:
        """Raise if a model does not give what is compared.

        Raises
        ------
        StreamlineError
            If its head is for several labels at once, or for numbers; or if its states have the tokens in front, which
            a mean of each sequence would mix up.
        """
        if self.name == "embedding":
            for module in model.modules():
                require_batch_first(module)
        said = getattr(getattr(_inside(model), "config", None), "problem_type", None)
        if self.name in _UNITS and self.gives_distributions and said not in (None, "single_label_classification"):
            raise StreamlineError(
                f"{type(model).__name__} is for {said}: what it says is no distribution over its classes, so that KL "
                "does not compare it. Repair it by its states (fit_windows, or a loss of mse, relative or "
                "cosine with Task('embedding') on the model without its head)."
            )

    @property
    def gives_distributions(self) -> bool:
        """Whether an answer is a distribution, given by logits, and not a vector."""
        return self.name != "embedding"

    @property
    def is_of_text(self) -> bool:
        """Whether text without labels has a perplexity under the model."""
        return self.name == "causal-lm"

    @property
    def unit(self) -> str:
        """What there is an answer for: a token, an image, a text, an embedding."""
        return _UNITS.get(self.name, "token")

    @property
    def distance(self) -> str:
        """What two answers are compared by, in words."""
        article = "an" if self.unit == "image" else "a"
        return f"KL (nats {article} {self.unit})" if self.gives_distributions else "1 - cosine"

    def count(self, batch: Batch | Tensor) -> int:
        """How many answers there are to a batch, known before the model is run."""
        if self.name in _UNITS:
            return sequences_of(batch)
        mask = None if isinstance(batch, Tensor) else self._own_mask(batch)
        return tokens_of(batch) if mask is None else int(mask.sum())

    def _own_mask(self, given: Batch) -> Tensor | None:
        """The places that have an answer, where they are not all real tokens."""
        if self.name == "masked-lm":  # the places that are to be filled in
            labels = given.get("labels")
            return labels != -100 if isinstance(labels, Tensor) and labels.ndim == 2 else None
        return _mask_of_decoder(given) if self.name == "seq2seq" else None

    def answers(self, output: Any, given: Batch | Tensor) -> Tensor:
        """The answers in what a model returned.

        Parameters
        ----------
        output : Any
            Of its forward; one of Transformers' outputs, or a tensor.
        given : mapping or torch.Tensor
            What the forward was called with, or the batch that it was made of.

        Returns
        -------
        torch.Tensor
            Logits, or vectors, of shape (answers, features); a view where nothing is left out.

        Raises
        ------
        StreamlineError
            If the output has no such answer, or one that cannot be compared.

        Examples
        --------
        >>> given = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> tuple(Task("causal-lm").answers(torch.zeros(1, 3, 9), given).shape)
        (2, 9)
        >>> Task("embedding").answers(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]), given)
        tensor([[0.5000, 0.5000]])
        """
        if not self.gives_distributions:
            return self._embeddings(output, given)
        logits = logits_of(output)
        if self.name in _UNITS:
            return self._of_classes(logits)
        own = None if isinstance(given, Tensor) else self._own_mask(given)
        return real_tokens(logits, token_mask(logits, _mask_of(given) if own is None else own))

    def _of_classes(self, logits: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise StreamlineError(
                f"The model's logits have the shape {tuple(logits.shape)}; expected (batch, classes) with two classes "
                f"or more for the task {self.name}. A single number is no distribution."
            )
        return logits

    def _embeddings(self, output: Any, given: Batch | Tensor) -> Tensor:
        projected = [one for name in _PROJECTED if (one := _tensor(output, name)) is not None]
        if projected and not self.pooling:
            if len({one.shape for one in projected}) > 1:
                raise StreamlineError(
                    f"The model was given {' and '.join(str(len(one)) for one in projected)} things to be paired, such "
                    "as images and texts; give as many, so that the pairs can be compared."
                )
            return torch.cat([normalize(one.float(), dim=-1) for one in projected], dim=-1)
        states = output if isinstance(output, Tensor) else _tensor(output, "last_hidden_state")
        own = _tensor(output, "pooler_output")
        text = not given.is_floating_point() if isinstance(given, Tensor) else "input_ids" in given
        if own is not None and (self.pooling == "pooler" or not (self.pooling or text)):
            return own.flatten(1)
        if states is None or self.pooling == "pooler":
            raise StreamlineError(
                f"The model returned a {type(output).__name__} without {'states' if states is None else 'a pooler'}; "
                "give one that returns last_hidden_state, image_embeds or a tensor, or choose another pooling."
            )
        if states.ndim == 2:
            return states
        decoded = None if isinstance(given, Tensor) else _mask_of_decoder(given)
        mask = token_mask(states, _mask_of(given) if decoded is None else decoded)
        if not bool(mask.any(dim=1).all()):
            raise StreamlineError("A sequence has no real token, so that there is nothing to embed; leave it out.")
        if self.pooling in ("first", "last"):
            places = mask.long().cumsum(dim=1)
            chosen = (places == (1 if self.pooling == "first" else places[:, -1:])) & mask
            return states[chosen]
        weights = mask[..., None].float()
        return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def task_of_classes(names: list[str], encoder_decoder: bool | None = None) -> str:
    """Return the task of a model by the names of its class and base classes; empty if unknown.

    `encoder_decoder` resolves lists that contain both audio or vision decoders and others.
    """
    from transformers.models.auto import modeling_auto

    for name in names:
        for listed, task in _LISTS.items():
            for known in getattr(modeling_auto, listed, {}).values():
                if name == known or (isinstance(known, (tuple, list)) and name in known):
                    if task == "seq2seq" and encoder_decoder is False:
                        return "causal-lm"
                    sees = listed == "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
                    return "seq2seq" if sees and encoder_decoder else task
    return ""


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output; raise if there are none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise StreamlineError(
            f"The model returned a {type(output).__name__} without logits; give one with its LM head."
        )
    return logits


def real_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of the real tokens, (tokens, vocabulary); a view if there is no padding."""
    real = mask.to(logits.device)
    return logits.flatten(0, 1) if bool(real.all()) else logits[real]


def _task_of_parts(model: nn.Module) -> str:
    head, writes = getattr(model, "get_output_embeddings", None), getattr(model, "can_generate", None)
    if callable(head) and head() is not None and callable(writes) and writes():
        return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal-lm"
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        return "image-classification" if classes else "embedding"
    return ""


def _inside(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or one of torch's: compiled, or of one of several processes."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    inside = getattr(model, "get_base_model", None)
    found: nn.Module = inside() if callable(inside) else model
    return found


def _tensor(output: Any, name: str) -> Tensor | None:
    found = getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _masks(given: Batch) -> Iterator[Tensor]:
    if isinstance(mask := given.get("decoder_attention_mask"), Tensor):
        yield mask
    if isinstance(labels := given.get("labels"), Tensor) and labels.ndim == 2:
        yield labels != -100
    if isinstance(ids := given.get("decoder_input_ids"), Tensor):
        yield torch.ones_like(ids)


def _mask_of_decoder(given: Batch) -> Tensor | None:
    return next(_masks(given), None)


def _mask_of(given: Batch | Tensor) -> Tensor | None:
    return None if isinstance(given, Tensor) else mask_of(given)

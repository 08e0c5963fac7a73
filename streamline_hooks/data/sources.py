"""Read calibration data of one or several sources: existing text, generated text, images and pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.core import Processes, StreamlineError, get_logger
from streamline_hooks.data.documents import Documents, read_documents
from streamline_hooks.data.image_texts import image_text_parts, read_image_texts
from streamline_hooks.data.images import Images, image_batches, image_parts, read_images, split_images
from streamline_hooks.data.mixture import MixedSource, mixed_split, sequences_by_source
from streamline_hooks.data.packing import PackedText, PackingConfig, packed_text
from streamline_hooks.data.self_generated import SelfGenerationConfig, self_generated
from streamline_hooks.data.split import PARTS
from streamline_hooks.data.text_batches import text_parts
from streamline_hooks.data.text_pairs import pair_parts, read_pairs
from streamline_hooks.modeling import forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.data.split import TokenSplit
    from streamline_hooks.modeling import Task

    Sources = Sequence[str | Path]

logger = get_logger(__name__)


GENERATED_SOURCES = ("self", "chat")
"""Sources whose text the model generates: ``self`` for answers, ``chat`` for whole conversations."""


@dataclass(frozen=True)
class TextSources:
    """Sources of calibration text: files, folders, data sets, ``pydoc``, ``self`` and ``chat``.

    With `shares` the sources are a mixture; without, they are concatenated. `temperature` applies to generated text.
    """

    names: tuple[str, ...] = ("pydoc",)
    shares: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.generated and len(self.names) > 1 and not self.shares:
            even = ",".join(f"{name}:{1 / len(self.names):.6g}" for name in self.names)
            raise StreamlineError(
                f"The source {self.generated[0]!r} was given with other sources and without shares. Expected it as the "
                f"only source, or a share for each source. Leave the other sources out, or give --calibration {even}."
            )

    @property
    def generated(self) -> list[str]:
        """Return the names of the sources that the model generates."""
        return [name for name in self.names if name in GENERATED_SOURCES]

    @property
    def special(self) -> str:
        """Return the command-line option if text is generated or mixed by shares, otherwise an empty string."""
        if not (self.generated or self.shares):
            return ""
        return f"--calibration {self.generated[0] if self.generated else 'with shares'}"

    def read(self) -> dict[str, list[str]]:
        """Return the existing documents: by source for a mixture, otherwise all under the key ``text``."""
        if self.shares:
            return {name: read_documents(name) for name in self.names if name not in GENERATED_SOURCES}
        return {} if self.generated else {"text": read_documents(self.names)}

    def generators(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Mapping[str, int],
        *,
        sequence_length: int,
        seed: int,
        cache: Path | None,
    ) -> dict[str, Callable[[], list[str]]]:
        """Return the functions that generate text, by source; `tokens` are the sizes of the parts."""
        if self.shares:
            sequences_by_source(self.shares, tokens, sequence_length)

        def generator(name: str) -> Callable[[], list[str]]:
            # Generate more than the share, because documents are truncated and repeated paragraphs are left out.
            needed = self.shares.get(name, 1.0) * sum(tokens.values()) * 1.05 + len(tokens) * sequence_length
            size = math.ceil(needed)

            def generate() -> list[str]:
                config = SelfGenerationConfig(
                    sequence_length=sequence_length,
                    temperature=self.temperature,
                    conversation=name == "chat",
                    seed=seed,
                )
                return Documents(self_generated(model, tokenizer, config, tokens=size, cache=cache), (name,))

            return generate

        return {name: generator(name) for name in self.generated}

    def packed(self, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, int]) -> dict[str, PackedText]:
        """Return rows of packed documents for each part; every rank gets all rows. See `mixed` for `sizes`."""
        return packed_text(
            self.names,
            tokenizer,
            {part: sizes[f"{part}_tokens"] for part in PARTS},
            PackingConfig(sequence_length=sizes["sequence_length"], seed=sizes["seed"]),
            processes=Processes(0, 1),
        )

    def mixed(
        self,
        documents: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        sizes: Mapping[str, int],
        test_documents: Sequence[str] | None,
    ) -> TokenSplit | None:
        """Return the split of a mixture, or None if the sources are no mixture and `split_documents` applies.

        `documents` are given by source; `sizes` are the arguments of `mixed_split`: seed, part sizes, sequence length.
        """
        if not self.shares and "chat" not in self.names:
            return None
        shares = self.shares or {"chat": 1.0}
        mixture = {name: MixedSource(documents[name], share, name == "chat") for name, share in shares.items()}
        return mixed_split(mixture, tokenizer, test_documents=test_documents, **sizes)


_MASKED = 0.15  # fraction of masked tokens, as in BERT


@dataclass(frozen=True)
class PartSizes:
    """Sizes of the parts, in tokens for text and in examples for images and pairs, and sizes of the batches."""

    tokens: dict[str, int]
    examples: dict[str, int]
    sequence_length: int
    batch_size: int
    seed: int


def read_recorded_source(record: Mapping[str, Any]) -> tuple[Any, Documents | None, Mapping[str, float], list[str]]:
    """Read the text described by `TokenSplit.source` again.

    Parameters
    ----------
    record : mapping
        The source, as recorded in the calibration data of a checkpoint.

    Returns
    -------
    documents : Documents or dict of str to Documents
        The text, or the text of each source of a mixture.
    test_documents : Documents or None
        The separate test text, if any.
    shares : dict of str to float
        The shares of a mixture; otherwise empty.
    conversations : list of str
        The sources of a mixture whose documents are whole conversations.

    Raises
    ------
    StreamlineError
        If no source is recorded, the text was generated, or a source cannot be read.

    Examples
    --------
    >>> documents, test_documents, shares, _ = read_recorded_source({"sources": ["pydoc"]})
    >>> documents == read_documents("pydoc"), test_documents, shares
    (True, None, {})
    """
    mixture = list(record.get("mixture") or ())
    names = [name for entry in mixture for name in entry["sources"]] or list(record.get("sources") or ())
    if not names:
        raise StreamlineError(
            "No source of the calibration text is recorded: it was given in Python as strings, batches or packed rows. "
            "Expected recorded files or data sets. Give the text again."
        )
    if generated := [name for name in names if name in GENERATED_SOURCES]:
        raise StreamlineError(
            f"The calibration text is {' and '.join(generated)}, which the original model generated; it is not stored. "
            "Expected recorded files or data sets. Give a text."
        )
    test = read_documents(record["test"]) if record.get("test") else None
    if not mixture:
        return read_documents(names), test, {}, []
    documents = {entry["name"]: read_documents(entry["sources"]) for entry in mixture}
    shares = {entry["name"]: float(entry["share"]) for entry in mixture}
    return documents, test, shares, [entry["name"] for entry in mixture if entry["conversation"]]


def task_batches(
    model: Any,
    processor: Any,
    task: Task,
    sources: Sources | None,
    amounts: PartSizes,
    test: Sources | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Read sources and create the batches of each part for vision, encoder, encoder-decoder and image-text models.

    `processor` is the model's image processor, tokenizer, or processor of images with texts, see `load_processor`.
    `test` is a separate source of the test part, for images only. The interpretation of class labels is logged.
    """
    takes_text, takes_images = accepted_modalities(model)
    if takes_text and takes_images:
        return _image_text_batches(model, processor, task, sources, amounts, test)
    if (takes_images or task.name == "seq2seq") and not sources:
        what = "pairs of texts (JSONL or Parquet)" if takes_text else "images (a folder or Parquet)"
        raise StreamlineError(
            f"{type(model).__name__} needs {what}, and no source was given. Expected a file or folder. Name it with "
            "--calibration, or with --text of evaluate."
        )
    if takes_images:
        counts = {name: count for name, count in amounts.examples.items() if not (test and name == "test")}
        images = _read_labeled_images(model, task, sources or [])
        parts = image_parts(images, processor, counts, batch_size=amounts.batch_size, seed=amounts.seed)
        if test and "test" in amounts.examples:
            labeled = _read_labeled_images(model, task, test)
            count = min(len(labeled), amounts.examples["test"])
            test_images = split_images(labeled, {"test": count}, amounts.seed)["test"]
            parts["test"] = image_batches(test_images, processor, amounts.batch_size)
        return parts
    if test:
        raise StreamlineError(
            f"--test is not available for {task}. Expected --test only for images and causal language models. Leave it "
            "out: the test part is split from the calibration source."
        )
    options: dict[str, Any] = {"batch_size": amounts.batch_size, "seed": amounts.seed}
    length = amounts.sequence_length
    if task.name == "seq2seq":
        options["lengths"] = length, max(2, length // 4)
        return pair_parts(read_pairs(sources or []), processor, amounts.examples, model, **options)
    options |= {"sequence_length": length, "masked": _MASKED if task.name == "masked-lm" else 0.0}
    return text_parts(read_documents(sources or "pydoc"), processor, amounts.tokens, **options)


def _image_text_batches(
    model: Any, processor: Any, task: Task, sources: Sources | None, amounts: PartSizes, test: Sources | None
) -> dict[str, list[dict[str, Any]]]:
    """Return the batches of each part for a model of images with texts."""
    if not sources:
        raise StreamlineError(
            f"{type(model).__name__} needs images with texts, and no source was given. Expected a JSONL or Parquet "
            "file with the columns image and text. Name it with --calibration, or with --text of evaluate."
        )
    if test:
        raise StreamlineError(
            "--test is not available for images with texts. Expected --test only for images and causal language "
            "models. Leave it out: the test part is split from the calibration source."
        )
    return image_text_parts(
        read_image_texts(sources),
        processor,
        amounts.examples,
        batch_size=amounts.batch_size,
        text_tokens=amounts.sequence_length,
        seed=amounts.seed,
        labels=task.is_causal_lm,
    )


def accepted_modalities(model: Any) -> tuple[bool, bool]:
    """Return whether the model's forward accepts text, and whether it accepts images."""
    arguments = forward_parameters(model)
    return "input_ids" in arguments, "pixel_values" in arguments


def _read_labeled_images(model: Any, task: Task, sources: Sources) -> Images:
    """Read images with the model's class numbers as labels; drop labels that do not match the model's classes."""
    images = read_images(sources)
    if images.labels is None or task.name != "image-classification":
        return Images(images.pictures)
    names: Mapping[int, str] = getattr(model.config, "id2label", None) or {}
    model_classes = [names[number] for number in sorted(names)]
    if images.classes is not None and set(images.classes) <= set(model_classes):
        return read_images(sources, classes=model_classes)
    if images.classes is None and max(images.labels) + 1 == len(model_classes):
        logger.info("labels     the numbers in the file are used as the model's class numbers")
        return images
    file_classes = ", ".join((images.classes or ("numbers",))[:4])
    logger.info(
        f"labels     {file_classes}, ... are not among the model's classes ({', '.join(model_classes[:4])}, ...), so "
        "no accuracy is computed; name the folders as in config.id2label"
    )
    return Images(images.pictures)

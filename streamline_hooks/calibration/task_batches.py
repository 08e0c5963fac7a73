"""Batches for any task: images, texts for encoders, pairs for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.calibration.documents import read_documents
from streamline_hooks.calibration.images import Images, image_batches, image_parts, read_images, split_images
from streamline_hooks.calibration.text_batches import text_parts
from streamline_hooks.calibration.text_pairs import pair_parts, read_pairs
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import forward_arguments

if TYPE_CHECKING:
    from streamline_hooks.task import Task

    Sources = Sequence[str | Path]

_MASKED = 0.15  # share of the tokens, as BERT was trained


@dataclass(frozen=True)
class Amounts:
    """Sizes of the parts and batches.

    Attributes
    ----------
    tokens : dict of str to int
        Tokens of text per part.
    examples : dict of str to int
        Images, or pairs of texts, per part.
    sequence_length, batch_size, seed : int
    """

    tokens: dict[str, int]
    examples: dict[str, int]
    sequence_length: int
    batch_size: int
    seed: int


def task_batches(
    model: Any,
    processor: Any,
    task: Task,
    sources: Sources | None,
    amounts: Amounts,
    say: Callable[[str], None],
    test: Sources | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Read files and make the batches of each part for a model that is not a causal language model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    processor : image processor or tokenizer
    task : Task
    sources : sequence of str or Path, optional
        Images, documents or pairs.
    amounts : Amounts
    say : callable
        Receives a line about the labels.
    test : sequence of str or Path, optional
        Source of the test part, for images.

    Raises
    ------
    StreamlineError
        If the model takes images and text together, or a source is missing.
    """
    takes_text, takes_images = takes(model)
    if takes_text and takes_images:
        raise StreamlineError(
            f"{type(model).__name__} takes images and texts together, which no file of one kind gives. Call "
            "streamline_hooks.compress in Python, with batches that hold both."
        )
    if (takes_images or task.name == "seq2seq") and not sources:
        what = "pairs of texts (JSONL or Parquet)" if takes_text else "images (a folder or Parquet)"
        raise StreamlineError(f"{type(model).__name__} is calibrated on {what}; name them with --calibration.")
    if takes_images:
        return _image_parts(model, processor, task, sources or [], amounts, say, test)
    if test:
        raise StreamlineError(f"--test goes with images and with text; for {task} the parts are dealt from one source.")
    options: dict[str, Any] = {"batch_size": amounts.batch_size, "seed": amounts.seed}
    length = amounts.sequence_length
    if task.name == "seq2seq":
        options |= {"source_length": length, "target_length": max(2, length // 4)}
        return pair_parts(read_pairs(sources or []), processor, amounts.examples, model, **options)
    options |= {"sequence_length": length, "masked": _MASKED if task.name == "masked-lm" else 0.0}
    return text_parts(read_documents(sources or "pydoc"), processor, amounts.tokens, **options)


def takes(model: Any) -> tuple[bool, bool]:
    """Return whether the forward of a model takes text, and whether it takes images."""
    arguments = forward_arguments(model)
    return "input_ids" in arguments, "pixel_values" in arguments


def _image_parts(
    model: Any,
    processor: Any,
    task: Task,
    sources: Sources,
    amounts: Amounts,
    say: Callable[[str], None],
    test: Sources | None,
) -> dict[str, list[dict[str, Any]]]:
    counts = {name: count for name, count in amounts.examples.items() if not (test and name == "test")}
    images = _labelled(model, task, sources, say)
    parts = image_parts(images, processor, counts, batch_size=amounts.batch_size, seed=amounts.seed)
    if test and "test" in amounts.examples:
        labelled = _labelled(model, task, test, say)
        count = min(len(labelled), amounts.examples["test"])
        tested = split_images(labelled, {"test": count}, amounts.seed)["test"]
        parts["test"] = image_batches(tested, processor, amounts.batch_size)
    return parts


def _labelled(model: Any, task: Task, sources: Sources, say: Callable[[str], None]) -> Images:
    """Read images with the model's class numbers as labels, or without labels if the classes are not the model's."""
    images = read_images(sources)
    if images.labels is None or task.name != "image-classification":
        return Images(images.pictures)
    names: Mapping[int, str] = getattr(model.config, "id2label", None) or {}
    own = [names[number] for number in sorted(names)]
    if images.classes is not None and set(images.classes) <= set(own):
        return read_images(sources, classes=own)
    if images.classes is None and max(images.labels) + 1 == len(own):
        say("labels     the numbers in the file are taken as the model's own")
        return images
    known = ", ".join((images.classes or ("numbers",))[:4])
    say(
        f"labels     {known}, ... are none of the model's classes ({', '.join(own[:4])}, ...), so that no accuracy is "
        "told; call the folders as config.id2label has them"
    )
    return Images(images.pictures)

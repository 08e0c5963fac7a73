"""What the commands give to a model that is not for text alone: images, texts of an encoder, pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.task import Task


_MASKED = 0.15  # of the tokens, as BERT was trained


@dataclass(frozen=True)
class Amounts:
    """How much is given to a model.

    Attributes
    ----------
    tokens : dict of str to int
        Of text, by part.
    examples : dict of str to int
        Images, or pairs of texts, by part.
    sequence_length, batch_size, seed : int
    """

    tokens: dict[str, int]
    examples: dict[str, int]
    sequence_length: int
    batch_size: int
    seed: int


def batches_for(
    model: Any,
    processor: Any,
    task: Task,
    sources: list[str] | None,
    amounts: Amounts,
    say: Callable[[str], None],
    test: list[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Batches of each part that a model for a task is given.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    processor : image processor or tokenizer
    task : Task
    sources : list of str, optional
        Images, documents or pairs, by file or folder.
    amounts : Amounts
        Of which parts how much.
    say : callable
        Is told what was done about labels.
    test : list of str, optional
        Where the test part comes from, if from elsewhere.

    Raises
    ------
    StreamlineError
        If the model takes images and text together, or nothing was given that has a usual place.
    """
    takes_text, takes_images = takes(model)
    if takes_text and takes_images:
        raise StreamlineError(
            f"{type(model).__name__} takes images and texts together, which no file of one kind gives. Call "
            "streamline_hooks.compress in Python, with batches that hold both."
        )
    if takes_images or task.name == "seq2seq":
        if not sources:
            what = "pairs of texts (JSONL or Parquet)" if takes_text else "images (a folder or Parquet)"
            raise StreamlineError(f"{type(model).__name__} is calibrated on {what}; name them with --calibration.")
        if takes_images:
            return _of_images(model, processor, task, sources, amounts, say, test)
    if test:
        raise StreamlineError(f"--test goes with images and with text; for {task} the parts are dealt from one source.")
    if task.name == "seq2seq":
        from streamline_hooks.calibration import pair_parts, read_pairs

        lengths = {"source_length": amounts.sequence_length, "target_length": max(2, amounts.sequence_length // 4)}
        given: dict[str, Any] = {"batch_size": amounts.batch_size, "seed": amounts.seed, **lengths}
        return pair_parts(read_pairs(sources or []), processor, amounts.examples, model, **given)
    from streamline_hooks.calibration import text_parts
    from streamline_hooks.cli.loading import documents_of

    given = {"batch_size": amounts.batch_size, "seed": amounts.seed, "sequence_length": amounts.sequence_length}
    given["masked"] = _MASKED if task.name == "masked-lm" else 0.0
    return text_parts(documents_of(sources or ["pydoc"]), processor, amounts.tokens, **given)


def takes(model: Any) -> tuple[bool, bool]:
    """Whether a model is given text, and images."""
    from streamline_hooks.passes import forward_arguments

    takes = forward_arguments(model)
    return "input_ids" in takes, "pixel_values" in takes


def _of_images(
    model: Any,
    processor: Any,
    task: Task,
    sources: list[str],
    amounts: Amounts,
    say: Callable[[str], None],
    test: list[str] | None,
) -> dict[str, list[dict[str, Any]]]:
    from streamline_hooks.calibration import image_batches, image_parts, read_images

    apart = {"test"} if test else set()
    counts = {name: count for name, count in amounts.examples.items() if name not in apart}
    images = _labelled(model, task, sources, say)
    parts = image_parts(images, processor, counts, batch_size=amounts.batch_size, seed=amounts.seed)
    if test and "test" in amounts.examples:
        found = _labelled(model, task, test, say)
        numbers = read_images(test, count=min(len(found), amounts.examples["test"]), seed=amounts.seed)
        parts["test"] = image_batches(_the_same(found, numbers), processor, amounts.batch_size)
    return parts


def _the_same(found: Any, drawn: Any) -> Any:
    """Those images, as they were labelled, that were drawn."""
    places = {picture.name: number for number, picture in enumerate(found.pictures)}
    return found.some([places[picture.name] for picture in drawn.pictures])


def _labelled(model: Any, task: Task, sources: list[str], say: Callable[[str], None]) -> Any:
    """Images, with the model's own numbers of their classes or without labels."""
    from streamline_hooks.calibration import Images, read_images

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

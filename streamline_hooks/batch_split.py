"""Batches for calibration, validation and test, as a user gives them for any model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.calibration.split import PARTS
from streamline_hooks.digests import batches_digest
from streamline_hooks.distributed import sequences_of, some_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.task import Task

Batches = list[Any]


@dataclass(frozen=True, eq=False)
class BatchSplit:
    """Batches in three parts that share nothing.

    Attributes
    ----------
    calibration, validation, test : list of mapping or torch.Tensor
    unit : str
        What a model gives an answer for: a token, an image, a text, an embedding.
    counts : dict of str to int
        Answers by part.
    fingerprint : str
        A digest, in hexadecimal, of the calibration batches, see `batches_digest`.

    Examples
    --------
    >>> images = torch.randn(6, 3, 8, 8)
    >>> parts = {"calibration": [images[:2], images[2:4]], "validation": [images[4:5]], "test": [images[5:]]}
    >>> BatchSplit.of(parts, Task("image-classification")).describe()
    'calibration 4, validation 1, test 1 images in 4 batches; fingerprint ...'
    """

    calibration: Batches
    validation: Batches
    test: Batches
    unit: str
    counts: dict[str, int]
    fingerprint: str

    @classmethod
    def of(cls, parts: Mapping[str, Sequence[Batch | Tensor]], task: Task) -> BatchSplit:
        """Build a split from three parts by name; raise if one is empty or shares data with the test part."""
        if set(parts) != set(PARTS) or not all(len(parts[name]) for name in PARTS):
            raise StreamlineError(
                f"The batches have the parts {', '.join(f'{n} ({len(p)})' for n, p in parts.items()) or 'none'}; "
                f"expected {', '.join(PARTS)} with a batch at least in each, as image_parts, text_parts and pair_parts "
                "make them."
            )
        lists = {name: list(parts[name]) for name in PARTS}
        tested = _rows(lists["test"])
        for name in ("calibration", "validation"):
            both = len(tested & _rows(lists[name]))
            if both:
                raise StreamlineError(
                    f"{both} of the test part are in the {name} part too, so that the score would be no measure of "
                    "anything new. Give parts that share nothing."
                )
        counts = {name: sum(map(task.count, lists[name])) for name in PARTS}
        calibration, validation, test = (lists[name] for name in PARTS)
        return cls(calibration, validation, test, task.unit, counts, batches_digest(calibration))

    @property
    def tensors(self) -> list[Tensor]:
        """All that is in them, in order."""
        every = (*self.calibration, *self.validation, *self.test)
        return [t for one in every for t in ([one] if isinstance(one, Tensor) else one.values()) if _is_tensor(t)]

    @property
    def held_out_apart(self) -> tuple[Batches, Batches]:
        """Return four fifths of the calibration part to fit on, and the last fifth to choose the ridge on."""
        count = sum(map(sequences_of, self.calibration))
        left = count - max(1, count // 5)
        if left < 1:
            raise StreamlineError(
                "The calibration part has one sequence or image; expected two at least, one to fit on and one to "
                "choose the ridge by."
            )
        fit, held_out = [], []
        for batch in self.calibration:
            size = sequences_of(batch)
            if left > 0:
                fit.append(some_of(batch, slice(0, left)) if left < size else batch)
            if left < size:
                held_out.append(some_of(batch, slice(left, None)) if left > 0 else batch)
            left -= size
        return fit, held_out

    def describe(self) -> str:
        """One line: the size of each part, and the fingerprint."""
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        batches = len(self.calibration) + len(self.validation) + len(self.test)
        return f"{sizes} {self.unit}s in {batches} batches; fingerprint {self.fingerprint[:12]}"

    def figures(self) -> dict[str, Any]:
        """How much there was for what, and which, as JSON values."""
        return {f"{name}_{self.unit}s": count for name, count in self.counts.items()} | {
            "fingerprint": self.fingerprint
        }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _rows(batches: Batches) -> set[bytes]:
    """A digest of each sequence or image: of its content alone, and without padding."""
    found = set()
    for batch in batches:
        given = {"": batch} if isinstance(batch, Tensor) else {n: v for n, v in batch.items() if _is_tensor(v)}
        contents = [given[name] for name in ("input_ids", "pixel_values") if name in given] or [
            next(v for n, v in given.items() if "mask" not in n and n != "labels")
        ]
        mask = None if isinstance(batch, Tensor) else real_tokens(batch)
        for k in range(sequences_of(batch)):
            digest = hashlib.blake2b(digest_size=16)
            for rows in contents:
                if len(rows) != sequences_of(batch):  # of images in one row nothing says which is whose
                    continue
                row = rows[k].detach().cpu()
                row = row.float() if row.is_floating_point() else row.long()
                if mask is not None and mask.shape == rows.shape[:2]:
                    row = row[mask[k].bool().cpu()]
                digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            found.add(digest.digest())
    return found

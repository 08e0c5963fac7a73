"""Calibration text of one or several sources: existing text, and text that the model generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.calibration.documents import read_documents
from streamline_hooks.calibration.mixture import mixed_split, sequences_by_source
from streamline_hooks.calibration.packing import PackedText, packed_text
from streamline_hooks.calibration.self_generated import self_generated
from streamline_hooks.calibration.split import PARTS
from streamline_hooks.distributed import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.calibration.split import TokenSplit

GENERATED = ("self", "chat")
"""The sources that the model generates: answers, and whole conversations."""


@dataclass(frozen=True)
class TextSources:
    """The sources of calibration text.

    Attributes
    ----------
    names : tuple of str
        Files, folders, data sets, ``pydoc``, ``self`` and ``chat``.
    shares : dict of str to float
        The share of each source in a mixture; empty if they are read as one.
    temperature : float
        Sampling temperature of generated text.
    """

    names: tuple[str, ...] = ("pydoc",)
    shares: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 0.8

    @property
    def generated(self) -> list[str]:
        """Return the sources that the model generates."""
        return [name for name in self.names if name in GENERATED]

    def read(self) -> dict[str, list[str]]:
        """Return the existing documents: of each source of a mixture, or of all sources together."""
        if self.shares:
            return {name: read_documents(name) for name in self.names if name not in GENERATED}
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
        """Return, by source, the functions that generate text.

        Parameters
        ----------
        model, tokenizer
        tokens : mapping of str to int
            Size of each part that is split from the sources.
        sequence_length, seed : int
        cache : Path, optional
            A folder for the generated text.

        Raises
        ------
        StreamlineError
            If a share of a part is less than a sequence.
        """
        if self.shares:
            sequences_by_source(self.shares, tokens, sequence_length)

        def generator(name: str) -> Callable[[], list[str]]:
            # More than the share: parts end within a document, and repeated paragraphs are left out.
            needed = self.shares.get(name, 1.0) * sum(tokens.values()) * 1.05 + len(tokens) * sequence_length
            options: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed, "cache": cache}
            options |= {"tokens": math.ceil(needed), "conversation": name == "chat", "temperature": self.temperature}
            return lambda: self_generated(model, tokenizer, **options)

        return {name: generator(name) for name in self.generated}

    def packed(self, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, int]) -> dict[str, PackedText]:
        """Return rows of packed documents for each part, read by every rank; see `mixed` for the arguments."""
        return packed_text(
            self.names,
            tokenizer,
            {part: sizes[f"{part}_tokens"] for part in PARTS},
            sequence_length=sizes["sequence_length"],
            seed=sizes["seed"],
            processes=Processes(0, 1),
        )

    def mixed(
        self,
        documents: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        sizes: Mapping[str, int],
        test_documents: Sequence[str] | None,
    ) -> TokenSplit | None:
        """Return the split of a mixture, or None if `split_documents` splits the documents.

        Parameters
        ----------
        documents : mapping of str to sequence of str
            By source.
        tokenizer
        sizes : mapping of str to int
            Seed, sizes of the parts and sequence length, as arguments of `mixed_split`.
        test_documents : sequence of str, optional
        """
        if not self.shares and "chat" not in self.names:
            return None
        options: dict[str, Any] = {**sizes, "conversations": [name for name in self.names if name == "chat"]}
        shares = self.shares or {"chat": 1.0}
        by_source = {name: documents[name] for name in shares}
        return mixed_split(by_source, shares, tokenizer, test_documents=test_documents, **options)

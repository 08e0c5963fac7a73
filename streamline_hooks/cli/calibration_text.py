"""What --calibration names: text that is there, text that the model writes, or several sources in shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_hooks.cli.loading import documents_of
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamline_hooks.calibration import TokenSplit

# What the model writes: answers alone, and whole conversations.
WRITTEN = ("self", "chat")
_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sources:
    """The sources of a calibration.

    Attributes
    ----------
    names : tuple of str
        Files, folders, data sets, ``pydoc``, ``self`` and ``chat``.
    shares : dict of str to float
        The share of each of them in a mixture; empty where they are taken together.
    temperature : float
        At which the model writes.
    """

    names: tuple[str, ...]
    shares: Mapping[str, float]
    temperature: float = _TEMPERATURE

    @classmethod
    def parse(cls, given: Sequence[str] | None, temperature: float | None = None) -> Sources:
        """Read what was given.

        Raises
        ------
        StreamlineError
            If it cannot be understood, or a temperature was given and the model writes nothing.
        """
        from streamline_hooks.cli.short_forms import parse_mixture

        values = list(given or ["pydoc"])
        mixtures = [mixture for value in values if (mixture := parse_mixture(value)) is not None]
        if mixtures and len(values) > 1:
            raise StreamlineError(
                f"--calibration was given {len(values)} times, and one is a mixture with shares. Expected a share for "
                "each source; name all of them in one mixture, such as self:0.5,texts:0.5."
            )
        shares = mixtures[0] if mixtures else {}
        found = cls(tuple(shares or values), shares, _TEMPERATURE if temperature is None else temperature)
        if "chat" in found.names and Path("chat").exists():
            raise StreamlineError(
                "--calibration chat is what the model says in conversations, and there is a file or folder 'chat' "
                "here. Write ./chat for that one, or rename it."
            )
        if found.written and len(found.names) > 1 and not shares:
            raise StreamlineError(
                f"--calibration {found.written[0]} stands alone; leave the other sources away, or say how much there "
                f"is to be of each: {','.join(f'{name}:{1 / len(values):.6g}' for name in values)}."
            )
        if temperature is not None and not found.written:
            raise StreamlineError(
                f"--temperature {temperature:g} is that of text which the model writes itself; add --calibration self "
                "or chat, or leave it out."
            )
        return found

    @property
    def written(self) -> list[str]:
        """Those that the model writes."""
        return [name for name in self.names if name in WRITTEN]

    @property
    def unusual(self) -> str:
        """The option, where the model is to write or shares were given; otherwise empty."""
        if not (self.written or self.shares):
            return ""
        return f"--calibration {self.written[0] if self.written else 'with shares'}"

    def read(self) -> dict[str, list[str]]:
        """The documents that are there: of each source of a mixture, or of all sources together."""
        if self.shares:
            return {name: documents_of([name]) for name in self.names if name not in WRITTEN}
        return {} if self.written else {"text": documents_of(list(self.names))}

    def writers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Mapping[str, int],
        *,
        sequence_length: int,
        seed: int,
        cache: Path | None,
    ) -> dict[str, Callable[[], list[str]]]:
        """What lets the model write, by source.

        Parameters
        ----------
        model, tokenizer
        tokens : mapping of str to int
            Size of each part that is dealt from the sources.
        sequence_length, seed : int
        cache : Path, optional
            A folder for what is written.

        Raises
        ------
        StreamlineError
            If a share of a part is less than a sequence.
        """
        from streamline_hooks.calibration import self_generated
        from streamline_hooks.calibration.mixture import sequences_by_source

        if self.shares:
            sequences_by_source(self.shares, tokens, sequence_length)
        options: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed, "cache": cache}
        options["temperature"] = self.temperature

        def writer(name: str) -> Callable[[], list[str]]:
            # What is cut off where a part ends, and what documents have in common, is on top of the share.
            needed = self.shares.get(name, 1.0) * sum(tokens.values()) * 1.05 + len(tokens) * sequence_length
            return lambda: self_generated(
                model, tokenizer, tokens=math.ceil(needed), conversation=name == "chat", **options
            )

        return {name: writer(name) for name in self.written}

    def dealt(
        self,
        documents: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        split: Mapping[str, int],
        test_documents: Sequence[str] | None,
    ) -> TokenSplit | None:
        """Sequences of all sources for each part; None where documents are dealt as they are, by `split_documents`.

        Parameters
        ----------
        documents : mapping of str to sequence of str
            By source.
        tokenizer
        split : mapping of str to int
            The seed, the sizes of the parts and the length of a sequence.
        test_documents : sequence of str, optional
            Where the test part comes from, if from elsewhere.
        """
        from streamline_hooks.calibration import mixed_split

        if not self.shares and "chat" not in self.names:
            return None
        conversations = [name for name in self.names if name == "chat"]
        shares = self.shares or {"chat": 1.0}
        options: dict[str, Any] = {**split, "test_documents": test_documents, "conversations": conversations}
        return mixed_split({name: documents[name] for name in shares}, shares, tokenizer, **options)

"""Keep the texts a model wrote in a file that names what they depend on, so that none is written twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json


@dataclass(frozen=True)
class GeneratedText:
    """A text a model wrote, and what it is judged by.

    Attributes
    ----------
    text : str
        The answer alone, without the prompt and special tokens.
    tokens : int
        Its length in tokens when it is tokenised without special tokens.
    perplexity : float
        The model's own perplexity of the answer's tokens, given the prompt.
    distinct : float
        Share of its runs of four tokens that are different from one another, from 0 to 1.
    conversation : str
        Where it is to be kept whole: template, prompt and answer, special tokens as text. Empty where the tokenizer
        does not read the same tokens back from it.
    conversation_tokens : int
        Length of the conversation in tokens.
    """

    text: str
    tokens: int
    perplexity: float
    distinct: float
    conversation: str = ""
    conversation_tokens: int = 0


class GeneratedCache:
    """The batches of texts written so far, kept in a JSONL file.

    The whole file is written beside itself and moved into place after each batch, so an interrupt leaves either the
    old file or the new one.

    Parameters
    ----------
    folder : str or Path or None
        Where the file is kept; None keeps nothing.
    identity : dict
        Everything the texts depend on, as JSON. Its hash is in the name of the file.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]) -> None:
        self.batches: list[list[GeneratedText]] = []
        self.path: Path | None = None
        if folder is not None:
            text = json.dumps(identity, sort_keys=True, default=str)
            name = f"self-generated-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
            self.path = Path(folder).expanduser() / name
            if self.path.exists():
                self.batches = _load(self.path)

    def append(self, batch: list[GeneratedText]) -> None:
        """Add a batch and write the file anew."""
        self.batches.append(batch)
        if self.path is None:
            return
        with atomic_file(self.path) as new, new.open("w", encoding="utf-8") as file:
            for number, texts in enumerate(self.batches):
                for text in texts:
                    file.write(json.dumps({"batch": number, **_row(text)}, ensure_ascii=False) + "\n")


def _row(text: GeneratedText) -> dict[str, Any]:
    """What is written of a text: of an answer alone there is no conversation."""
    return {k: v for k, v in asdict(text).items() if v or not k.startswith("conversation")}


def _load(path: Path) -> list[list[GeneratedText]]:
    batches: list[list[GeneratedText]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = parse_json(line)
            if row.pop("batch") == len(batches):
                batches.append([])
            batches[-1].append(GeneratedText(**row))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise StreamlineError(
                f"{path}, line {number} is not what this library wrote there ({type(error).__name__}: {error}). "
                "Expected one generated text in each line. Delete the file, and it is generated again."
            ) from error
    return batches

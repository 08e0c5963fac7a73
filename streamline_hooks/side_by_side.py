"""Compare the generated texts and the speed of the original and the compressed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from streamline_hooks.batch import Batch, positions_of
from streamline_hooks.calibration.packing import documents_of
from streamline_hooks.evaluation import SpeedReport, Written, measure_speed, write_on
from streamline_hooks.evaluation.speed import Timed, room_for_prompt
from streamline_hooks.surgery import LayerSurgeon


def text_beginnings(tokenizer: Any, batches: Sequence[Batch | Tensor], *, count: int, length: int) -> list[str]:
    """Return the beginnings of up to `count` rows, evenly spread, as texts of `length` tokens without special tokens.

    Rows may be padded on either side or packed. If there are few, later pieces that do not overlap are added.
    """
    rows = [documents for batch in batches for documents in documents_of(batch)]
    pieces = [row[0][:length] for row in rows]
    if len(pieces) < count:
        # As far apart as a beginning is long, so that what is written on one is not what the next one begins with.
        pieces = [document[k : k + length] for row in rows for document in row for k in _places(len(document), length)]
    texts = [text for piece in pieces if (text := tokenizer.decode(piece, skip_special_tokens=True)).strip()]
    taken = min(count, len(texts))
    return [texts[k * len(texts) // taken] for k in range(taken)]


def _places(tokens: int, length: int) -> range:
    """Where the pieces of a document begin: all are whole but for that of a document that is shorter."""
    return range(0, max(1, tokens - length + 1), 2 * length)


_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 32
_TIMED_TOKENS, _TIMED_NEW, _ROUNDS = 128, 8, 3


class SideBySide:
    """Record texts and speed of the original before surgery, to compare the compressed model with.

    The texts continue the beginnings of `batches`, which nothing was chosen or fitted on. A model that cannot generate
    has neither; `say` is told why. Without `write` only speed is compared.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batches: Sequence[Batch | Tensor],
        say: Callable[[str], None],
        *,
        write: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self._new = min(_NEW_TOKENS, (positions_of(model.config) or 10**9) // 2)
        length = min(_PROMPT_TOKENS, self._new)
        self._prompts = text_beginnings(tokenizer, batches, count=_PROMPTS, length=length)
        self._before = self._write(model, "original") if write else []

    @property
    def writes(self) -> bool:
        """Whether the original wrote something."""
        return bool(self._before)

    def speed(self, model: nn.Module, change: Callable[[LayerSurgeon], None], stack: str) -> SpeedReport | None:
        """Measure the speed of a model with and without a change, in turn; a surgeon applies the change each time."""

        @contextmanager
        def changed() -> Iterator[nn.Module]:
            with LayerSurgeon(model, stack, probe=False) as surgeon:
                change(surgeon)
                yield model

        models: dict[str, Timed] = {"original": self.model, "compressed": changed}
        tokens = room_for_prompt(self.model, _TIMED_NEW, _TIMED_TOKENS)
        try:
            return measure_speed(models, tokens=tokens, new_tokens=_TIMED_NEW, repeats=_ROUNDS)
        except Exception as error:  # whatever a model's own generate raises: it is not worth a compressed model
            self.say(f"No speed was measured: {type(error).__name__}: {error}")
            return None

    def samples(self, model: Any) -> list[tuple[Written, Written]]:
        """What a model writes, and what the original wrote."""
        after = self._write(model, "compressed") if self._before else []
        return list(zip(after, self._before, strict=True)) if after else []

    def _write(self, model: Any, what: str) -> list[Written]:
        try:
            written = write_on(model, self.tokenizer, self._prompts, new_tokens=self._new, what=f"write: {what}")
        except Exception as error:  # see above
            self.say(f"Nothing was written: {type(error).__name__}: {error}")
            return []
        return [text for (text,) in written]

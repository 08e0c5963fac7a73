"""What the rules by name cannot know: arguments of single model types, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """How large a tiny model shall be.

    Attributes
    ----------
    blocks : int
        Number of blocks.
    width : int
        Features of the hidden state, a multiple of 32.
    vocabulary : int
        Number of tokens.
    """

    blocks: int
    width: int
    vocabulary: int

    heads = 4
    positions = 128

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.width // self.heads

    @property
    def intermediate(self) -> int:
        """Features inside an MLP, different from every other size."""
        return self.width * 3 // 2

    def tower(self, blocks: int) -> Size:
        """The same for a vision or audio tower."""
        return replace(self, blocks=blocks)


STARTS: Mapping[str, Mapping[str, Any]] = {}
PECULIARITIES: Mapping[str, Mapping[str, Any]] = {}

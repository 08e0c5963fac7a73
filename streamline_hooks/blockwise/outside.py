"""What modules beside the blocks remember from one forward to the next.

A rotary embedding of dynamic length grows with the longest sequence so far. Every block has to find it as the first one
did, whatever went through the blocks in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from streamline_hooks.stack import BlockStack

_PLAIN = (int, float, str, type(None))


class OutsideBlocks:
    """Buffers and plain attributes of the modules that are not in a block, as they are when this is made.

    Parameters
    ----------
    stack : BlockStack
    """

    def __init__(self, stack: BlockStack) -> None:
        inside = {id(module) for block in stack.blocks for module in block.modules()}
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]] = [
            (module, dict(module._buffers), {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)})
            for module in stack.model.modules()
            if id(module) not in inside
        ]
        self._values = [
            {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
            for _, buffers, _ in self._kept
        ]

    def restore(self) -> None:
        """Put them back: the same buffers, with the same values."""
        for (module, buffers, plain), values in zip(self._kept, self._values, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, buffer in buffers.items():
                value = values[name]
                if buffer is not None and value is not None and not buffer.is_meta:
                    buffer.copy_(value)
            vars(module).update(plain)

"""Count the calls that make the host wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch import bool as torch_bool
from torch.overrides import TorchFunctionMode

WAITING = frozenset(
    ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__")
)


class HostSyncs(TorchFunctionMode):
    """Count the calls on tensors that would wait for an accelerator: reads of values, and selections by a mask.

    Tensors that are always on the CPU count too, so that the count needs no accelerator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Number of calls."""
        return sum(self.calls.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "to" and "cpu" in [v for v in (*args[1:], *(kwargs or {}).values()) if isinstance(v, str)]:
            name = "cpu"
        if name == "__getitem__":
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, Tensor) and index.dtype == torch_bool for index in indices):
                self.calls["mask"] += 1
        elif name in WAITING:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

"""A clock that stands still but for what it is told that the parts of a model take."""

from __future__ import annotations

from typing import Any

from torch import nn


class FakeClock:
    """Seconds, of which each token that passes a watched module takes some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.load = 1.0

    def __call__(self) -> float:
        return self.now

    def charge(self, module: nn.Module, seconds_a_token: float) -> None:
        """Let each token that a module (of states, or of token numbers) works on take some time."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            count = given.numel() if not given.is_floating_point() else given.numel() // given.shape[-1]
            self.now += self.load * seconds_a_token * count

        module.register_forward_hook(hook, with_kwargs=True)

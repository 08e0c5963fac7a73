"""How fast the parts of a model are on this machine, from a few tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of, prepare
from streamline_hooks.distance import kl_divergence
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.evaluation.cost import Pace, shape_of
from streamline_hooks.evaluation.perplexity import score
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.hidden_state import padded, read_input
from streamline_hooks.passes import inference
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import Profile, WindowMoments
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.wrapping import refuse_compiled

_TIMED_TOKENS = 512  # on a CPU; on an accelerator a batch is as fast as a part of it


def measure_pace(
    model: nn.Module,
    batch: Batch | Tensor,
    *,
    stack: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pace:
    """Time the parts of a model on a few tokens: four forwards, and each sum once.

    Parameters
    ----------
    model : torch.nn.Module
    batch : mapping or torch.Tensor
        One of those that will be run. On a CPU as many of its sequences are used as hold 512 tokens, one at least.
    stack : str, optional
        Path of the stack, see `find_stack`.
    clock : callable
        Returns seconds.

    Returns
    -------
    Pace

    Raises
    ------
    StreamlineError
        If the model is compiled.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> pace = measure_pace(tiny_model("llama"), torch.arange(3, 35).view(1, 32))
    >>> cost = pace.rank([torch.zeros(2, 32, dtype=torch.long)] * 1000)
    >>> cost.tokens, cost.seconds > 0, pace.vocabulary
    (64000, True, 64)
    """
    refuse_compiled(model, "time the blocks of")
    found = find_stack(model, stack)
    part = _part(batch, None if device_of(model).type != "cpu" else _TIMED_TOKENS)
    rows, width = shape_of(part)
    tokens = rows * width
    given = prepare(model, part)

    def seconds(action: Callable[[], Any]) -> float:
        wait_for(model)
        started = clock()
        action()
        wait_for(model)
        return clock() - started

    with inference(model):
        model(**given)  # whatever is set up at a first time
        whole = (seconds(lambda: model(**given)) + seconds(lambda: model(**given))) / 2
        watch = _Watch(found, clock)
        total = seconds(lambda: watch.run(model, given))
        # Reading the clock inside makes an accelerator wait: only the shares are taken from there.
        scale = whole / total / tokens if total > 0 else 0.0
        state, logits = watch.state, getattr(watch.output, "logits", None)
        few = min(len(state), 128)
        states = [torch.randn_like(state[:few])[None] for _ in range(len(found) + 1)]
        mask = torch.ones(1, few, dtype=torch.bool, device=state.device)
        similarity = _twice(seconds, lambda: Profile(len(states)).update(states, mask)) / few
        sums = WindowMoments(state.shape[-1])
        moments = _twice(seconds, lambda: sums.update(states[0], states[1], mask)) / few
        reference = divergence = likelihood = 0.0
        if isinstance(logits, Tensor):
            a, b = (torch.randn_like(logits.flatten(0, -2)[:few]) for _ in range(2))
            ids = torch.zeros(1, len(a), dtype=torch.long, device=logits.device)
            reference = _twice(seconds, lambda: a.float().log_softmax(dim=-1)) / len(a)
            divergence = max(_twice(seconds, lambda: kl_divergence(a, b)) / len(a) - reference, 0.0)
            likelihood = _twice(seconds, lambda: score(a[None], ids, None)) / len(a)
        surgery = seconds(lambda: _take_out(model, found))
    return Pace(
        before=scale * watch.before,
        blocks=tuple(scale * t for t in watch.by_block()),
        after=scale * (total - watch.before - watch.inside),
        similarity=similarity,
        moments=moments,
        reference=reference,
        divergence=divergence,
        likelihood=likelihood,
        surgery=surgery,
        features=state.shape[-1],
        widest=max((max(p.shape[-2:]) for b in found.blocks for p in b.parameters() if p.ndim > 1), default=0),
        vocabulary=logits.shape[-1] if isinstance(logits, Tensor) else 0,
        state_size=state.element_size(),
        logit_size=logits.element_size() if isinstance(logits, Tensor) else 0,
    )


class _Watch:
    """Reads the clock at the entrance and the exit of every block of one forward, and keeps a state and the output."""

    def __init__(self, stack: BlockStack, clock: Callable[[], float]) -> None:
        self._stack, self._clock = stack, clock
        self._own = [0.0] * len(stack)
        self._entered = self._first = self._last = 0.0
        self.before = 0.0
        self.state: Tensor
        self.output: Any = None

    def run(self, model: nn.Module, given: dict[str, Any]) -> None:
        self._model, handles, visits = model, [], 0

        def now() -> float:
            wait_for(model)
            return self._clock()

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal visits
            state = read_input(args, kwargs, block)
            self.state = padded(state).flatten(0, -2)
            self._entered = now()
            if not visits:
                self._first = self._entered
            visits += 1

        def leave(k: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: Any, output: Any) -> None:
                self._last = now()
                self._own[k] += self._last - self._entered

            return hook

        started = now()
        try:
            for k, block in enumerate(self._stack.blocks):
                handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(block.register_forward_hook(leave(k)))
            self.output = model(**given)
        finally:
            for handle in handles:
                handle.remove()
        self.before = self._first - started

    @property
    def inside(self) -> float:
        """Seconds from the first block's entrance to the last one's exit."""
        return self._last - self._first

    def by_block(self) -> list[float]:
        """Seconds of each block, what passes between two shared out among them."""
        total = sum(self._own)
        return [t / total * self.inside if total > 0 else 0.0 for t in self._own]


def _twice(seconds: Callable[[Callable[[], Any]], float], action: Callable[[], Any]) -> float:
    action()
    return seconds(action)


def _take_out(model: nn.Module, stack: BlockStack) -> None:
    """The surgery of a pass that resumes in the middle, without the pass."""
    half = len(stack) // 2
    try:
        with LayerSurgeon(model, stack.path, probe=False) as surgeon:
            if half:
                surgeon.remove(range(half))
    except UnsupportedSurgery:
        pass  # judging will say so


def _part(batch: Batch | Tensor, limit: int | None) -> Batch | Tensor:
    rows, width = shape_of(batch)
    rows = rows if limit is None else max(1, min(rows, limit // max(width, 1)))
    if isinstance(batch, Tensor):
        return batch[:rows]
    return {name: value[:rows] if isinstance(value, Tensor) else value for name, value in batch.items()}

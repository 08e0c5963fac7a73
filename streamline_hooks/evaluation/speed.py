"""How fast models are on this machine, measured side by side."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked, require_weights
from streamline_hooks.batch import device_of, positions_of
from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import require_generates
from streamline_hooks.passes import inference, progress

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Timed = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in seconds, or without a unit for a ratio."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> Spread:
        """Of some values."""
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Measurements of one model.

    Attributes
    ----------
    prefill : tuple of float
        Seconds to the first token of the whole batch, by round.
    decode : tuple of float
        Seconds per further token (one of each sequence, together), by round; empty without new tokens.
    parameters : int
    dtype : str
        Of most parameters.
    device : str
        With the accelerator's name.
    peak_memory : int or None
        Bytes above what was allocated when its turn began: activations and the cache, not the weights. None on devices
        other than CUDA.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    parameters: int
    dtype: str
    device: str
    peak_memory: int | None


@dataclass(frozen=True)
class SpeedReport:
    """Times of several models that took turns.

    Attributes
    ----------
    timings : dict of str to Timing
        The others are compared with the first.
    batch, tokens, new_tokens : int
        Sequences at a time, tokens of each prompt, and decoding steps.
    threads : int
        Of torch on the CPU.
    machine : str
        Processor and versions.
    """

    timings: dict[str, Timing]
    batch: int
    tokens: int
    new_tokens: int
    threads: int
    machine: str

    def seconds(self, name: str, phase: Phase = "prefill") -> Spread:
        """Seconds to the first token, or a further token, of a model's rounds."""
        return Spread.of(self._times(name, phase))

    def tokens_per_second(self, name: str, phase: Phase = "prefill") -> float:
        """Tokens of the whole batch by the median time."""
        count = self.batch * (self.tokens if phase == "prefill" else 1)
        return count / self._positive(self.seconds(name, phase).median)

    def ratio(self, name: str, phase: Phase = "prefill") -> Spread:
        """Return the median and the quartiles of a model's time as a fraction of the first model's.

        The ratio is taken within each round, where both ran under the same load.
        """
        first = self._times(next(iter(self.timings)), phase)
        own = self._times(name, phase)
        return Spread.of(tuple(a / self._positive(b) for a, b in zip(own, first, strict=True)))

    def table(self) -> str:
        """A line a model and phase, under a line that says what was run and where."""
        first = next(iter(self.timings.values()))
        head = (
            f"{self.batch} x {self.tokens} tokens, {self.new_tokens} more; "
            f"median of {len(first.prefill)} rounds in turn; "
            f"{first.dtype}, {first.device}, {self.threads} threads, {self.machine}"
        )
        rows = []
        for name, timing in self.timings.items():
            memory = "not told" if timing.peak_memory is None else f"{timing.peak_memory / 1e6:.0f} MB"
            for phase in self._phases:
                ms, ratio = self.seconds(name, phase), self.ratio(name, phase)
                times = f"{1e3 * ms.median:.1f}", f"{1e3 * ms.low:.1f} to {1e3 * ms.high:.1f}"
                ratios = f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"
                rows.append((name, phase, *times, f"{self.tokens_per_second(name, phase):.1f}", *ratios, memory))
        columns = ["model", "phase", "ms", "quartiles", "tokens/s", "ratio", "quartiles", "peak memory"]
        return f"{head}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, and the ratios, as JSON values."""
        ratios = {n: {phase: asdict(self.ratio(n, phase)) for phase in self._phases} for n in self.timings}
        return {**asdict(self), "ratios": ratios}

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return PHASES if self.new_tokens else PHASES[:1]

    def _times(self, name: str, phase: Phase) -> tuple[float, ...]:
        if name not in self.timings:
            raise StreamlineError(f"No model {name!r} was timed; there are {', '.join(self.timings)}.")
        times: tuple[float, ...] = getattr(self.timings[name], phase)
        if not times:
            raise StreamlineError(f"No {phase} was timed: new_tokens was 0. Measure again with some.")
        return times

    @staticmethod
    def _positive(seconds: float) -> float:
        if seconds <= 0:
            raise StreamlineError("The clock saw no time pass; give more tokens, or a finer clock.")
        return seconds


@checked(batch=1, tokens=1, new_tokens=0, repeats=1, warm_up=0)
def measure_speed(
    models: Mapping[str, Timed],
    *,
    batch: int = 1,
    tokens: int = 512,
    new_tokens: int = 16,
    repeats: int = 7,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedReport:
    """Time ``generate`` of several models that take turns.

    In every round each model has one turn, and each round another one begins, so that a load that comes and goes
    meets all of them. A turn generates greedily from random tokens: the time to the first token is the prefill (the
    prompt's forward, its head on the last place only, with what ``generate`` sets up), and the mean time of each token
    after it is the decoding, with the model's own KV cache. An accelerator is waited for before the clock is read.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module or callable
        The first is what the others are compared with. A function without arguments that opens a context with a
        model stands for one that is changed for its turn; opening it is not timed.
    batch, tokens : int
        Shape of the prompt.
    new_tokens : int
        Decoding steps after the first token; 0 times the prefill alone.
    repeats : int
        Rounds that count.
    warm_up : int
        Rounds before them that do not.
    clock : callable
        Returns seconds.

    Returns
    -------
    SpeedReport

    Raises
    ------
    StreamlineError
        If a model cannot generate, has fewer positions than are asked for, stops early, or is the wrapper that
        ``torch.compile`` returns, whose ``generate`` runs the model that is not compiled.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> report = measure_speed({"a": model, "b": model}, tokens=8, new_tokens=2, repeats=3)
    >>> len(report.timings["a"].decode), report.ratio("a").median
    (3, 1.0)
    """
    if not models:
        raise StreamlineError("Got 0 models. Expected at least one to time. Pass one.")
    names = list(models)
    turns: dict[str, list[Timing]] = {name: [] for name in names}
    rounds = warm_up + repeats
    what = f"speed: {len(names)} models x {rounds} rounds of {batch} x {tokens} + {new_tokens} tokens"
    with progress(rounds * len(names) * batch * (tokens + new_tokens), what) as bar:
        for number in range(rounds):
            begin = number % len(names)
            for name in [*names[begin:], *names[:begin]]:
                subject = models[name]
                with nullcontext(subject) if isinstance(subject, nn.Module) else subject() as model:
                    turn = _take_turn(name, model, batch, tokens, new_tokens, clock)
                if number >= warm_up:
                    turns[name].append(turn)
                bar.update(batch * (tokens + new_tokens))
    return SpeedReport(
        {name: _joined(timings) for name, timings in turns.items()},
        batch,
        tokens,
        new_tokens,
        torch.get_num_threads(),
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    )


def room_for_prompt(model: Any, new_tokens: int, tokens: int) -> int:
    """Return how many tokens of a prompt a model has positions for, besides the new ones."""
    positions = positions_of(getattr(model, "config", None))
    return tokens if positions is None else max(1, min(tokens, positions - new_tokens - 1))


def wait_for(model: nn.Module) -> None:
    """Synchronise every accelerator that holds a part of a model."""
    for device in accelerators_of(model):
        torch.get_device_module(device).synchronize(*([] if device.type == "mps" else [device]))


def _joined(turns: Sequence[Timing]) -> Timing:
    """Return the timings of several rounds as one."""
    return replace(
        turns[-1],
        prefill=tuple(seconds for turn in turns for seconds in turn.prefill),
        decode=tuple(seconds for turn in turns for seconds in turn.decode),
        peak_memory=max((turn.peak_memory for turn in turns if turn.peak_memory is not None), default=None),
    )


class _Stamps:
    """A stopping criterion that never stops, and reads the clock at the first and at the last token.

    In between an accelerator is left to run ahead, as it does in use.
    """

    def __init__(self, model: nn.Module, last: int, clock: Callable[[], float]) -> None:
        self.times: list[float] = []
        self._model, self._last, self._clock = model, last, clock
        self.tokens = 0

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tokens += 1
        if self.tokens in (1, self._last):
            wait_for(self._model)
            self.times.append(self._clock())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _take_turn(
    name: str, model: nn.Module, batch: int, tokens: int, new_tokens: int, clock: Callable[[], float]
) -> Timing:
    from transformers import StoppingCriteriaList

    generator = require_timed(name, model, tokens + new_tokens)
    prompt = _prompt(model, batch, tokens).to(device_of(model))
    stamps = _Stamps(model, new_tokens + 1, clock)
    cuda = [device for device in accelerators_of(model) if device.type == "cuda"]
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    allocated = sum(map(torch.cuda.memory_allocated, cuda))
    with inference(model):
        wait_for(model)
        started = clock()
        generator.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens + 1,
            min_new_tokens=new_tokens + 1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
    if stamps.tokens <= new_tokens:
        raise StreamlineError(f"{name} generated {stamps.tokens} of {new_tokens + 1} tokens and stopped.")
    first, last = stamps.times[0], stamps.times[-1]
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return Timing(
        (first - started,),
        ((last - first) / new_tokens,) if new_tokens else (),
        sizes.total(),
        max(sizes, key=lambda dtype: sizes[dtype], default="no parameters"),
        _device_name(device_of(model)),
        sum(map(torch.cuda.max_memory_allocated, cuda)) - allocated if cuda else None,
    )


def require_timed(name: str, model: Any, positions: int) -> Any:
    """Return a model if its ``generate`` can be timed over so many positions; see `measure_speed`."""
    require_weights(model, f"measure_speed: {name}")
    if "_orig_mod" in model._modules:
        raise StreamlineError(
            f"{name} is what torch.compile returned; its generate runs the model that is not compiled. Compile in "
            "place (model.compile()) and give the model itself."
        )
    require_generates(model, name)
    limit = positions_of(model.config)
    if limit is not None and limit < positions:
        raise StreamlineError(f"{name} has {limit} positions; {positions} were asked for. Give fewer tokens.")
    return model


def _prompt(model: Any, batch: int, tokens: int) -> Tensor:
    """Draw random tokens that are not special, of shape (batch, tokens)."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ordinary = torch.tensor(sorted(set(range(vocabulary)) - _special_tokens(model.config)) or [0])
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), (batch, tokens), generator=generator)]


def _special_tokens(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            found |= _special_tokens(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def accelerators_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model other than the CPU and meta."""
    devices = {parameter.device for parameter in model.parameters()} | {device_of(model)}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

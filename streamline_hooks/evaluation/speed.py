"""How fast models are on this machine, measured side by side."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
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
    """A median and the quartiles around it.

    Attributes
    ----------
    median, low, high : float
        In seconds, or without a unit where it is a ratio.
    """

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
    """What was measured of one model.

    Attributes
    ----------
    prefill : tuple of float
        Seconds to the first token of the whole batch, one a round.
    decode : tuple of float
        Seconds a further token (one of each sequence, together), one a round; empty where none was asked for.
    parameters : int
    dtype : str
        Of most parameters.
    device : str
        Where it ran, with the accelerator's name.
    peak_memory : int or None
        Bytes above what was allocated when its turn began: activations and the cache, not the weights. None where
        the device does not tell (the CPU).
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
        The first is what the others are compared with.
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
        rounds = len(first.prefill)
        head = (
            f"{self.batch} x {self.tokens} tokens, {self.new_tokens} more; median of {rounds} rounds in turn; "
            f"{first.dtype}, {first.device}, {self.threads} threads, {self.machine}"
        )
        rows = []
        phases = PHASES if self.new_tokens else PHASES[:1]
        for name, timing in self.timings.items():
            for phase in phases:
                ms, ratio = self.seconds(name, phase), self.ratio(name, phase)
                rows.append(
                    (
                        name,
                        phase,
                        f"{1e3 * ms.median:.1f}",
                        f"{1e3 * ms.low:.1f} to {1e3 * ms.high:.1f}",
                        f"{self.tokens_per_second(name, phase):.1f}",
                        f"{ratio.median:.3f}",
                        f"{ratio.low:.3f} to {ratio.high:.3f}",
                        "not told" if timing.peak_memory is None else f"{timing.peak_memory / 1e6:.0f} MB",
                    )
                )
        columns = ["model", "phase", "ms", "quartiles", "tokens/s", "ratio", "quartiles", "peak memory"]
        return f"{head}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, and the ratios, as JSON values."""
        phases = PHASES if self.new_tokens else PHASES[:1]
        return {
            **asdict(self),
            "ratios": {name: {phase: asdict(self.ratio(name, phase)) for phase in phases} for name in self.timings},
        }

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


@checked()
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
    if not models or min(batch, tokens, repeats) < 1 or min(new_tokens, warm_up) < 0:
        raise StreamlineError(
            f"Got {len(models)} models, batch={batch}, tokens={tokens}, repeats={repeats}, new_tokens={new_tokens}, "
            f"warm_up={warm_up}; expected one model or more, the first three 1 or more, the last two not negative."
        )
    names = list(models)
    turns: dict[str, list[_Turn]] = {name: [] for name in names}
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
        {name: _timing(taken, new_tokens) for name, taken in turns.items()},
        batch,
        tokens,
        new_tokens,
        torch.get_num_threads(),
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    )


def room_for_prompt(model: Any, new_tokens: int, tokens: int) -> int:
    """How many of a prompt's tokens a model has positions for, beside those that are to be written."""
    positions = positions_of(getattr(model, "config", None))
    return tokens if positions is None else max(1, min(tokens, positions - new_tokens - 1))


def wait_for(model: nn.Module) -> None:
    """Wait until every accelerator that holds a part of a model has done what it was given."""
    for device in accelerators_of(model):
        torch.get_device_module(device).synchronize(*([] if device.type == "mps" else [device]))


@dataclass(frozen=True)
class _Turn:
    prefill: float
    decode: float
    parameters: int
    dtype: str
    device: str
    peak_memory: int | None


def _timing(turns: list[_Turn], new_tokens: int) -> Timing:
    last, peaks = turns[-1], [turn.peak_memory for turn in turns if turn.peak_memory is not None]
    return Timing(
        tuple(turn.prefill for turn in turns),
        tuple(turn.decode for turn in turns) if new_tokens else (),
        last.parameters,
        last.dtype,
        last.device,
        max(peaks, default=None),
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
) -> _Turn:
    from transformers import StoppingCriteriaList

    generator = require_timed(name, model, tokens + new_tokens)
    prompt = _prompt(model, batch, tokens).to(device_of(model))
    stamps = _Stamps(model, new_tokens + 1, clock)
    memory = _Memory(model)
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
    parameters = list(model.parameters())
    sizes: dict[str, int] = {}
    for p in parameters:
        dtype = str(p.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + p.numel()
    return _Turn(
        first - started,
        (last - first) / new_tokens if new_tokens else 0.0,
        sum(p.numel() for p in parameters),
        max(sizes, key=lambda key: sizes[key], default="no parameters"),
        _device_name(device_of(model)),
        memory.peak(),
    )


def require_timed(name: str, model: Any, positions: int) -> Any:
    """A model, once it is sure that its ``generate`` can be timed over so many positions; see `measure_speed`."""
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
    """Random tokens without a meaning of their own (an image's place, the end), of shape (batch, tokens)."""
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


class _Memory:
    """Peak of what is allocated on a model's accelerators, above what was there before; of CUDA alone."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = [device for device in accelerators_of(model) if device.type == "cuda"]
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._before = sum(torch.cuda.memory_allocated(device) for device in self._devices)

    def peak(self) -> int | None:
        peak = sum(torch.cuda.max_memory_allocated(device) for device in self._devices)
        return peak - self._before if self._devices else None


def accelerators_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model other than the CPU and meta."""
    devices = {parameter.device for parameter in model.parameters()} | {device_of(model)}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

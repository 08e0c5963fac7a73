"""Measure the generation speed of several models in alternation."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    StreamlineError,
    device_of,
    max_positions,
    progress_bar,
    require_weights,
    table,
    validate_arguments,
)
from streamline_hooks.modeling import (
    evaluation_mode,
    layers_of_4_bits,
    preserve_forward_state,
    require_generate,
    restore_4_bit_layout,
)

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
TimedModel = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of seconds or ratios.

    Attributes
    ----------
    median, low, high : float
        The median, the first and the third quartile.

    Examples
    --------
    >>> Quartiles.of((1.0, 2.0, 3.0))
    Quartiles(median=2.0, low=1.5, high=2.5)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> Quartiles:
        """Compute the median and quartiles of values."""
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Measurements of one model.

    Attributes
    ----------
    prefill : tuple of float
        Seconds to the first token of the batch, by round.
    decode : tuple of float
        Mean seconds per further token of the batch, by round; empty if ``new_tokens=0``.
    parameters : int
        Number of parameters.
    dtype : str
        The dtype of most parameters.
    device : str
        The device.
    peak_memory : int or None
        Peak bytes of activations and cache, without the weights; None on devices other than CUDA.

    Examples
    --------
    >>> Timing((0.2, 0.1), (0.02, 0.01), 1_000, "float32", "cpu", None).peak_memory is None
    True
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    parameters: int
    dtype: str
    device: str
    peak_memory: int | None


@dataclass(frozen=True)
class SpeedReport:
    """Times of several models; returned by `measure_speed`.

    Attributes
    ----------
    timings : dict of str to Timing
        Measurements by model. The first model is the baseline of ratios.
    batch, tokens, new_tokens : int
        Batch size, prompt length, and number of decoding steps.
    threads : int
        Number of CPU threads of torch.
    machine : str
        Processor, and version of torch.

    Examples
    --------
    >>> timings = {"original": Timing((0.2,), (), 1_000, "float32", "cpu", None)}
    >>> report = SpeedReport(timings, batch=1, tokens=100, new_tokens=0, threads=1, machine="x86_64")
    >>> report.tokens_per_second("original")
    500.0
    """

    timings: dict[str, Timing]
    batch: int
    tokens: int
    new_tokens: int
    threads: int
    machine: str

    def seconds(self, name: str, phase: Phase = "prefill") -> Quartiles:
        """Return a model's seconds to the first token (prefill) or per further token (decode)."""
        return Quartiles.of(self._times(name, phase))

    def tokens_per_second(self, name: str, phase: Phase = "prefill") -> float:
        """Return the tokens per second of the batch, by the median time."""
        count = self.batch * (self.tokens if phase == "prefill" else 1)
        return count / self._positive(self.seconds(name, phase).median)

    def ratio(self, name: str, phase: Phase = "prefill") -> Quartiles:
        """Return the quartiles over rounds of a model's time divided by the first model's time in the same round."""
        times, first = self._times(name, phase), self._times(next(iter(self.timings)), phase)
        return Quartiles.of(tuple(a / self._positive(b) for a, b in zip(times, first, strict=True)))

    def table(self) -> str:
        """Return a table with one row per model and phase, below a line with the settings and the machine."""
        first = next(iter(self.timings.values()))
        head = (
            f"{self.batch} x {self.tokens} tokens, {self.new_tokens} more; median of {len(first.prefill)} alternating "
            f"rounds; {first.dtype}, {first.device}, {self.threads} threads, {self.machine}"
        )
        rows = []
        for name, timing in self.timings.items():
            memory = "n/a" if timing.peak_memory is None else f"{timing.peak_memory / 1e6:.0f} MB"
            for phase in self._phases:
                ms, ratio = self.seconds(name, phase), self.ratio(name, phase)
                times = f"{1e3 * ms.median:.1f}", f"{1e3 * ms.low:.1f} to {1e3 * ms.high:.1f}"
                ratios = f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"
                rows.append((name, phase, *times, f"{self.tokens_per_second(name, phase):.1f}", *ratios, memory))
        columns = ["model", "phase", "ms", "quartiles", "tokens/s", "ratio", "quartiles", "peak memory"]
        return f"{head}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Return all measurements and the ratios as JSON values."""
        ratios = {n: {phase: asdict(self.ratio(n, phase)) for phase in self._phases} for n in self.timings}
        return {**asdict(self), "ratios": ratios}

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return PHASES if self.new_tokens else PHASES[:1]

    def _times(self, name: str, phase: Phase) -> tuple[float, ...]:
        if name not in self.timings:
            raise StreamlineError(f"The model {name!r} was not timed. Expected one of {', '.join(self.timings)}.")
        times: tuple[float, ...] = getattr(self.timings[name], phase)
        if not times:
            raise StreamlineError(
                f"The phase {phase!r} was not timed, because new_tokens was 0. Measure again with new_tokens >= 1."
            )
        return times

    @staticmethod
    def _positive(seconds: float) -> float:
        if seconds <= 0:
            raise StreamlineError(
                "The measured time is 0 seconds. Expected a positive time. Increase tokens, or pass a finer clock."
            )
        return seconds


@validate_arguments(batch=1, tokens=1, new_tokens=0, repeats=1, warm_up=0)
def measure_speed(
    models: Mapping[str, TimedModel],
    *,
    batch: int = 1,
    tokens: int = 512,
    new_tokens: int = 16,
    repeats: int = 7,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedReport:
    """Time ``generate`` of several models in alternation.

    Each round times every model once, and each round starts with a different model, so that a varying load affects all
    models equally. Generation is greedy, from random tokens, with the model's KV cache. Prefill is the time to the
    first token, decode the mean time of each further token. Accelerators are synchronized before the clock is read.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module or callable
        The models by name; the first is the baseline of ratios. A function without arguments that returns a context
        manager of a model can change the model for its turn; entering the context is not timed.
    batch, tokens : int
        Batch size and length of the prompt.
    new_tokens : int
        Number of decoding steps after the first token; 0 times only the prefill.
    repeats : int
        Number of timed rounds.
    warm_up : int
        Number of rounds before the timed rounds.
    clock : callable
        Function that returns seconds.

    Returns
    -------
    SpeedReport

    Raises
    ------
    StreamlineError
        If a model cannot generate, has too few positions, stops early, or is the wrapper returned by ``torch.compile``,
        whose ``generate`` runs the uncompiled model.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> report = measure_speed({"a": model, "b": model}, tokens=8, new_tokens=2, repeats=3)
    >>> len(report.timings["a"].decode), report.ratio("a").median
    (3, 1.0)
    """
    if not models:
        raise StreamlineError("measure_speed received 0 models. Expected at least one. Pass a mapping of models.")
    names, rounds, size = list(models), warm_up + repeats, batch * (tokens + new_tokens)
    turns: dict[str, list[Timing]] = {name: [] for name in names}
    desc = f"speed: {len(names)} models x {rounds} rounds of {batch} x {tokens} + {new_tokens} tokens"
    with progress_bar(rounds * len(names) * size, desc) as bar:
        for number in range(rounds):
            begin = number % len(names)
            for name in [*names[begin:], *names[:begin]]:
                subject = models[name]
                with nullcontext(subject) if isinstance(subject, nn.Module) else subject() as model:
                    turns[name].append(_take_turn(name, model, batch, tokens, new_tokens, clock))
                bar.update(size)
    timings = {name: _merge_rounds(timed[warm_up:]) for name, timed in turns.items()}
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    return SpeedReport(timings, batch, tokens, new_tokens, torch.get_num_threads(), machine)


def max_prompt_tokens(model: Any, new_tokens: int, tokens: int) -> int:
    """Return the prompt length, at most `tokens`, that leaves positions for the new tokens."""
    positions = max_positions(getattr(model, "config", None))
    return tokens if positions is None else max(1, min(tokens, positions - new_tokens - 1))


def synchronize(model: nn.Module) -> None:
    """Synchronize every accelerator that holds parameters of a model."""
    for device in accelerators_of(model):
        torch.get_device_module(device).synchronize(*([] if device.type == "mps" else [device]))


def _merge_rounds(turns: Sequence[Timing]) -> Timing:
    """Merge the timings of several rounds."""
    return replace(
        turns[-1],
        prefill=tuple(seconds for turn in turns for seconds in turn.prefill),
        decode=tuple(seconds for turn in turns for seconds in turn.decode),
        peak_memory=max((turn.peak_memory for turn in turns if turn.peak_memory is not None), default=None),
    )


def _take_turn(
    name: str, model: nn.Module, batch: int, tokens: int, new_tokens: int, clock: Callable[[], float]
) -> Timing:
    from transformers import StoppingCriteriaList

    generator, device = require_timeable(name, model, tokens + new_tokens), device_of(model)
    prompt, times, generated = _random_prompt(model, batch, tokens).to(device), list[float](), 0

    def read_clock(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Read the clock at the first and last token, as a stopping criterion that never stops."""
        nonlocal generated
        generated += 1
        if generated in (1, new_tokens + 1):
            synchronize(model)
            times.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    cuda = [device for device in accelerators_of(model) if device.type == "cuda"]
    for cuda_device in cuda:
        torch.cuda.reset_peak_memory_stats(cuda_device)
    allocated = sum(map(torch.cuda.memory_allocated, cuda))
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    with _as_served(model):
        if layers_of_4_bits(model):
            model(prompt[:, :1])
        synchronize(model)
        started = clock()
        generator.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens + 1,
            min_new_tokens=new_tokens + 1, use_cache=True, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([read_clock]), **greedy,
        )  # fmt: skip
    if generated <= new_tokens:
        raise StreamlineError(
            f"{name} stopped after {generated} of {new_tokens + 1} tokens. Expected a model that generates the "
            "requested number of tokens. Check its stopping criteria."
        )
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return Timing(
        (times[0] - started,),
        ((times[-1] - times[0]) / new_tokens,) if new_tokens else (),
        sizes.total(),
        max(sizes, key=lambda dtype: sizes[dtype], default="no parameters"),
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        sum(map(torch.cuda.max_memory_allocated, cuda)) - allocated if cuda else None,
    )


@contextmanager
def _as_served(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode; its 4-bit weights may change to the layout that bitsandbytes runs on CPUs."""
    with evaluation_mode(model), preserve_forward_state(model), torch.no_grad():
        try:
            yield
        finally:
            restore_4_bit_layout(model)


def require_timeable(name: str, model: Any, positions: int) -> Any:
    """Return the model; raise StreamlineError if its ``generate`` cannot be timed (see `measure_speed`)."""
    require_weights(model, f"measure_speed: {name}")
    if "_orig_mod" in model._modules:
        raise StreamlineError(
            f"{name} is a wrapper returned by torch.compile; its generate runs the uncompiled model. Expected the "
            "model itself. Compile in place (model.compile()) and pass the model."
        )
    require_generate(model, name)
    limit = max_positions(model.config)
    if limit is not None and limit < positions:
        raise StreamlineError(
            f"tokens + new_tokens = {positions} exceeds the {limit} positions of {name}. Expected at most {limit}. "
            "Decrease tokens."
        )
    return model


def _random_prompt(model: Any, batch: int, tokens: int) -> Tensor:
    """Draw random non-special token ids of shape (batch, tokens)."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ordinary = torch.tensor(sorted(set(range(vocabulary)) - _special_tokens(model.config)) or [0])
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), (batch, tokens), generator=generator)]


def _special_tokens(config: Any) -> set[int]:
    token_ids: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            token_ids |= _special_tokens(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index")):
            token_ids |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return token_ids


def accelerators_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of a model except CPU and meta."""
    devices = {parameter.device for parameter in model.parameters()} | {device_of(model)}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)

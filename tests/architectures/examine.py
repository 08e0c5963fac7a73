"""Hold every operation on one architecture against the truth, and say in a row what came out."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, LinearReplacement, UnsupportedSurgery, find_stack
from streamline_hooks.batch import prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input, write_output
from streamline_hooks.testing import tiny_inputs, tiny_model

BLOCKS, TOKENS, STEPS = 8, 12, 5
WINDOWS = {
    "first": range(0, 1),
    "middle": range(4, 5),
    "last": range(BLOCKS - 1, BLOCKS),
    "three": range(3, 6),
}


@dataclass
class Row:
    """What holds for one model type.

    Attributes
    ----------
    model_type, path : str
    windows : dict
        For each of `WINDOWS` "ok", "refused", or "WRONG" with what was wrong.
    own : dict
        What the unmodified model passes: "cache", "padding", "static", "save".
    reasons : dict
        Why a window was refused, in the library's words.
    states : str
        "ok" where recorded inputs equal the type's own ``output_hidden_states``, "" where it returns something else.
    unbuilt : str
        Why there was nothing to examine.
    """

    model_type: str
    path: str = ""
    windows: dict[str, str] = field(default_factory=dict)
    own: dict[str, bool] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    states: str = ""
    unbuilt: str = ""


def examine(model_type: str) -> Row:
    """Build a tiny model of a type and put it through everything."""
    row = Row(model_type)
    try:
        model = tiny_model(model_type, blocks=BLOCKS)
        if hasattr(model.config.get_text_config(decoder=True), "index_topk"):
            # Sparse attention picks tokens: where it may pick all, a rounding error cannot change the pick.
            model = tiny_model(model_type, blocks=BLOCKS, index_topk=64)
    except StreamlineError as error:
        row.unbuilt = str(error).splitlines()[0]
        return row
    try:
        stack = find_stack(model)
    except StreamlineError as error:
        row.unbuilt = str(error).splitlines()[0]
        return row
    row.path = stack.path
    try:
        logits(model, tiny_inputs(model, tokens=TOKENS))
    except Exception as error:
        row.unbuilt = f"the unmodified model fails on tokens alone: {type(error).__name__}: {error}"[:200]
        return row
    own = {
        "cache": lambda: stepwise(model, padded=False),
        "padding": lambda: stepwise(model, padded=True),
        "static": lambda: generates(model, "static"),
        "dynamic": lambda: generates(model, None),
        "save": lambda: survives_saving(model),
    }
    row.own = {name: passes(check) for name, check in own.items()}
    row.states = recorded_states(model)
    before = state_of(model)
    for name, window in WINDOWS.items():
        if window.stop > len(stack):
            row.windows[name], row.reasons[name] = "refused", "too few blocks"
            continue
        try:
            wrong = faults(model, window, row.own)
        except UnsupportedSurgery as error:
            row.windows[name], row.reasons[name] = "refused", str(error)
        except Exception as error:
            row.windows[name] = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
        else:
            row.windows[name] = "ok" if not wrong else f"WRONG: {', '.join(wrong)}"
        if state_of(model) != before:
            row.windows[name] = f"WRONG: not restored; {row.windows[name]}"
    gc.collect()
    return row


def faults(model: nn.Module, window: range, own: dict[str, bool]) -> list[str]:
    """What goes wrong with a window, by name."""
    wrong = []
    batches = [tiny_inputs(model, tokens=TOKENS), tiny_inputs(model, tokens=TOKENS, left_padding=True)]
    nudge = LinearReplacement.from_map(0.3 * torch.randn(width_of(model), width_of(model), generator=seeded(1)))
    with LayerSurgeon(model) as surgeon:  # what is refused is refused before anything is compared
        surgeon.remove(window)
    truths = {module: [bypassed(model, window, module, batch) for batch in batches] for module in (None, nudge)}
    for module, truth in truths.items():
        what = "removed" if module is None else "spliced"
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(window, module)
            for batch, expected, kind in zip(batches, truth, ("", " padded"), strict=True):
                if not same(logits(model, batch), expected, batch):
                    wrong.append(f"{what}{kind}")
            wrong += [f"{what} {name}" for name in broken(model, own)]
    wrong += [f"committed {name}" for name in saved_faults(model, window, nudge, own)]
    return wrong


def broken(model: nn.Module, own: dict[str, bool]) -> list[str]:
    """Which of the comparisons that the unmodified model passes fail now."""
    checks = {
        "cache": lambda: stepwise(model, padded=False),
        "padding": lambda: stepwise(model, padded=True),
        "dynamic": lambda: generates(model, None),
        "static": lambda: generates(model, "static"),
    }
    return [name for name, check in checks.items() if own[name] and not passes(check)]


def saved_faults(model: nn.Module, window: range, nudge: nn.Module, own: dict[str, bool]) -> list[str]:
    """Commit on copies, save, load, compare."""
    import copy

    if not own["save"]:
        return []
    wrong = []
    for module, what in ((None, "removed"), (nudge, "spliced")):
        duplicate = copy.deepcopy(model)
        with LayerSurgeon(duplicate) as surgeon:
            surgeon.replace(window, copy.deepcopy(module))
            surgeon.commit()
        if not survives_saving(duplicate):
            wrong.append(what)
    return wrong


def bypassed(model: nn.Module, window: range, module: nn.Module | None, batch: dict[str, Tensor]) -> Tensor:
    """Every block runs; the window's output is thrown away for its input, or for what a module makes of that."""
    stack, kept = find_stack(model), {}

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        kept["state"] = read_input(args, kwargs).clone()

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        state = kept["state"]
        return write_output(output, state if module is None else module(state))

    handles = [
        stack[window.start].register_forward_pre_hook(enter, with_kwargs=True),
        stack[window.stop - 1].register_forward_hook(leave),
    ]
    try:
        return logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**prepare(model, batch)).logits


def same(a: Tensor, b: Tensor, batch: dict[str, Tensor] | None = None, tolerance: float = 2e-4) -> bool:
    if batch is not None and a.shape[:2] == batch["attention_mask"].shape:
        real = batch["attention_mask"].bool()
        a, b = a[real], b[real]
    return (
        a.shape == b.shape
        and bool(torch.isfinite(a).all())
        and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))
    )


def stepwise(model: nn.Module, padded: bool) -> bool:
    """Decoding token by token with a cache gives the logits of the full forward."""
    batch = tiny_inputs(model, tokens=TOKENS, left_padding=padded)
    whole = logits(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start = None, TOKENS - STEPS
    with torch.no_grad():
        for t in [start, *range(start + 1, TOKENS + 1)]:
            piece = slice(0, t) if cache is None else slice(t - 1, t)
            given = prepare(model, {"input_ids": ids[:, piece], "attention_mask": mask[:, :t], "use_cache": True})
            given.pop("position_ids", None)
            if padded and takes(model, "position_ids"):
                given["position_ids"] = positions[:, piece]
            if cache is not None:
                given[cache_argument(model)] = cache
            output = model(**given)
            cache = getattr(output, "cache", None)
            cache = getattr(output, "past_key_values", None) if cache is None else cache
            if cache is None:
                return False
            if not same(output.logits[:, -1:], whole[:, t - 1 : t]):
                return False
    return True


def generates(model: nn.Module, cache: str | None) -> bool:
    """Greedy decoding with a cache, left-padded batch included, sees the logits that it sees without.

    Up to the first token where they part over a tie; from there on the texts are different ones.
    """
    for padded in (False, True):
        batch = tiny_inputs(model, tokens=TOKENS, left_padding=padded)
        options = {
            "max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
            "output_logits": True, "return_dict_in_generate": True,
        }  # fmt: skip
        extra = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
        with torch.no_grad():
            without = model.generate(**batch, **options, use_cache=False)
            with_cache = model.generate(**batch, **options, use_cache=True, **extra)
        together = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
        for step, (a, b) in enumerate(zip(without.logits, with_cache.logits, strict=True)):
            if not same(b[together], a[together]):
                return False
            at = TOKENS + step
            together &= without.sequences[:, at] == with_cache.sequences[:, at]
            if not together.any():
                break
    return True


def survives_saving(model: nn.Module) -> bool:
    batch = tiny_inputs(model, tokens=TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        return type(loaded) is type(model) and same(logits(loaded, batch), logits(model, batch), tolerance=1e-5)


def recorded_states(model: nn.Module) -> str:
    """Whether recorded inputs equal ``output_hidden_states``; empty where the type's own output is something else."""
    batch = tiny_inputs(model, tokens=TOKENS)
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        try:
            output = model(**prepare(model, batch), output_hidden_states=True)
        except (TypeError, ValueError, AttributeError):  # the type does not give them
            return ""
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) != len(record.stack) + 1 or any(len(v) != 1 for v in record.inputs.values()):
        return ""
    same_states = all(torch.equal(record.inputs[k][0], states[k]) for k in range(len(record.stack)))
    return "ok" if same_states else ""  # Mamba's begins behind the first block, XLNet's has other axes


def state_of(model: nn.Module) -> list[Any]:
    rows: list[Any] = [type(model), type(model.config), str(model.config.to_dict())]
    for name, module in model.named_modules():
        rows.append(
            (name, id(module), list(module._modules), list(module._forward_hooks), list(module._forward_pre_hooks))
        )
        rows.append({k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))})
    return [*rows, [(n, id(p)) for n, p in model.named_parameters()], list(model.state_dict())]


def passes(check: Callable[[], bool]) -> bool:
    with quiet():
        try:
            return bool(check())
        except Exception:  # a type may fail in any way; that it passed before is held by the table
            return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def width_of(model: nn.Module) -> int:
    with torch.no_grad(), HiddenStateRecorder(model, [0], outputs=False) as record:
        model(**prepare(model, tiny_inputs(model, tokens=TOKENS)))
    return record.inputs[0][0].shape[-1]


def takes(model: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def cache_argument(model: nn.Module) -> str:
    for name in ("cache", "past_key_values", "cache_params", "state"):
        if takes(model, name):
            return name
    return "past_key_values"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

"""Validate the arguments of public functions and the fields of public dataclasses by their annotations."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of
from streamline_hooks.errors import StreamlineError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_BATCH: Any = Batch
_UNIONS = (typing.Union, types.UnionType)
# Names that modules import for annotations only.
_NAMES: dict[str, Any] = {
    "PreTrainedModel": nn.Module,
    "Callable": Callable,
    "Any": Any,
    "Path": Path,
    "nn": nn,
    "torch": torch,
}


@runtime_checkable
class _Tokenizer(Protocol):
    """A tokenizer or image processor, as far as functions need one whatever they do with it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make what a model takes."""


_NAMES |= {"PreTrainedTokenizerBase": _Tokenizer | None}
_CHECKED = 64  # elements of a sequence of texts that are looked at


Bound = float | str
"""The range of a number: the smallest one, or an interval such as ``"(0, 1]"``."""


def checked(**bounds: Bound) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Validate the arguments of a public function by its annotations, before anything of it is run.

    Integers and floats refuse bool and NaN; a sequence refuses a single string; an iterable of int is converted to a
    list of int, a window to a range, an iterator to a list. Where a function takes batches, they hold tokens of the
    model's vocabulary in the rank that it takes, and the model has weights. Annotations that are known to type checkers
    only are not enforced.

    Parameters
    ----------
    **bounds
        By parameter, the numbers that are accepted, of a tuple each: the smallest one, or an interval as text.

    Raises
    ------
    StreamlineError
        With the parameter, the value, what is accepted, and what to do.

    Examples
    --------
    >>> @checked(size=1)
    ... def halve(size: int) -> float:
    ...     return size / 2
    >>> halve(3)
    1.5
    >>> try:
    ...     halve(True)
    ... except StreamlineError as error:
    ...     print(error)
    halve: size=True is of type bool. Expected int of at least 1. Pass a whole number.
    >>> @checked(share="[0, 1)")
    ... def keep(share: float) -> float:
    ...     return 1 - share
    >>> try:
    ...     keep(1)
    ... except StreamlineError as error:
    ...     print(error)
    keep: share=1 is out of range. Expected float in [0, 1). Pass a number.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        is_method = "self" in signature.parameters

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            name = f"{type(args[0]).__name__}.{function.__name__}" if is_method else function.__qualname__.lstrip("_")
            name = name.removesuffix(".__init__")
            for parameter, value in list(bound.arguments.items()):
                known = signature.parameters[parameter]
                if known.kind in (known.VAR_KEYWORD, known.VAR_POSITIONAL) or value is known.default:
                    continue
                hint = _hint(known.annotation, function.__globals__)
                if isinstance(value, float) and math.isnan(value):
                    raise StreamlineError(f"{name}: {parameter}=nan is not a number. {_remedy(hint)}")
                bound.arguments[parameter] = _converted(name, parameter, value, hint, known.annotation, bounds)
            # With share=False every rank has batches of its own, and some may have none.
            takes_none = bool(signature.parameters.keys() & _MAY_BE_NONE) or bound.arguments.get("share") is False
            _check_batches(name, bound.arguments, takes_none)
            _check_windows(name, bound.arguments)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def check_fields(instance: Any, **bounds: Bound) -> None:
    """Validate the fields of a dataclass by their annotations, in its ``__post_init__``; see `checked`."""
    hints = field_hints(type(instance))
    for field in fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        shown = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", field.type)
        _converted(type(instance).__name__, field.name, value, hint, shown, bounds)


def field_hints(config: type) -> dict[str, Any]:
    """Return the evaluated annotations of a dataclass's fields; `Any` for what only type checkers import."""
    hints = {}
    for field in fields(config):
        declaring = (c for c in config.__mro__ if field.name in vars(c).get("__annotations__", {}))
        hints[field.name] = _hint(field.type, vars(sys.modules[next(declaring, config).__module__]))
    return hints


def nearest(name: Any, known: Iterable[str], otherwise: str) -> str:
    """Return the last sentence of an error about an unknown name: the nearest known one, or what else to do."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean {found[0]!r}?" if found else otherwise


def whole_numbers(values: Any, name: str) -> list[int]:
    """Return an iterable of whole numbers, of which bool is none, as a list of int; raise for anything else."""
    return list(_converted("blocks", name, values, Iterable[int], "Iterable[int]", {}))


def block_numbers(values: Any, length: int, name: str) -> list[int]:
    """Return block indices counted from the start; negative values count from the end of the stack."""
    numbers = whole_numbers(values, name)
    for k in numbers:
        if not -length <= k < length:
            raise StreamlineError(
                f"{name}: block {k} is out of range. Expected 0 to {length - 1}, since the stack has {length} blocks. "
                "Change it."
            )
    return [k % length for k in numbers]


class _Wrong(Exception):
    """A value that does not fit; the text says why."""


def _converted(
    function: str, parameter: str, value: Any, hint: Any, annotation: Any, bounds: Mapping[str, Bound]
) -> Any:
    bound = bounds.get(parameter)
    try:
        value = _convert(value, hint)
        if bound is not None:
            numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Real)]
            _need(value, all(_is_within(float(number), bound) for number in numbers), "is out of range")
    except _Wrong as error:
        range_ = "" if bound is None else f" in {bound}" if isinstance(bound, str) else f" of at least {bound}"
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        accepted = f"one of {', '.join(choices)}" if choices else f"{annotation}{range_}"
        raise StreamlineError(
            f"{function}: {parameter}={_shown(value)} {error}. Expected {accepted}. {_remedy(hint, value)}"
        ) from None
    return value


def _is_within(number: float, bound: Bound) -> bool:
    if not isinstance(bound, str):
        return bound <= number
    low, high = map(float, bound[1:-1].split(","))
    return low < number < high or (number == low and bound[0] == "[") or (number == high and bound[-1] == "]")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(annotation: Any, namespace: Mapping[str, Any]) -> Any:
    """Evaluate an annotation; `Any` where it names what only type checkers import."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, {**_NAMES, **namespace})
    except (NameError, AttributeError, TypeError):
        return Any


def _convert(value: Any, hint: Any) -> Any:
    """Return a value as its hint has it, or raise `_Wrong`."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in _UNIONS:
        return _convert_union(value, inside)
    if hint is None or hint is type(None):
        return _need(value, value is None)
    if hint is bool:
        return _need(value, isinstance(value, bool) or type(value).__name__ == "bool")
    if hint is int:
        return _whole(value)
    if hint is float:
        return _need(value, isinstance(value, Real) and not isinstance(value, bool))
    if origin is Literal:
        _need(value, isinstance(value, str))
        return _need(value, value in inside, "is unknown")
    if hint is range:
        return _window(value)
    if hint == _BATCH:
        _need(value, isinstance(value, Mapping))
        _need(value, any(isinstance(one, Tensor) for one in value.values()), "holds no tensor")
        return _need(value, isinstance(value.get("input_ids", torch.empty(0)), Tensor), "holds no tensor input_ids")
    if origin is tuple:
        return _tuple(value, inside)
    if origin in (Mapping, dict):
        _need(value, isinstance(value, Mapping))
        for key, element in value.items():
            _inside(f"the key {_shown(key)}", key, inside[0])
            _inside(f"under {_shown(key)}, {_shown(element)}", element, inside[1])
        return value
    if origin in (Sequence, Iterable, list, frozenset):
        return _elements(value, inside[0], lazy=origin is Iterable)
    if Callable in (origin, hint):
        return _need(value, callable(value))
    return _need(value, isinstance(value, hint)) if isinstance(hint, type) else value


def _need(value: Any, fits: bool, why: str = "") -> Any:
    if not fits:
        raise _Wrong(why or f"is of type {type(value).__name__}")
    return value


def _inside(what: str, value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except _Wrong as error:
        raise _Wrong(f"does not fit: {what} {error}") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        _need(value, False)
    try:
        return operator.index(value)
    except TypeError:
        raise _Wrong(f"is of type {type(value).__name__}") from None


def _convert_union(value: Any, hints: Sequence[Any]) -> Any:
    wrong = []
    if torch.device in hints and isinstance(value, str):
        try:
            return torch.device(value) and value
        except RuntimeError:
            raise _Wrong("is no device") from None
    for hint in hints:
        try:
            return _convert(value, hint)
        except _Wrong as error:
            wrong.append(str(error))
    telling = [text for text in wrong if text.startswith(("does not fit", "holds"))]
    raise _Wrong((telling or wrong)[0])


def _window(value: Any) -> range:
    """A window: consecutive blocks."""
    if isinstance(value, range):
        return value
    numbers = list(_elements(value, int, lazy=False))
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise _Wrong("is no run of consecutive blocks")
    return range(numbers[0], numbers[0] + len(numbers))


def _tuple(value: Any, inside: Sequence[Any]) -> Any:
    _need(value, isinstance(value, (tuple, list)))
    each = [inside[0]] * len(value) if len(inside) == 2 and inside[1] is Ellipsis else list(inside)
    if len(each) != len(value):
        raise _Wrong(f"does not fit: it holds {len(value)} values, not {len(each)}")
    for element, hint in zip(value, each, strict=True):
        _inside(_shown(element), element, hint)
    return value


def _elements(value: Any, hint: Any, lazy: bool) -> Any:
    """A sequence whose elements fit; what can be gone through once is made a list."""
    modules = isinstance(value, (nn.ModuleList, nn.Sequential)) and hint is nn.Module
    if isinstance(value, (str, bytes, Mapping, Tensor, nn.Module, type)) or not hasattr(value, "__iter__"):
        _need(value, modules)
    if lazy and isinstance(value, Iterator) and hint is not int:
        return (_convert(element, hint) for element in value)
    many = value if isinstance(value, Sequence) else list(value)
    if isinstance(many, range) and hint is int:
        return many
    converted = [_inside(_shown(element), element, hint) for element in (many[:_CHECKED] if hint is str else many)]
    if hint is not str and any(a is not b for a, b in zip(converted, many, strict=True)):
        return converted
    return many


def _remedy(hint: Any, value: Any = None) -> str:
    """Return what to do, by the first alternative that is accepted."""
    for accepted in get_args(hint) if get_origin(hint) in _UNIONS else (hint,):
        element = (get_args(accepted) or (None,))[0]
        if accepted in _REMEDIES or (get_origin(accepted), element) in _REMEDIES:
            return _REMEDIES.get(accepted) or _REMEDIES[get_origin(accepted), element]
        if get_origin(accepted) is Literal:
            choices = get_args(accepted)
            return nearest(value, choices, f"Pass {' or '.join(map(repr, choices))}.")
        if get_origin(accepted) is Sequence and _BATCH in get_args(element):
            return f"Pass a list of batches. {_TENSORS}"
    return "See the documentation of this argument."


_TENSORS = "Pass tensors as a tokenizer gives them with return_tensors='pt'."
_REMEDIES: dict[Any, str] = {
    _BATCH: _TENSORS,
    Tensor: "Pass a tensor.",
    nn.Module: "Pass a model or module, such as AutoModelForCausalLM.from_pretrained(...) returns it.",
    _Tokenizer: "Pass the tokenizer, such as AutoTokenizer.from_pretrained(...) returns it.",
    range: "Pass a window of consecutive blocks, such as range(3, 5).",
    bool: "Pass True or False.",
    int: "Pass a whole number.",
    float: "Pass a number.",
    str: "Pass a string.",
    Path: "Pass a path.",
    (Iterable, int): "Pass block numbers, such as range(3, 5) or [0, 1].",
    (Sequence, range): "Pass a list of windows of consecutive blocks, such as [range(3, 5)].",
    (Sequence, str): "Pass a list of strings.",
}


def _check_batches(function: str, given: Mapping[str, Any], takes_none: bool) -> None:
    """Raise for batches that a model cannot take, before it is run."""
    models = {n: m for n, m in given.items() if isinstance(m, nn.Module) and n in _MODELS}
    models |= {"student": given["student"].model} if "student" in given else {}
    parts = {n: b for n, b in given.items() if n in _BATCHES and b is not None and not isinstance(b, Iterator)}
    if parts or given.keys() & _RUN_ON:
        for name, model in models.items():
            require_weights(model, f"{function}: {name}")
    if not models or not parts:
        return
    model = next(iter(models.values()))
    for name, value in parts.items():
        batches = [value] if isinstance(value, (Tensor, Mapping)) else value
        tokens = [_checked_batch(model, batch, f"{function}: {name}") for batch in batches]
        if not any(tokens) and not takes_none:
            raise StreamlineError(
                f"{function}: {name}={_shown(value)} holds no token. Expected at least one batch with a token that is "
                "not padding. An iterator that was used before is empty: pass a list."
            )


def _check_windows(function: str, given: Mapping[str, Any]) -> None:
    """Raise for windows that reach beyond a model's last block."""
    model, windows = given.get("model"), list(given.get("windows") or ())
    windows += [window for selection in given.get("selections") or () for window in selection.windows]
    if not isinstance(model, nn.Module) or not windows:
        return
    from streamline_hooks.stack import find_stack  # which validates its own arguments by this module

    length = len(find_stack(model, given.get("stack")))
    for window in windows:
        if window.step != 1 or not 0 <= window.start < window.stop <= length:
            raise StreamlineError(
                f"{function}: {window} is no window of this stack; expected a run of consecutive blocks, 0 to "
                f"{length - 1} of {type(model).__name__}, such as range(0, 1)."
            )


_MODELS = ("model", "original", "reference", "teacher", "first", "second")
_RUN_ON = {"texts", "suite", "second"}
_MAY_BE_NONE = {"task", "student"}  # such functions look themselves whether there is anything to run on
_BATCHES = ("batches", "batch", "fit", "held_out", "validation")


def require_weights(model: nn.Module, what: str) -> None:
    """Raise if a model is on the meta device, and nothing loads its weights when it is run."""
    device = device_of(model)
    if device.type == "meta":
        raise StreamlineError(
            f"{what}=<{type(model).__name__}> is on the meta device and has no weights. Expected a model in memory. "
            "Load its weights first, for instance with from_pretrained."
        )


def _checked_batch(model: nn.Module, batch: Any, what: str) -> bool:
    """Whether a batch has a token that is not padding; raises where the model cannot take it."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if isinstance(batch, Tensor) and not batch.numel():
        raise StreamlineError(f"{what}: a tensor of shape {tuple(batch.shape)} holds nothing. Leave it out.")
    embedding = _embedding(model)
    if embedding is not None and isinstance(batch, Mapping):
        takes = inspect.signature(model.forward).parameters.keys() | {"input_ids"}
        if not takes & (batch.keys() - {"attention_mask"}):
            raise StreamlineError(
                f"{what}: a batch holds {', '.join(map(str, batch))}, nothing that {type(model).__name__} takes. "
                "Expected input_ids. Pass what the tokenizer gives."
            )
    if (
        not isinstance(ids, Tensor)
        or embedding is None
        or (ids is batch and ids.is_floating_point() and getattr(model, "main_input_name", "input_ids") != "input_ids")
    ):
        return True
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise StreamlineError(f"{what}: input_ids are {ids.dtype}. Expected whole numbers. Pass ids.long().")
    if ids.ndim < 2 or not ids.numel():
        raise StreamlineError(
            f"{what}: input_ids have the shape {tuple(ids.shape)}. Expected (batch, tokens), none of them 0. Pass a "
            "single sequence as ids[None]."
        )
    if isinstance(mask, Tensor) and mask.ndim == ids.ndim == 2 and mask.shape != ids.shape:
        raise StreamlineError(
            f"{what}: attention_mask has the shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}. Expected the "
            "same. Pass both as the tokenizer gives them."
        )
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= embedding.num_embeddings:
        raise StreamlineError(
            f"{what}: input_ids hold {low if low < 0 else high}. Expected 0 to {embedding.num_embeddings - 1}, the "
            f"vocabulary of {type(model).__name__}. Use the tokenizer of this model."
        )
    return not isinstance(mask, Tensor) or bool(mask.any())


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding of a Transformers model whose input are token ids."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return None
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding if type(embedding) is nn.Embedding else None

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

from streamline_hooks.core.batch import Batch, device_of
from streamline_hooks.core.errors import StreamlineError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_BATCH: Any = Batch
_UNIONS = (typing.Union, types.UnionType)
# Names that modules import only for annotations.
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
    """Any tokenizer or image processor."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of a model."""


_NAMES |= {"PreTrainedTokenizerBase": _Tokenizer | None}
_CHECKED = 64  # a sequence of texts is checked up to this many elements

Bound = float | str
"""Range of a number: its smallest value, or an interval such as ``"(0, 1]"``."""


def validate_arguments(**bounds: Bound) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a public function so that its arguments are validated by their annotations.

    Integers and floats reject bool and NaN, and a sequence rejects a single string. An iterable of int is converted to
    a list of int, a window to a range, and an iterator to a list. Batches must contain tokens of the model's vocabulary
    with the right number of dimensions, and models must have weights. Annotations that are imported only for type
    checkers are not enforced.

    Parameters
    ----------
    **bounds : float or str
        For a parameter, the range of its number or of each number in its tuple.

    Returns
    -------
    callable
        A decorator. The decorated function raises `StreamlineError` if an argument is invalid.

    Examples
    --------
    >>> @validate_arguments(size=1)
    ... def halve(size: int) -> float:
    ...     return size / 2
    >>> halve(3)
    1.5
    >>> try:
    ...     halve(True)
    ... except StreamlineError as error:
    ...     print(error)
    halve: size=True is of type bool. Expected int of at least 1. Pass a whole number.
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
            # With shard=False the ranks have different batches, and a rank may have none.
            takes_none = bool(signature.parameters.keys() & _MAY_BE_NONE) or bound.arguments.get("shard") is False
            _check_batches(name, bound.arguments, takes_none)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def validate_fields(instance: Any, **bounds: Bound) -> None:
    """Validate the fields of a dataclass by their annotations, in its ``__post_init__``; see `validate_arguments`."""
    hints = field_hints(type(instance))
    for field in fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        shown = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", field.type)
        _converted(type(instance).__name__, field.name, value, hint, shown, bounds)


def field_hints(config: type) -> dict[str, Any]:
    """Return the evaluated annotations of a dataclass's fields; `Any` for names imported only for type checkers."""
    hints = {}
    for field in fields(config):
        declaring = (c for c in config.__mro__ if field.name in vars(c).get("__annotations__", {}))
        hints[field.name] = _hint(field.type, vars(sys.modules[next(declaring, config).__module__]))
    return hints


def suggest(name: Any, known: Iterable[str], otherwise: str) -> str:
    """Return "Did you mean ...?" with the nearest known name, or `otherwise` if no name is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean {matches[0]!r}?" if matches else otherwise


def int_list(values: Any, name: str) -> list[int]:
    """Convert an iterable of integers (not bool) to a list of int; raise for anything else."""
    return list(_converted("blocks", name, values, Iterable[int], "Iterable[int]", {}))


def block_indices(values: Any, length: int, name: str) -> list[int]:
    """Convert block indices, of which negative values count from the end, to non-negative indices."""
    numbers = int_list(values, name)
    for k in numbers:
        if not -length <= k < length:
            raise StreamlineError(
                f"{name}: block {k} is out of range. Expected 0 to {length - 1} (or {-length} to -1), because the "
                f"stack has {length} blocks. Choose an existing block."
            )
    return [k % length for k in numbers]


def describe_blocks(window: range) -> str:
    """Return ``"block 3"`` or ``"blocks 3 to 5"``, to name a window in a message."""
    if not window:
        return "no block"
    return f"block {window.start}" if len(window) == 1 else f"blocks {window.start} to {window[-1]}"


class _Mismatch(Exception):
    """Raised if a value does not match its annotation; the text is the reason."""


def _converted(
    function: str, parameter: str, value: Any, hint: Any, annotation: Any, bounds: Mapping[str, Bound]
) -> Any:
    bound = bounds.get(parameter)
    try:
        value = _convert(value, hint)
        if bound is not None:
            numbers = [
                number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, Real)
            ]
            _require(value, all(_is_within(float(number), bound) for number in numbers), "is out of range")
    except _Mismatch as error:
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
    """Evaluate an annotation; return `Any` if it contains a name imported only for type checkers."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, {**_NAMES, **namespace})
    except (NameError, AttributeError, TypeError):
        return Any


def _convert(value: Any, hint: Any) -> Any:
    """Convert a value to its annotated type, or raise `_Mismatch`."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in _UNIONS:
        return _convert_union(value, inside)
    if hint in (None, type(None)):
        return _require(value, value is None)
    if hint is bool:
        return _require(value, isinstance(value, bool) or type(value).__name__ == "bool")
    if hint is int:
        return _whole(value)
    if hint is float:
        return _require(value, isinstance(value, Real) and not isinstance(value, bool))
    if origin is Literal:
        _require(value, isinstance(value, str))
        return _require(value, value in inside, "is unknown")
    if hint is range:
        return _window(value)
    if hint == _BATCH:
        _require(value, isinstance(value, Mapping))
        _require(value, any(isinstance(element, Tensor) for element in value.values()), "holds no tensor")
        return _require(value, isinstance(value.get("input_ids", torch.empty(0)), Tensor), "holds no tensor input_ids")
    if origin is tuple:
        return _tuple(value, inside)
    if origin in (Mapping, dict):
        _require(value, isinstance(value, Mapping))
        for key, element in value.items():
            _inside(key, inside[0], "the key ")
            _inside(element, inside[1], f"under {_shown(key)}, ")
        return value
    if origin in (Sequence, Iterable, list, frozenset):
        return _elements(value, inside[0], lazy=origin is Iterable)
    if Callable in (origin, hint):
        return _require(value, callable(value))
    return _require(value, isinstance(value, hint)) if isinstance(hint, type) else value


def _require(value: Any, fits: bool, why: str = "") -> Any:
    if not fits:
        raise _Mismatch(why or f"is of type {type(value).__name__}")
    return value


def _inside(value: Any, hint: Any, prefix: str = "") -> Any:
    """Convert an element, which is printed only in an error: printing a tensor is slow and waits for its device."""
    try:
        return _convert(value, hint)
    except _Mismatch as error:
        raise _Mismatch(f"does not fit: {prefix}{_shown(value)} {error}") from None


def _whole(value: Any) -> int:
    _require(value, not isinstance(value, bool))
    try:
        return operator.index(value)
    except TypeError:
        return int(_require(value, False))


def _convert_union(value: Any, hints: Sequence[Any]) -> Any:
    reasons = []
    if torch.device in hints and isinstance(value, str):
        try:
            return torch.device(value) and value
        except RuntimeError:
            raise _Mismatch("is not a device") from None
    for hint in hints:
        try:
            return _convert(value, hint)
        except _Mismatch as error:
            reasons.append(str(error))
    specific = [text for text in reasons if text.startswith(("does not fit", "holds"))]
    raise _Mismatch((specific or reasons)[0])


def _window(value: Any) -> range:
    """Convert block numbers to a range of consecutive blocks."""
    if isinstance(value, range):
        return value
    numbers = list(_elements(value, int, lazy=False))
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise _Mismatch("is not a range of consecutive blocks")
    return range(numbers[0], numbers[0] + len(numbers))


def _tuple(value: Any, inside: Sequence[Any]) -> Any:
    _require(value, isinstance(value, (tuple, list)))
    hints = [inside[0]] * len(value) if len(inside) == 2 and inside[1] is Ellipsis else list(inside)
    if len(hints) != len(value):
        raise _Mismatch(f"does not fit: it holds {len(value)} values instead of {len(hints)}")
    for element, hint in zip(value, hints, strict=True):
        _inside(element, hint)
    return value


def _elements(value: Any, hint: Any, lazy: bool) -> Any:
    """Convert the elements of a sequence; an iterator becomes a list."""
    is_scalar = isinstance(value, (str, bytes, Mapping, Tensor, nn.Module, type)) or not hasattr(value, "__iter__")
    _require(value, not is_scalar or (isinstance(value, (nn.ModuleList, nn.Sequential)) and hint is nn.Module))
    if lazy and isinstance(value, Iterator) and hint is not int:
        return (_convert(element, hint) for element in value)
    values = value if isinstance(value, Sequence) else list(value)
    if isinstance(values, range) and hint is int:
        return values
    converted = [_inside(element, hint) for element in (values[:_CHECKED] if hint is str else values)]
    if hint is not str and any(a is not b for a, b in zip(converted, values, strict=True)):
        return converted
    return values


def _remedy(hint: Any, value: Any = None) -> str:
    """Return the remedy for the first accepted type of an annotation."""
    for accepted in get_args(hint) if get_origin(hint) in _UNIONS else (hint,):
        element = (get_args(accepted) or (None,))[0]
        element = None if isinstance(element, list) else element  # the arguments of a Callable
        if accepted in _REMEDIES or (get_origin(accepted), element) in _REMEDIES:
            return _REMEDIES.get(accepted) or _REMEDIES[get_origin(accepted), element]
        if get_origin(accepted) is Literal:
            choices = get_args(accepted)
            return suggest(value, choices, f"Pass {' or '.join(map(repr, choices))}.")
        if hasattr(accepted, "from_dict"):
            family = getattr(accepted, "family", None)
            kind = value if family and value in family else next(iter(family or ()), "")
            example = f", such as {{kind: {kind}}}" if kind else ""
            return f"Pass a {accepted.__name__}. In a file, write a mapping with its fields{example}."
        if get_origin(accepted) is Mapping and element is str:
            return "Pass a mapping, such as {'name': value}. In a file, write {name: value}."
        if get_origin(accepted) is Sequence and _BATCH in get_args(element):
            return f"Pass a list of batches. {_TENSORS}"
    return "See the documentation of this argument."


_TENSORS = "Pass the output of a tokenizer with return_tensors='pt'."
_REMEDIES: dict[Any, str] = {
    _BATCH: _TENSORS,
    Tensor: "Pass a tensor.",
    nn.Module: "Pass a model or module, such as the result of AutoModelForCausalLM.from_pretrained(...).",
    _Tokenizer: "Pass the tokenizer, such as the result of AutoTokenizer.from_pretrained(...).",
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


def _check_batches(function: str, arguments: Mapping[str, Any], takes_none: bool) -> None:
    """Raise if a batch does not fit the model."""
    by_name = {n: getattr(getattr(m, "stack", None), "model", m) for n, m in arguments.items() if n in _MODELS}
    models = {n: m for n, m in by_name.items() if isinstance(m, nn.Module)}
    models |= {"student": arguments["student"].model} if "student" in arguments else {}
    parts = {n: b for n, b in arguments.items() if n in _BATCHES and b is not None and not isinstance(b, Iterator)}
    if parts or arguments.keys() & _RUN_ON:
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
                "not padding. Pass a list instead of an iterator that was used before."
            )


_MODELS = ("model", "original", "reference", "teacher", "first", "second")
_RUN_ON = {"data", "texts", "suite", "second"}
_MAY_BE_NONE = {"task", "student"}  # functions with these parameters check themselves whether batches are empty
_BATCHES = ("batches", "batch", "fit", "held_out", "validation")


def require_weights(model: nn.Module, what: str) -> None:
    """Raise if a model is on the meta device and not offloaded."""
    if device_of(model).type == "meta":
        raise StreamlineError(
            f"{what}=<{type(model).__name__}> is on the meta device and has no weights. Expected a model in memory. "
            "Load its weights first, for example with from_pretrained."
        )


def _checked_batch(model: nn.Module, batch: Any, what: str) -> bool:
    """Whether a batch has a token that is not padding; raises if the batch does not fit the model."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if isinstance(batch, Tensor) and not batch.numel():
        raise StreamlineError(f"{what}: a tensor of shape {tuple(batch.shape)} is empty. Remove it.")
    embedding = _embedding(model)
    if embedding is not None and isinstance(batch, Mapping):
        takes = inspect.signature(model.forward).parameters.keys() | {"input_ids"}
        if not takes & (batch.keys() - {"attention_mask"}):
            raise StreamlineError(
                f"{what}: a batch holds {', '.join(map(str, batch))}, which {type(model).__name__} does not accept. "
                "Expected input_ids. Pass the output of the tokenizer."
            )
    if (
        not isinstance(ids, Tensor)
        or embedding is None
        or (ids is batch and ids.is_floating_point() and getattr(model, "main_input_name", "input_ids") != "input_ids")
    ):
        return True
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise StreamlineError(f"{what}: input_ids are {ids.dtype}. Expected integers. Pass ids.long().")
    if ids.ndim < 2 or not ids.numel():
        raise StreamlineError(
            f"{what}: input_ids have the shape {tuple(ids.shape)}. Expected (batch, tokens) with both at least 1. Pass "
            "a single sequence as ids[None]."
        )
    if isinstance(mask, Tensor) and mask.ndim == ids.ndim == 2 and mask.shape != ids.shape:
        raise StreamlineError(
            f"{what}: attention_mask has the shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}. Expected "
            "equal shapes. Pass both from the same tokenizer output."
        )
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= embedding.num_embeddings:
        raise StreamlineError(
            f"{what}: input_ids hold {low if low < 0 else high}. Expected 0 to {embedding.num_embeddings - 1}, the "
            f"vocabulary of {type(model).__name__}. Use the tokenizer of this model."
        )
    return not isinstance(mask, Tensor) or bool(mask.any())


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the token embedding of a Transformers model that accepts token ids, or None."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return None
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding if type(embedding) is nn.Embedding else None

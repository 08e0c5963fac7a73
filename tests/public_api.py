"""Describe the public names of the library with their signatures: python -m tests.public_api > tests/public_api.txt."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamline_hooks

FILE = Path(__file__).with_suffix(".txt")


def describe() -> Iterator[str]:
    """Yield the lines of the public names of the package and its sub-packages, with one line for each parameter."""
    modules = pkgutil.walk_packages(streamline_hooks.__path__, "streamline_hooks.")
    first: dict[int, str] = {}
    for package in ["streamline_hooks", *sorted(module.name for module in modules if module.ispkg)]:
        module = importlib.import_module(package)
        for name in sorted(getattr(module, "__all__", ())):
            path, thing = f"{package}.{name}", getattr(module, name)
            if callable(thing) and first.setdefault(id(thing), path) != path:
                yield f"{path} = {first[id(thing)]}"
            else:
                yield from describe_object(path, thing)


def describe_object(name: str, thing: Any) -> Iterator[str]:
    if not callable(thing):
        yield f"{name}: {type(thing).__name__}"
        return
    if typing.get_origin(thing) is not None:  # Python 3.13 gives an alias the signature (*args, **kwargs)
        yield f"{name}()"
        return
    yield from describe_call(name, thing)
    if inspect.isclass(thing) and thing.__module__.startswith("streamline_hooks"):
        for member, value in sorted(vars(thing).items()):
            function = getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(function):
                yield from describe_call(f"{name}.{member}", function)
            elif not member.startswith("_") and isinstance(value, property):
                yield f"{name}.{member}"


def describe_call(name: str, thing: Any) -> Iterator[str]:
    try:
        signature = inspect.signature(thing)
    except ValueError:  # as of torch.autograd.Function
        signature = inspect.Signature()
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    returned = signature.return_annotation
    yield f"{name}()" + ("" if returned in (inspect.Signature.empty, None) else f" -> {returned}")
    for number, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is keyword_only and kinds.index(keyword_only) == number:
            yield "    *"
        yield "    " + re.sub(r" at 0x[0-9a-f]+", "", str(parameter)).replace("'", "")


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in describe())

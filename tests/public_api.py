"""Describe the public names of the library with their signatures: python -m tests.public_api > tests/public_api.txt."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamline_hooks

FILE = Path(__file__).with_suffix(".txt")


def describe() -> Iterator[str]:
    """Yield one line for each public name, of the package and of its sub-packages, and for each public member."""
    packages = [
        info.name for info in pkgutil.walk_packages(streamline_hooks.__path__, "streamline_hooks.") if info.ispkg
    ]
    for package in ["streamline_hooks", *sorted(packages)]:
        module = importlib.import_module(package)
        for name in sorted(getattr(module, "__all__", ())):
            yield from describe_object(f"{package}.{name}", getattr(module, name))


def describe_object(name: str, thing: Any) -> Iterator[str]:
    if not callable(thing):
        yield f"{name}: {type(thing).__name__}"
        return
    yield f"{name}{signature(thing)}"
    if inspect.isclass(thing) and thing.__module__.startswith("streamline_hooks"):
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value):
                yield f"{name}.{member}{signature(value)}"
            elif isinstance(value, property):
                yield f"{name}.{member}: property"


def signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except ValueError:  # as of torch.autograd.Function
        return "(...)"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in describe())

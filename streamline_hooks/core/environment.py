"""Describe the installation: versions, devices, and installed or missing optional dependencies."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from typing import Any

import psutil
import torch
from packaging.requirements import InvalidRequirement, Requirement

DISTRIBUTION = "streamline_hooks"
_REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy")
_Find = Callable[[str], Distribution]


def describe_environment() -> dict[str, Any]:
    """Describe the installation: versions, devices and extras.

    Returns
    -------
    dict
        JSON values under three keys. ``"versions"``: the versions of Python, this library and its required packages;
        None for a package that is not installed. ``"devices"``: ``"cpu"`` with the usable ``cores``, PyTorch's
        ``threads``, and ``memory`` and ``available`` in bytes; ``"cuda"``, a list with the ``name`` and ``memory`` of
        each GPU; and ``"mps"``, whether an Apple GPU is usable. ``"extras"``: for each extra of this distribution,
        whether it is completely ``installed``, its ``missing`` requirements, and the command to ``install`` it.

    Examples
    --------
    >>> environment = describe_environment()
    >>> sorted(environment), environment["devices"]["cpu"]["cores"] >= 1
    (['devices', 'extras', 'versions'], True)
    >>> environment["extras"]["report"]["install"]
    'pip install "streamline_hooks[report]"'
    """
    return {"versions": _versions(), "devices": _devices(), "extras": describe_extras()}


def describe_extras(find: _Find = distribution) -> dict[str, dict[str, Any]]:
    """Describe which requirements of each extra of this distribution are installed.

    The extras are read from the installed metadata, so a checkout that is not installed has none. `find` returns an
    installed distribution by name, or raises `PackageNotFoundError`.
    """
    try:
        metadata = find(DISTRIBUTION)
    except PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, Any]] = {}
    for extra in metadata.metadata.get_all("Provides-Extra") or ():
        missing = list(dict.fromkeys(_missing(metadata, extra, find, frozenset())))
        extras[extra] = {
            "installed": not missing,
            "missing": missing,
            "install": f'pip install "{DISTRIBUTION}[{extra}]"',
        }
    return extras


def _missing(package: Distribution, extra: str, find: _Find, visited: frozenset[tuple[str, str]]) -> Iterator[str]:
    """Yield the requirements of an extra that are not installed or whose installed version does not match."""
    visited |= {(_normalized(package.metadata["Name"]), extra)}
    for text in package.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # damaged metadata
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            continue  # required without the extra as well
        if not requirement.marker.evaluate({"extra": extra}):
            continue
        required_version = f"{requirement.name}{requirement.specifier}"
        try:
            installed = find(requirement.name)
        except PackageNotFoundError:
            yield required_version
            continue
        if not requirement.specifier.contains(installed.version, prereleases=True):
            yield required_version
        for nested_extra in sorted(requirement.extras):
            if (_normalized(requirement.name), nested_extra) not in visited:
                yield from _missing(installed, nested_extra, find, visited)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _versions() -> Mapping[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions[DISTRIBUTION] = sys.modules[DISTRIBUTION].__version__  # the running code; the metadata may be older
    for package in _REQUIRED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # with the kind of build, which its metadata may lack
    return versions


def _devices() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": {
            "cores": cores,
            "threads": torch.get_num_threads(),
            "memory": memory.total,
            "available": memory.available,
        },
        "cuda": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "mps": torch.backends.mps.is_available(),
    }

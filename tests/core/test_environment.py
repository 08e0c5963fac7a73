"""The description of an installation names versions, devices, and what is missing of each extra."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import torch

import streamline_hooks
from streamline_hooks.core import describe_environment
from streamline_hooks.core.environment import describe_extras


class Installed(Distribution):
    """A distribution with some metadata and no files."""

    def __init__(self, name: str, version: str = "1.0", extras: tuple[str, ...] = (), requires: tuple[str, ...] = ()):
        self.lines = [("Name", name), ("Version", version)]
        self.lines += [("Provides-Extra", extra) for extra in extras]
        self.lines += [("Requires-Dist", requirement) for requirement in requires]

    @property
    def metadata(self) -> Message:  # type: ignore[override]
        message = Message()
        for key, value in self.lines:
            message[key] = value
        return message

    def read_text(self, filename: str) -> str | None:
        return None if filename == "requires.txt" else "\n".join(f"{key}: {value}" for key, value in self.lines)

    def locate_file(self, path: object) -> Path:  # type: ignore[override]
        return Path(str(path))


def finder(*installed: Installed) -> Callable[[str], Distribution]:
    by_name = {one.metadata["Name"]: one for one in installed}

    def find(name: str) -> Distribution:
        if name not in by_name:
            raise PackageNotFoundError(name)
        return by_name[name]

    return find


def test_versions_and_devices_are_those_of_this_process() -> None:
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    versions, devices = found["versions"], found["devices"]
    assert versions["python"] == platform.python_version()
    assert versions["streamline_hooks"] == streamline_hooks.__version__
    assert versions["torch"] == torch.__version__
    assert {"transformers", "accelerate", "safetensors"} <= set(versions)
    assert 1 <= devices["cpu"]["cores"] <= 4096
    assert devices["cpu"]["memory"] >= devices["cpu"]["available"] > 10_000_000
    assert len(devices["cuda"]) == torch.cuda.device_count()


def test_an_extra_is_installed_if_all_of_it_is() -> None:
    of = Installed(
        "streamline_hooks",
        extras=("page", "text", "old"),
        requires=(
            "torch>=2",
            'page-maker>=2; extra == "page"',
            'plots; extra == "page"',
            'text; extra == "text"',
            'never; python_version < "3" and extra == "text"',
            'plots<1; extra == "old"',
        ),
    )
    found = describe_extras(finder(of, Installed("text"), Installed("page-maker", "1.9"), Installed("plots", "3.0")))
    assert {name: (one["installed"], one["missing"]) for name, one in found.items()} == {
        "page": (False, ["page-maker>=2"]),
        "text": (True, []),
        "old": (False, ["plots<1"]),
    }
    assert found["page"]["install"] == 'pip install "streamline_hooks[page]"'


def test_extras_of_extras_are_followed() -> None:
    of = Installed(
        "streamline_hooks",
        extras=("all", "page"),
        requires=('streamline_hooks[all,page]; extra == "all"', 'plots[svg]; extra == "page"'),
    )
    plots = Installed("plots", extras=("svg",), requires=('drawing>=1; extra == "svg"',))
    found = describe_extras(finder(of, plots))
    assert found["all"]["missing"] == found["page"]["missing"] == ["drawing>=1"]


def test_a_checkout_that_is_not_installed_has_no_extras() -> None:
    assert describe_extras(finder()) == {}

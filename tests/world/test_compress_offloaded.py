"""The whole way for models that lie on several devices, or in several precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, compress, find_stack, load
from streamline_hooks.core import prepare_inputs, split_into_batches
from streamline_hooks.distillation import DistillationConfig
from streamline_hooks.statistics import WindowMoments, measure_moments
from tests.checkpoint.block_by_block import AMOUNTS, compressible, reader
from tests.configured import arguments
from tests.tiny_models import tiny_model, tokens

CPU = torch.device("cpu")
GREEDY = {"repair": "linear", "search": "greedy", "criterion": "kl"}
TRAINED: dict[str, Any] = {
    "repair": "swiglu:width=8",
    "distillation": DistillationConfig(loss={"kl": 1.0}, validations=1),
}


def automatic(folder: Path, weights: Path) -> nn.Module:
    """What accelerate makes of ``device_map="auto"`` where half of the model has room."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return load(folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=str(weights))


def on_cpu(folder: Path, weights: Path) -> nn.Module:
    return accelerate.cpu_offload(load(folder), execution_device=CPU)


def on_disk(folder: Path, weights: Path) -> nn.Module:
    return accelerate.disk_offload(load(folder), str(weights), execution_device=CPU)


@pytest.mark.sample(3)
@pytest.mark.parametrize("options", [{"repair": "linear"}, TRAINED, GREEDY], ids=["closed form", "trained", "greedy"])
@pytest.mark.parametrize("placed", [automatic, on_cpu, on_disk])
def test_it_comes_to_what_the_plain_model_comes_to(
    placed: Callable[[Path, Path], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = compressible(tmp_path)
    model = placed(folder, tmp_path / "weights")
    assert sum(p.is_meta for block in find_stack(model).blocks for p in block.parameters()) > 5
    tokenizer, texts = reader()
    given = {"tokenizer": tokenizer, **arguments(speed=False, generation=False, **AMOUNTS, **options)}
    found = compress(model, texts, output=tmp_path / "found", **given)
    wanted = compress(load(folder), texts, output=tmp_path / "wanted", **given)
    assert found.plan == wanted.plan and found.perplexities == pytest.approx(wanted.perplexities, rel=1e-6)
    distances = [[one.distance for one in result.candidates] for result in (found, wanted)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)
    mine, theirs = (load(tmp_path / name).state_dict() for name in ("found", "wanted"))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def in_two_precisions() -> Any:
    """A bfloat16 model whose blocks from number 3 on are float32, and whose states are cast where they change."""
    model: Any = tiny_model("llama", torch.bfloat16)
    blocks = find_stack(model).blocks

    def widened(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cosine, sine = kwargs["position_embeddings"]
        return tuple(a.float() for a in args), kwargs | {"position_embeddings": (cosine.float(), sine.float())}

    for block in blocks[3:]:
        block.float().register_forward_pre_hook(widened, with_kwargs=True)
    blocks[-1].register_forward_hook(lambda _, __, output: output.bfloat16())
    return model


@pytest.mark.parametrize("window", [range(0, 2), range(2, 4), range(3, 5)])
def test_moments_of_a_model_in_two_precisions(window: range) -> None:
    model, batch = in_two_precisions(), split_into_batches(tokens(3, 12), 3)[0]
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        record(**prepare_inputs(model, batch))
    x, y = record.inputs[window.start][0], record.outputs[window.stop - 1][0]
    assert {state.dtype for k in (0, 2, 3, 4) for state in record.outputs[k]} == {torch.bfloat16, torch.float32}
    expected = WindowMoments(x.shape[-1])
    expected.update(x.double(), y.double(), torch.ones(x.shape[:2]))
    (found,) = measure_moments(model, [batch], [window])
    assert found.tokens == 36 and found.xx.dtype == torch.float64
    torch.testing.assert_close(found.xx, expected.xx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.xd, expected.xd, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_moments_stay_on_the_device_of_their_block() -> None:
    model = tiny_model("llama").cuda()
    (found,) = measure_moments(model, split_into_batches(tokens(3, 12), 3), [range(1, 3)])
    (expected,) = measure_moments(tiny_model("llama"), split_into_batches(tokens(3, 12), 3), [range(1, 3)])
    assert found.xx.device.type == "cuda"
    torch.testing.assert_close(found.xx.cpu(), expected.xx, rtol=1e-4, atol=1e-5)

"""Models whose parameters accelerate keeps elsewhere: between two forwards they say "meta"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack, load, save
from streamline_hooks.core import device_of, execution_device, prepare_inputs, renumber_device_map
from streamline_hooks.recording import RecordingConfig
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import resume
from tests.other_models import made
from tests.tiny_models import BLOCKS, WIDTH, Nudge, left_padded, repaired, tiny_model, tokens

CPU = torch.device("cpu")


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder / "weights"), execution_device=CPU)


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """Every other block on disk, as ``device_map`` would have it."""
    path = find_stack(model).path
    where: dict[str, str] = {name: "cpu" for name, _ in model.named_children() if name != path.split(".")[0]}
    owner = model.get_submodule(path.rpartition(".")[0])
    where |= {f"{path.rpartition('.')[0]}.{n}": "cpu" for n, _ in owner.named_children() if n != path.split(".")[-1]}
    where |= {f"{path}.{k}": "disk" if k % 2 else "cpu" for k in range(BLOCKS)}
    return accelerate.dispatch_model(model, where, offload_dir=str(folder / "weights"))


Offload = Callable[[nn.Module, Path], nn.Module]


@pytest.fixture(params=[on_cpu, on_disk, dispatched])
def offload(request: pytest.FixtureRequest) -> Offload:
    return request.param


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 7), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_land_where_the_recorder_was_told(offload: Offload, tmp_path: Path, family: str) -> None:
    plain, model = tiny_model(family), offload(tiny_model(family), tmp_path)
    assert any(p.is_meta for p in model.parameters()) and device_of(model) == CPU
    batch = left_padded(2, 7)
    assert {v.device for v in prepare_inputs(model, batch).values() if isinstance(v, torch.Tensor)} == {CPU}
    with (
        torch.no_grad(),
        HiddenStateRecorder(plain, config=RecordingConfig(device="cpu", dtype=torch.float64)) as expected,
    ):
        expected(**batch)
    with (
        torch.no_grad(),
        HiddenStateRecorder(model, config=RecordingConfig(device="cpu", dtype=torch.float64)) as record,
    ):
        record(**batch)
    for k in range(BLOCKS):
        assert record.inputs[k][0].device == CPU
        assert torch.equal(record.inputs[k][0], expected.inputs[k][0])
        assert torch.equal(record.outputs[k][0], expected.outputs[k][0])


SURGERIES: dict[str, Callable[[LayerSurgeon], object]] = {
    "removed": lambda surgeon: surgeon.remove(range(1, 3)),
    "spliced": lambda surgeon: surgeon.replace(range(1, 3), Nudge()),
    "spliced at the end": lambda surgeon: surgeon.insert(BLOCKS, Nudge()),
    "a copy of a block": lambda surgeon: surgeon.insert(5, surgeon.stack[1]),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("surgery", SURGERIES.values(), ids=SURGERIES.keys())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_surgery_is_that_of_the_plain_model(
    offload: Offload, tmp_path: Path, family: str, surgery: Callable[[LayerSurgeon], object]
) -> None:
    plain, model = tiny_model(family), offload(tiny_model(family), tmp_path)
    before, devices = logits(plain), {name: p.device for name, p in model.named_parameters()}
    with LayerSurgeon(plain) as expected, LayerSurgeon(model) as surgeon:
        surgery(expected), surgery(surgeon)
        assert torch.equal(logits(model), logits(plain))
        written = [m.generate(tokens(1, 4), max_new_tokens=4, do_sample=False) for m in (plain, model)]
        assert torch.equal(*written)
    assert torch.equal(logits(model), before)
    assert {name: p.device for name, p in model.named_parameters()} == devices


def test_a_splice_is_put_where_accelerate_runs_the_block_in_its_precision(tmp_path: Path) -> None:
    model, nudge = on_cpu(tiny_model("llama", torch.bfloat16), tmp_path), Nudge()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), nudge)
        assert (nudge.weight.device, nudge.weight.dtype) == (CPU, torch.bfloat16)
        assert logits(model).isfinite().all()


def test_offloaded_inside_the_context_or_interrupted_there(tmp_path: Path) -> None:
    """Blocks that were out keep their values, though the others say meta, or the other way round."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        inside = logits(model)
        on_cpu(model, tmp_path)
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(model), logits(plain))

    model = on_cpu(tiny_model("llama"), tmp_path)
    norm = find_stack(model)[4].input_layernorm
    with pytest.raises(KeyboardInterrupt), LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        norm._hf_hook.pre_forward(
            norm, torch.zeros(1, 1, WIDTH)
        )  # as a forward leaves it that does not come to its end
        raise KeyboardInterrupt
    assert torch.equal(logits(model), logits(plain))


def test_resuming_runs_only_what_it_needs(offload: Offload, tmp_path: Path) -> None:
    model, ids = offload(tiny_model("llama"), tmp_path), tokens(2, 7)
    with torch.no_grad(), HiddenStateRecorder(model, [3]) as record:
        expected = record(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(resume(model, 3, record.inputs[3][0], ids).logits, expected)


def test_a_commit_is_saved_and_loaded(tmp_path: Path) -> None:
    model = dispatched(tiny_model("llama"), tmp_path)
    generator = torch.Generator().manual_seed(1)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH, generator=generator)))
        surgeon.commit()
    expected = logits(model)
    save(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)


def test_the_execution_device_is_accelerates(tmp_path: Path) -> None:
    assert execution_device(tiny_model("llama")) is None
    model = on_cpu(tiny_model("llama"), tmp_path)
    assert execution_device(model) == execution_device(find_stack(model)[2]) == CPU


def test_a_device_map_follows_the_blocks() -> None:
    blocks = [nn.Linear(2, 2) for _ in range(4)]
    old, kept = ["0", "1", "2", "3"], [("0", "0", blocks[0]), ("1", "3", blocks[3])]
    given = {
        "embed": 0,
        "layers.0": 0,
        "layers.1": "cpu",
        "layers.2.mlp": 1,
        "layers.2.attn": "cpu",
        "layers.3": "disk",
    }
    assert renumber_device_map({**given, "head": 0}, "layers", old, kept) == {
        "embed": 0,
        "layers.0": 0,
        "layers.1": "disk",
        "head": 0,
    }
    part = [("0", "2", blocks[2]), ("1", "2", blocks[1]), ("2", None, blocks[0])]
    assert renumber_device_map(given, "layers", old, part) == {
        "embed": 0,
        "layers.0.mlp": 1,
        "layers.0.attn": "cpu",
        "layers.1.mlp": 1,
        "layers.1.attn": "cpu",
        "layers.2": "cpu",
    }
    assert renumber_device_map({"": "cpu"}, "layers", old, kept) == {"": "cpu"}
    assert renumber_device_map({"layers": 1, "head": 0}, "layers", old, kept) == {"layers": 1, "head": 0}


def test_the_models_device_map_follows_the_surgery_and_comes_back(tmp_path: Path) -> None:
    model = dispatched(tiny_model("llama"), tmp_path)
    before = model.hf_device_map
    items = list(before.items())
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 4))
        surgeon.insert(BLOCKS, Nudge())
        blocks = {k: v for k, v in model.hf_device_map.items() if ".layers." in k}
        assert blocks == {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
        assert [v for k, v in model.hf_device_map.items() if ".layers." not in k] == ["cpu"] * 4
    assert model.hf_device_map is before and list(before.items()) == items


@pytest.mark.parametrize("elsewhere", ["model.norm", "model.layers.1", "lm_head"])
def test_a_checkpoint_with_splices_is_loaded_with_a_part_of_it_on_disk(elsewhere: str, tmp_path: Path) -> None:
    """The final norm, which is stored in another shape, among them: accelerate brings it as it is stored."""
    model = repaired("llama")
    save(model, tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {f"model.layers.{k}": "cpu" for k in range(len(model.model.layers))}
    where[elsewhere] = "disk"
    loaded = load(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "weights"))
    assert any(p.is_meta for p in loaded.get_submodule(elsewhere).parameters()), "nothing is on disk"
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "again")(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_parameters_of_the_model_itself_are_saved_too(tmp_path: Path) -> None:
    """CLIP's logit_scale is in none of its modules. A device map that names no other place changes nothing."""
    plain = made("clip text")
    expected = {name: value.clone() for name, value in plain.state_dict().items()}
    model = on_cpu(plain, tmp_path)
    model.hf_device_map = {"": 0}
    save(model, tmp_path / "saved")
    found = load(tmp_path / "saved").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_weights_that_nobody_has_are_not_saved(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    with torch.device("meta"):
        model = type(plain)(plain.config)
    with pytest.raises(StreamlineError, match=r"\d+ weights.*embed_tokens.weight"):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("elsewhere", [on_cpu, on_disk])
def test_what_accelerate_keeps_is_saved_without_a_device_map(elsewhere: Offload, family: str, tmp_path: Path) -> None:
    """Transformers alone writes nothing of such a model."""
    plain, model = tiny_model(family), elsewhere(tiny_model(family), tmp_path)
    expected = plain.state_dict()
    save(model, tmp_path / "saved")
    found = load(tmp_path / "saved").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())

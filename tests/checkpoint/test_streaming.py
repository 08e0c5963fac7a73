"""Block by block, the states are those of the whole model, and each weight is read once."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.checkpoint import load, streaming
from streamline_hooks.checkpoint.offloaded import StateStore, open_checkpoint
from streamline_hooks.checkpoint.streaming import BlockwisePass, StateStorage, probe_batch
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny
from tests.checkpoint.block_by_block import DTYPES, FAMILIES, calibration, on_disk, places, reads, written  # noqa: F401
from tests.tiny_models import left_padded, tiny_config, tiny_model, tokens


@pytest.mark.parametrize(("family", "dtype"), list(zip(FAMILIES, DTYPES, strict=True)))
def test_states_are_the_whole_models_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, family, dtype)
    wanted, model = places(load(folder, dtype="auto"), calibration()), open_checkpoint(folder)
    seen = []
    with BlockwisePass(model, calibration(), storage=StateStorage(4000)) as states:
        for place in states:
            seen.append(place)
            for number, of_batch in enumerate(wanted):
                state = states.read(place, number)
                assert state.dtype == dtype
                assert torch.equal(state, of_batch[place]), (place, number)
            states.drop(place - 1)
    assert seen == list(range(7))
    assert all(on_disk(model))


@pytest.mark.parametrize("check", [True, False])
def test_what_a_rotary_embedding_remembers_is_the_same_for_every_block(check: bool) -> None:
    """Of dynamic length: it grows with the longest sequence so far, which a shorter one then finds."""
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config("llama", max_position_embeddings=8, initializer_range=0.3, **scaled)
        model = transformers.LlamaForCausalLM(config).eval()
    batches: list[Any] = [tokens(2, 12), tokens(1, 30), tokens(1, 12, seed=1), tokens(1, 5)]
    remembered = dict(model.named_buffers())
    wanted = places(copy.deepcopy(model), batches)
    fresh = places(copy.deepcopy(model), batches[2:3])
    assert not torch.equal(fresh[0][-1], wanted[2][-1]), "the sequence before counts"
    with BlockwisePass(model, batches, check=check) as states:
        for place in states:
            for number, of_batch in enumerate(wanted):
                assert torch.equal(states.read(place, number), of_batch[place]), (place, number)
    assert all(buffer is remembered[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("check", [True, False])
def test_each_weight_is_read_once_and_once_more_for_the_check(
    check: bool,
    tmp_path: Path,
    reads: Counter[str],  # noqa: F811
) -> None:
    folder, whole = written(tmp_path, "llama")
    model, read_before = open_checkpoint(folder), Counter[str]()
    with BlockwisePass(model, calibration(), stop=4, check=check) as states:
        for place in states:
            assert all(on_disk(model)), "between two blocks nothing is in memory"
            now = Counter({name: n for name, n in reads.items() if name.startswith("model.layers.")})
            new = {name.split(".")[2] for name in now - read_before}
            assert place == 0 or new == {str(place - 1)}
            read_before = now
    names = [name for name, _ in whole.named_parameters() if name.startswith("model.layers.")]
    run = [name for name in names if int(name.split(".")[2]) < 4]
    assert reads == Counter(run) + Counter(names if check else [])
    assert "lm_head.weight" not in reads


def test_only_one_block_is_in_memory_while_it_runs(tmp_path: Path) -> None:
    model: Any = open_checkpoint(written(tmp_path)[0])
    resident: list[list[int]] = []

    def look(*_: Any) -> None:
        resident.append([k for k, gone in enumerate(on_disk_of) if not all(p.is_meta for p in gone.parameters())])

    on_disk_of = list(find_stack(model).blocks)
    for block in on_disk_of:
        block.self_attn.register_forward_hook(look)
    with BlockwisePass(model, calibration(), check=False) as states:
        list(states)
    assert resident == [[k] for k in range(6) for _ in calibration()]


def test_the_model_is_left_as_it_was_by_an_interruption(tmp_path: Path) -> None:
    model: Any = open_checkpoint(written(tmp_path)[0]).train()
    before = [id(module) for module in model.modules()]
    indices = [block.self_attn.layer_idx for block in model.model.layers]
    third = find_stack(model)[2]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = third.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), BlockwisePass(model, calibration(), check=False) as states:
        for place in states:
            assert place <= 2
    handle.remove()
    assert [id(module) for module in model.modules()] == before
    assert [block.self_attn.layer_idx for block in model.model.layers] == indices
    assert all(on_disk(model)) and model.training and model.config.num_hidden_layers == 6
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)
    with BlockwisePass(model, calibration()) as states:
        assert list(states) == list(range(7)), "and can be run again"


def test_no_more_is_in_memory_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = torch.ones(2, 3, 4)
    with closing(StateStore(2 * one.numel() * 4)) as store:
        for batch in range(3):
            store.keep(0, batch, one + batch)
        assert store.in_memory == 2 * one.numel() * 4
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        assert [float(store.read(0, batch)[0, 0, 0]) for batch in range(3)] == [1, 2, 3]
        store.drop(0)
        assert store.in_memory == 0 and not list(tmp_path.rglob("*.safetensors"))
        store.keep(1, 0, one)
        assert store.in_memory == one.numel() * 4, "what was dropped leaves room"
    assert not list(tmp_path.iterdir())


def test_the_bar_counts_the_bytes_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    counted: list[int] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, n: int) -> None:
            counted.append(n)

    def bar(*args: Any) -> Bar:
        asked.append(args)
        return Bar()

    monkeypatch.setattr(streaming, "progress_bar", bar)
    folder, whole = written(tmp_path)
    with BlockwisePass(open_checkpoint(folder), calibration(), stop=4, desc="trial") as states:
        list(states)
    size = 4 * sum(find_stack(whole).parameters_per_block[:4])
    assert asked == [(size, "trial: 4 of 6 blocks, each read once", "B", 0)]
    assert len(counted) == 4 * len(calibration()) and sum(counted) == size


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class SideBlock(nn.Module):
    """Adds to the state what the block before it has left beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.linear(x) if side is None else self.linear(x) + side
        return x + y, y


class WithSide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SideBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        side = None
        for block in self.blocks:
            x, side = block(x, side)
        return x


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = 2 * block(x)
        return x


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (WithSide, r"WithSide.*state of block 1 differs"),
        (Between, r"Between.*state of block 0 differs.*between two"),
        (Looped, r"Looped.*block 0 2 times.*once"),
    ],
)
def test_a_block_that_needs_more_than_the_state_is_found_out(model: type[nn.Module], text: str) -> None:
    with pytest.raises(UnsupportedSurgery, match=text), BlockwisePass(model(), [{"x": torch.randn(2, 5, 4)}]) as states:
        list(states)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gemma3n_text", r"\(streams, batch, tokens, features\)"),
        ("gemma4_text", r"each block.*second input"),
        ("xlnet", r"\(tokens, batch, features\)"),
        ("jamba", r"JambaConfig derives \w+ from other settings"),
        ("rwkv", r"block 1 fails.*AttributeError.*pre_ln"),
    ],
)
def test_architectures_that_are_refused(kind: str, text: str) -> None:
    if kind not in causal_model_types():
        pytest.skip(f"this Transformers has no {kind}")
    with pytest.raises(UnsupportedSurgery, match=text), BlockwisePass(tiny(kind), [tokens(2, 8)]) as states:
        list(states)


def test_blocks_that_share_keys_are_refused() -> None:
    model: Any = tiny_model("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedSurgery, match=r"run.*block 3.*4 to 5 share"):
        BlockwisePass(model, calibration())
    model.config.num_kv_shared_layers, model.config.is_encoder_decoder = 0, True
    with pytest.raises(UnsupportedSurgery, match="output of its encoder"):
        BlockwisePass(model, calibration())


def test_arguments_that_do_not_fit() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match="holds no token"):
        BlockwisePass(model, [])
    with pytest.raises(StreamlineError, match="stop=7.*at most 6"):
        BlockwisePass(model, calibration(), stop=7)


def test_the_probe_is_the_unpadded_end_of_two_sequences() -> None:
    ids, padded_left = tokens(3, 20), left_padded(3, 20)
    assert torch.equal(probe_batch(ids)["input_ids"], ids[:2, :16])
    probe = probe_batch({**padded_left, "scale": 2.0})
    assert probe["scale"] == 2.0
    for name, value in padded_left.items():
        assert torch.equal(probe[name], value[:2, -16:])


def test_a_state_that_is_not_finite_is_named() -> None:
    model: Any = tiny_model("llama")
    model.model.embed_tokens.weight.data[60] = float("nan")
    good, bad = left_padded(2, 6), torch.tensor([[5, 60, 7]])
    with pytest.raises(StreamlineError, match=r"block 0.*NaN.*1\)"):
        with BlockwisePass(model, [{**good, "input_ids": good["input_ids"].clamp(max=59)}, bad]) as states:
            list(states)

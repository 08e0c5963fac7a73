"""Models that are no Transformers models: saved, put into their architecture again to the bit, and refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack, fit_windows, load, profile, save
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.checkpoint.module_tensors import named_tensors, non_persistent_buffers
from streamline_hooks.core import bitwise_equal, prepare_inputs
from streamline_hooks.repair import LinearConfig, inherit_blocks, insert_replacement
from streamline_hooks.replacements import LinearReplacement, MLPReplacement, register_module
from tests.tiny_models import Nudge, repaired, tokens
from tests.world.test_plain_pytorch import BLOCKS, KINDS, WIDTH, NanoGPT, TuneDecoder, make

WEIGHTS, FILE = "model.safetensors", "streamline.json"
Surgery = Callable[[nn.Module], None]


class DecayBlock(nn.Module):
    """Computes with its number, which is baked into a buffer that no ``state_dict`` has."""

    def __init__(self, number: int, table: Tensor, act: Callable[[Tensor], Tensor], heads: int) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.act = number, heads, act
        self.register_buffer("decay", torch.full((WIDTH,), 1 / (number + 3)), persistent=False)
        self.register_buffer("table", table, persistent=False)  # one for all blocks
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("empty", None, persistent=False)
        self.mix, self.up, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x * self.decay + self.table[: x.shape[1]]).unflatten(-1, (self.heads, -1)).cumsum(-1)
        return x + self.drop(self.up(self.act(mixed.flatten(-2))))


class OwnModel(nn.Module):
    """A user's: its head is its embedding."""

    def __init__(
        self, act: Callable[[Tensor], Tensor] = functional.gelu, heads: int = 2, tied: bool = True, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        table = torch.linspace(-1, 1, 12)[:, None].expand(12, WIDTH)
        self.embed = nn.Embedding(31, WIDTH)
        self.blocks = nn.ModuleList(DecayBlock(k, table, act, heads) for k in range(blocks))
        self.head = nn.Linear(WIDTH, 31, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        state = self.embed(ids)
        for block in self.blocks:
            state = block(state)
        return self.head(state)


def built(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The original architecture with random weights, and a forward."""
    ids, image = torch.arange(14).view(2, 7), torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)
    if kind == "own":
        return OwnModel(), lambda model: model(ids)
    model = make(kind)[0]
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if kind == "encoder":
        states = torch.linspace(-1, 1, 2 * 7 * WIDTH).view(2, 7, WIDTH)
        return model, lambda model: model(states)
    if kind == "torchtune":
        given = {"mask": torch.ones(7, 7).tril().bool().expand(2, 7, 7), "input_pos": torch.arange(7).expand(2, 7)}
        return model, lambda model: model(ids, **given)
    return model, lambda model: model(ids if kind == "nanogpt" else image)


def anew(kind: str) -> nn.Module:
    """Built again, with weights of its own."""
    model = built(kind)[0].train()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def linear(seed: int, features: int = WIDTH) -> LinearReplacement:
    generator = torch.Generator().manual_seed(seed)
    return LinearReplacement.from_map(0.3 * torch.randn(features, features, generator=generator))


@contextmanager
def committing(model: nn.Module, stack: str | None = None, **notes: Any) -> Iterator[LayerSurgeon]:
    with LayerSurgeon(model, stack) as surgeon:
        yield surgeon
        surgeon.commit(**notes)


def removal(model: nn.Module) -> None:
    with committing(model) as surgeon:
        surgeon.remove([0])
        surgeon.remove(range(2, 4))


def spliced_at(*places: int) -> Surgery:
    def operate(model: nn.Module) -> None:
        with committing(model) as surgeon:
            for k in places:
                surgeon.insert(k, linear(k))
            surgeon.insert(places[0], MLPReplacement(WIDTH, 8))

    return operate


def window(model: nn.Module) -> None:
    with committing(model) as surgeon:
        surgeon.replace(range(1, 4), linear(1))


def last_window(model: nn.Module) -> None:
    with committing(model) as surgeon:
        surgeon.replace(range(3, BLOCKS), linear(1))


def twice(model: nn.Module) -> None:
    with committing(model) as surgeon:
        surgeon.replace(range(1, 3), linear(1))
    with committing(model) as surgeon:
        surgeon.remove([0])
        surgeon.insert(3, linear(2))


def twice_over_a_splice(model: nn.Module) -> None:
    with committing(model) as surgeon:
        surgeon.insert(2, linear(1))
        surgeon.insert(BLOCKS, linear(2))
    with committing(model) as surgeon:
        surgeon.remove(range(3, BLOCKS))


def inherited(model: nn.Module) -> None:
    stack = find_stack(model)
    block = inherit_blocks(stack, range(1, 4))
    for parameter in block.parameters():
        parameter.data.mul_(1.5)
    with committing(model) as surgeon:
        surgeon.replace(range(1, 4), block)


def inherited_with_splices_twice(model: nn.Module) -> None:
    inherited(model)
    with committing(model) as surgeon:
        surgeon.insert(1, linear(1))
        surgeon.insert(1, inherit_blocks(find_stack(model), range(2)))
        surgeon.insert(1, linear(2))
        surgeon.insert(3, inherit_blocks(find_stack(model), range(2)))
        surgeon.insert(3, linear(3))


SURGERIES: dict[str, Surgery] = {
    "removal": removal,
    "at the start": spliced_at(0),
    "in the middle": spliced_at(2, 3),
    "at the end": spliced_at(BLOCKS),
    "everywhere": spliced_at(0, 1, 2, 3, 4, 5),
    "a window": window,
    "the last window": last_window,
    "twice": twice,
    "twice, over a splice": twice_over_a_splice,
    "inherited": inherited,
    "inherited, with splices, twice": inherited_with_splices_twice,
}


def holds(model: nn.Module) -> dict[str, Tensor]:
    return {**named_tensors(model), **model.state_dict()}


def require_same(one: nn.Module, other: nn.Module) -> None:
    """To the bit: weights, buffers, precision, order, and what is shared."""
    assert list(one.state_dict()) == list(other.state_dict())
    ours, theirs = holds(one), holds(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert bitwise_equal(ours[name], theirs[name]), name
    assert [len(s) for s in _ties(one)] == [len(s) for s in _ties(other)]


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def as_it_is(model: nn.Module) -> Any:
    """All that an attempt that fails must leave."""
    modules = [
        (path, id(m), m.training, {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))})
        for path, m in model.named_modules(remove_duplicate=False)
    ]
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    tensors = [(name, id(t), t.dtype, t.detach().clone().tolist()) for name, t in named_tensors(model).items()]
    return modules, hooks, tensors, copy.deepcopy(vars(getattr(model, "config", None) or nn.Identity()))


@contextmanager
def refused(match: str, model: nn.Module) -> Iterator[None]:
    """An error with a text, after which the model is as it was."""
    before = as_it_is(model)
    with pytest.raises(StreamlineError, match=match):
        yield
    assert as_it_is(model) == before


def altered(folder: Path, change: Callable[[dict[str, Any]], Any], *, sums: bool = False) -> None:
    content = json.loads((folder / FILE).read_text())
    change(content)
    (folder / FILE).write_text(json.dumps(content))
    if not sums:
        (folder / "SHA256SUMS").unlink(missing_ok=True)


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    (folder / "SHA256SUMS").unlink()


# Round trips


# Every surgery on one model, and two that use everything on the others.
ROUND_TRIPS = [("own", surgery) for surgery in SURGERIES] + [
    (kind, surgery) for kind in KINDS for surgery in ("everywhere", "inherited, with splices, twice")
]


@pytest.mark.parametrize(("kind", "surgery"), ROUND_TRIPS)
def test_what_was_saved_comes_back_to_the_bit(kind: str, surgery: str, tmp_path: Path) -> None:
    model, run = built(kind)
    SURGERIES[surgery](model)
    model.eval()
    into = anew(kind)
    before = {id(parameter) for parameter in into.parameters()}
    loaded = load(save(model, tmp_path / "model"), into=into)
    assert loaded is into and not any(module.training for module in loaded.modules())
    require_same(model, loaded)
    with torch.no_grad():
        assert torch.equal(run(model), run(loaded))
    assert read_plans(loaded) == read_plans(model) == read_plans(tmp_path / "model")
    assert len(find_stack(loaded)) == len(read_plans(loaded)[-1].slots)
    assert vars(getattr(loaded, "config", nn.Identity())).keys() == vars(getattr(model, "config", nn.Identity())).keys()
    numbers = [[vars(block).get("layer_idx") for block in find_stack(m).blocks] for m in (model, loaded)]
    assert numbers[0] == numbers[1]
    kept = [p for name, p in loaded.named_parameters() if "spliced" not in name]
    assert "inherited" in surgery or {id(p) for p in kept} <= before
    if isinstance(loaded, NanoGPT):
        assert loaded.config.n_layer == len(find_stack(loaded))


def test_saved_loaded_and_saved_again_is_the_same(tmp_path: Path) -> None:
    model, _ = built("timm")
    twice(model)
    loaded = load(save(model, tmp_path / "a"), into=anew("timm"))
    save(loaded, tmp_path / "b")
    for name in (WEIGHTS, FILE, "README.md", "SHA256SUMS"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with committing(loaded) as surgeon:  # and operated on once more
        surgeon.remove([1])
    again = load(save(loaded, tmp_path / "c"), into=anew("timm"))
    require_same(loaded, again)
    assert [len(plan.slots) for plan in read_plans(again)] == [3, 2, 1]


def swin() -> nn.Module:
    vision = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_classes": 5}
    return vision.SwinTransformer(**sizes, depths=(2, 6, 2), num_heads=(2, 2, 2)).eval()


def test_stages_whose_blocks_are_not_alike(tmp_path: Path) -> None:
    """Every second block of timm's Swin shifts its windows, and has a mask that no ``state_dict`` has."""
    torch.manual_seed(0)
    model, image = swin(), torch.randn(2, 3, 32, 32)
    with committing(model, "layers.1.blocks") as surgeon:
        surgeon.replace(range(1, 3), copy.deepcopy(surgeon.stack[1]))
        surgeon.insert(4, linear(1, 32))
    with committing(model, "layers.0.blocks") as surgeon:
        surgeon.replace([1], linear(2))
    with committing(model, "layers.1.blocks") as surgeon:
        surgeon.insert(0, copy.deepcopy(surgeon.stack[4]))  # one that shifts, where the first does not
    loaded = load(save(model, tmp_path / "model"), into=swin())
    require_same(model, loaded)
    shifts = [[block.shift_size for block in find_stack(m, "layers.1.blocks").blocks] for m in (model, loaded)]
    assert shifts[0] == shifts[1] and shifts[0][0] == (2, 2)
    with torch.no_grad():
        assert torch.equal(model(image), loaded(image))
    assert [plan.stack for plan in read_plans(loaded)] == ["layers.1.blocks", "layers.0.blocks", "layers.1.blocks"]
    altered(tmp_path / "model", lambda c: [e["set"].update(shift_size=[1, 1]) for e in c["settings"] if _shifts(e)])
    with refused(r"block 0 of layers\.1\.blocks.*SwinTransformerBlock.*inserted", into := swin()):
        load(tmp_path / "model", into=into)


def _shifts(entry: dict[str, Any]) -> bool:
    return entry["set"].get("shift_size") == [2, 2]


# Nothing is lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["own", "encoder"])
def test_a_precision_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = built(kind)
    twice(model)
    model.to(dtype)
    loaded = load(save(model, tmp_path / "model"), into=anew(kind))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    require_same(model, loaded)


def test_the_folder_may_be_overwritten_by_the_model_that_came_from_it(tmp_path: Path) -> None:
    model, _ = built("own")
    twice(model)
    model.bfloat16()
    loaded = load(save(model, tmp_path / "model"), into=anew("own"))
    for parameter in loaded.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    save(loaded, tmp_path / "model", overwrite=True)
    require_same(model, loaded)
    require_same(model, load(tmp_path / "model", into=anew("own")))


def test_several_precisions_in_one_model(tmp_path: Path) -> None:
    model, _ = built("own")
    model.bfloat16()
    window(model)
    find_stack(model)[1].spliced_before.float()
    loaded = load(save(model, tmp_path / "model"), into=anew("own").double())
    require_same(model, loaded)
    assert find_stack(loaded)[1].spliced_before[0].projection.weight.dtype == torch.float32


def test_buffers_that_no_state_dict_has(tmp_path: Path) -> None:
    model, run = built("own")
    with committing(model) as surgeon:
        surgeon.remove([0, 1])
    for number, block in enumerate(find_stack(model).blocks):
        block.decay = block.decay + number
        block.seen.fill_(7 + number)
        block.table = torch.ones(20, WIDTH)  # grown since it was built
    find_stack(model)[0].empty = torch.full((3,), float("nan"))
    saved = save(model, tmp_path / "model")
    loaded = load(saved, into=anew("own"))
    require_same(model, loaded)
    assert torch.equal(run(model.eval()), run(loaded))
    assert find_stack(loaded)[0].empty.isnan().all() and "blocks.0.empty" in non_persistent_buffers(loaded)
    assert "blocks.0.decay" not in loaded.state_dict() and "blocks.1.empty" not in load_file(saved / WEIGHTS)


def test_one_tensor_is_written_once_and_stays_one(tmp_path: Path) -> None:
    model, _ = built("own")
    window(model)
    loaded = load(save(model, tmp_path / "model"), into=anew("own"))
    held = load_file(tmp_path / "model" / WEIGHTS)
    assert ("head.weight" in held) != ("embed.weight" in held)
    assert loaded.head.weight is loaded.embed.weight
    tables = [block.table.untyped_storage().data_ptr() for block in loaded.blocks]
    assert len(set(tables)) == 1


def test_a_repair_that_was_trained_after_the_commit(tmp_path: Path) -> None:
    model, run = built("timm")
    window(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model).square().mean().backward()
    optimizer.step()
    loaded = load(save(model, tmp_path / "model"), into=anew("timm"))
    require_same(model, loaded)
    run(loaded).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_zeroed_and_folded_branches(tmp_path: Path) -> None:
    model, run = built("timm")
    with committing(model) as surgeon:
        batch = {"x": torch.randn(2, 3, 16, 16)}
        surgeon.zero_branch(1, "attention", batch=batch)
        surgeon.fold(3, 2 * torch.eye(WIDTH), batch=batch)
    loaded = load(save(model, tmp_path / "model"), into=anew("timm"))
    require_same(model, loaded)
    assert torch.equal(run(model), run(loaded))
    assert read_plans(loaded)[0].zeroed == {1: ("attention",)} and read_plans(loaded)[0].folded == {3: ("mlp",)}


def test_weights_that_accelerate_keeps_elsewhere(tmp_path: Path) -> None:
    import accelerate

    model, _ = built("timm")
    window(model)
    whole = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    require_same(whole, load(save(model, tmp_path / "model"), into=anew("timm")))


def test_copies_and_pickles_carry_the_plan(tmp_path: Path) -> None:
    model, _ = built("own")
    twice(model)
    for number, other in enumerate((copy.deepcopy(model), model.train())):
        require_same(other, load(save(other, tmp_path / str(number)), into=anew("own")))


def test_notes_and_the_card(tmp_path: Path) -> None:
    model, _ = built("timm")
    with committing(model, calibration={"images": 12}) as surgeon:
        surgeon.replace(range(1, 3), linear(1))
    save(model, tmp_path / "model", report={"anything": 1})
    entry = json.loads((tmp_path / "model" / FILE).read_text())["streamline_hooks"]["history"][0]
    assert entry["calibration"] == {"images": 12} and {"torch", "timm"} <= entry["versions"].keys()
    assert json.loads((tmp_path / "model" / "report.json").read_text()) == {"anything": 1}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: streamline_hooks" in card and "pipeline_tag" not in card
    assert "# VisionTransformer, with fewer blocks" in card and "LinearReplacement replaces blocks 1 to 2" in card
    assert "timm.models.vision_transformer.VisionTransformer` with 5 blocks in `blocks`" in card
    assert "streamline_hooks.load(folder, into=model)" in card
    with pytest.raises(StreamlineError, match=r"commit\(\).*JSON"):
        with LayerSurgeon(model) as surgeon:
            surgeon.commit(what=object())
    assert len(read_plans(model)) == 1


def test_a_users_own_kind(tmp_path: Path) -> None:
    @register_module("test-plain-shift")
    class Shift(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(features))
            self.register_buffer("scale", torch.rand(features), persistent=False)

        def to_config(self) -> dict[str, Any]:
            return {"features": len(self.bias)}

        def forward(self, state: Tensor) -> Tensor:
            return state * self.scale + self.bias

    model, run = built("encoder")
    with committing(model) as surgeon:
        surgeon.replace(range(1, 4), Shift(WIDTH))
    loaded = load(save(model, tmp_path / "model"), into=anew("encoder"))
    require_same(model, loaded)
    assert torch.equal(run(model), run(loaded))
    altered(tmp_path / "model", lambda c: _entries(c)[0]["modules"][0].update(kind="never-registered"))
    with refused(r"'never-registered'.*unknown", into := anew("encoder")):
        load(tmp_path / "model", into=into)


# What is wrong with a folder


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = content["streamline_hooks"]["stacks"][0]["splices"]
    return entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A timm model with a splice in the place of blocks 1 to 3."""
    model, _ = built("timm")
    window(model)
    return save(model, tmp_path / "model")


@pytest.mark.parametrize("name", [WEIGHTS, FILE])
def test_a_changed_byte(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    at = len(content) - 1 if name == WEIGHTS else content.index(b"layer-norm" if b"layer-norm" in content else b"1e-06")
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with refused(rf"{name}.*SHA256SUMS", into := anew("timm")):
        load(folder, into=into)


def test_a_file_that_is_cut_off_or_gone(folder: Path) -> None:
    into, whole = anew("timm"), (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    with refused(r"model\.safetensors.*damaged", into):
        load(folder, into=into)
    (folder / WEIGHTS).unlink()
    with refused(r"model\.safetensors.*missing.*Copy", into):
        load(folder, into=into)
    (folder / "pytorch_model.bin").write_bytes(whole)
    with refused(r"pytorch_model\.bin.*can run code", into):
        load(folder, into=into)
    (folder / FILE).write_text("{")
    with refused(r"streamline\.json.*JSON", into):
        load(folder, into=into)


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop("blocks.0.mlp.fc1.weight"), r"blocks\.0\.mlp\.fc1\.weight.*missing"),
    "too many": (
        lambda w: w.update({"blocks.9.w": torch.zeros(2)}),
        r"blocks\.9\.w.*no such weight",
    ),
    "shape": (
        lambda w: w.update({"norm.bias": torch.zeros(3)}),
        r"norm\.bias.*\(3,\).*\(16,\).*VisionTransformer",
    ),
    "integers": (
        lambda w: w.update({"norm.bias": torch.zeros(WIDTH).long()}),
        r"norm\.bias.*torch\.int64.*torch\.float32",
    ),
    "of a splice": (
        lambda w: w.pop("blocks.1.spliced_before.0.projection.weight"),
        r"blocks\.1\.spliced_before\.0\.projection\.weight.*spliced module is missing",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_weight_that_is_not_as_it_must_be(wrong: str, folder: Path) -> None:
    change, said = WRONG_WEIGHTS[wrong]
    with_weights(folder, change)
    with refused(rf"model\.safetensors.*{said}", into := anew("timm")):
        load(folder, into=into)


def test_a_lost_splice(folder: Path) -> None:
    with_weights(folder, lambda weights: weights.pop("blocks.1.spliced_before.0.projection.weight"))
    altered(folder, lambda content: _entries(content).clear())
    with refused(r"1 splices.*0 are described", into := anew("timm")):
        load(folder, into=into)
    altered(folder, lambda content: content["streamline_hooks"]["history"][0].update(splices=[]))
    loaded = load(folder, into=into)  # told nowhere any more: a plain removal, which is what the history says
    assert read_plans(loaded)[0].splices == ()


def test_splices_at_places_that_are_not_there(folder: Path) -> None:
    into = anew("timm")
    altered(folder, lambda content: _entries(content)[0].update(block=4))
    with refused(r"spliced_before block 4.*2 blocks", into):
        load(folder, into=into)
    altered(folder, lambda content: _entries(content)[0].update(block=0, place="spliced_after"))
    with refused(r"spliced_after block 0.*no such position", into):
        load(folder, into=into)
    altered(folder, lambda content: _entries(content)[0].update(block=0, place="spliced_before"))
    with refused(r"1 splices.*1 are described.*other positions", into):
        load(folder, into=into)


def test_a_description_that_is_none(folder: Path) -> None:
    into = anew("timm")
    altered(folder, lambda content: content["streamline_hooks"].update(format=99))
    with refused(r"format 99.*up to 1\. .*Upgrade", into):
        load(folder, into=into)
    altered(folder, lambda content: content["streamline_hooks"].update(format=1, stacks=[]))
    with refused(r"streamline_hooks\.stacks.*blocks differ", into):
        load(folder, into=into)
    altered(folder, lambda content: content.pop("settings"))
    with refused(r"streamline\.json.*KeyError: 'settings'", into):
        load(folder, into=into)
    (folder / "model.safetensors.index.json").write_text("{}")
    with refused(r"model\.safetensors.*model\.safetensors\.index\.json", into):
        load(folder, into=into)


def test_buffers_and_ties_that_do_not_fit(tmp_path: Path) -> None:
    model, _ = built("own")
    window(model)
    saved, into = save(model, tmp_path / "model"), anew("own")
    untied = OwnModel(tied=False)
    with refused(r"embed\.weight and head\.weight are tied in the file.*not in .*OwnModel", untied):
        load(saved, into=untied)
    two = OwnModel(tied=False)
    window(two)
    with refused(r"embed\.weight and head\.weight are separate in the file.*tied in .*OwnModel", into):
        load(save(two, tmp_path / "two"), into=into)
    into.blocks[0].empty = torch.zeros(2)
    with refused(r"model\.safetensors, blocks\.0\.empty.*missing", into):
        load(saved, into=into)
    altered(saved, lambda content: content["buffers"].append("blocks.0.nowhere"))
    with refused(r"blocks\.0\.nowhere.*missing", into := anew("own")):
        load(saved, into=into)


# The wrong architecture


def encoder(**options: Any) -> nn.TransformerEncoder:
    settings = {"nhead": 2, "dim_feedforward": 32, "batch_first": True, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, **settings), BLOCKS, enable_nested_tensor=False)


def test_another_class(folder: Path) -> None:
    into = anew("encoder")
    said = r"timm\.models\.vision_transformer\.VisionTransformer.*into is a torch\.nn\..*TransformerEncoder\. B"
    with refused(said, into):
        load(folder, into=into)
    with pytest.raises(StreamlineError, match=r"into=.*nn\.Module"):
        load(folder, into="vit")  # type: ignore[call-overload]
    pytest.importorskip("torchvision")
    with refused(r"in blocks, .*into is .*torchvision.*VisionTransformer without", into := anew("torchvision")):
        load(folder, into=into)


def test_a_class_that_has_moved(tmp_path: Path) -> None:
    model = type("OwnModel", (OwnModel,), {"__module__": "__main__"})()
    twice(model)
    require_same(model, load(save(model, tmp_path / "model"), into=anew("own")))


def test_another_number_of_blocks(tmp_path: Path) -> None:
    model = OwnModel()
    window(model)
    with refused(r"blocks of this OwnModel.*2 blocks.*had 5", into := OwnModel(blocks=2)):
        load(save(model, tmp_path / "model"), into=into)


def test_one_that_was_operated_on_already(folder: Path, tmp_path: Path) -> None:
    into = anew("timm")
    removal(into)
    with refused(r"VisionTransformer.*surgery has already changed", into):
        load(folder, into=into)
    with LayerSurgeon(other := anew("timm")) as surgeon:
        surgeon.insert(0, linear(0))
        with pytest.raises(StreamlineError, match="surgery has already changed"):
            load(folder, into=other)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"nhead": 4}, r"layers\.0\.self_attn\.num_heads is 4.*2"),
    "norm": ({"norm_first": True}, r"layers\.0\.norm_first is True.*False"),
    "activation": ({"activation": "gelu"}, r"layers\.0\.activation"),
    "eps": ({"layer_norm_eps": 1e-3}, r"layers\.0\.norm1\.eps is 0\.001.*1e-05"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_of_the_same_shapes(name: str, tmp_path: Path) -> None:
    model = encoder()
    window(model)
    changed, said = SETTINGS[name]
    with refused(rf"TransformerEncoder.*{said}", into := encoder(**changed)):
        load(save(model, tmp_path / "model"), into=into)


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    model = encoder(dropout=0.1)
    window(model)
    require_same(model, load(save(model, tmp_path / "model"), into=encoder(dropout=0.0)))
    own = OwnModel()
    window(own)
    own.blocks[0].drop = nn.Identity()
    loaded = load(save(own, tmp_path / "own"), into=OwnModel())
    require_same(own, loaded)
    with refused(r"blocks\.0\.act is 'relu\(\)'.*'gelu\(\)'", into := OwnModel(act=functional.relu)):
        load(tmp_path / "own", into=into)


def test_words_are_settings_and_paths_and_long_texts_are_not(tmp_path: Path) -> None:
    """A path tells of its author's machine, and is another one on every other; neither is written or compared."""
    texts = {"mode": "causal", "cache": "/home/author/cache", "windows": "C:\\author", "about": "author " * 10}
    model, into = OwnModel(), OwnModel()
    for name, text in texts.items():
        setattr(model, name, text)
        setattr(into, name, text.replace("author", "reader"))
    removal(model)
    require_same(model, load(save(model, tmp_path / "model"), into=into))
    assert "author" not in (tmp_path / "model" / FILE).read_text()
    other = OwnModel()
    other.mode = "full"
    with refused(r"mode is 'full'.*'causal'", other):
        load(tmp_path / "model", into=other)


def test_a_setting_that_counts_can_be_set_first(tmp_path: Path) -> None:
    model = OwnModel()
    model.steps = 12
    removal(model)
    into = OwnModel()
    into.steps = 0
    with refused(r"steps is 0.*12.*before loading", into):
        load(save(model, tmp_path / "model"), into=into)
    into.steps = 12
    require_same(model, load(tmp_path / "model", into=into))


def test_one_without_memory_for_its_weights(folder: Path) -> None:
    with torch.device("meta"):
        into = anew("timm")
    with pytest.raises(StreamlineError, match="meta device"):
        load(folder, into=into)


def test_one_that_changes_what_is_put_into_it(tmp_path: Path) -> None:
    def forget(module: Any, keys: Any) -> None:
        nn.init.zeros_(module.embed.weight)

    model, into = OwnModel(), OwnModel()
    removal(model)
    into.register_load_state_dict_post_hook(forget)
    with pytest.raises(StreamlineError, match=r"embed\.weight.*OwnModel"):
        load(save(model, tmp_path / "model"), into=into)


def test_a_block_put_in_that_is_no_copy(tmp_path: Path) -> None:
    model = encoder()
    with committing(model) as surgeon:
        surgeon.replace([1, 2], nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True))
    said = r"block 1 of layers.*TransformerEncoderLayer.*inserted.*self_attn\.num_heads is 2.*4"
    with refused(said, into := encoder()):
        load(save(model, tmp_path / "model"), into=into)


# Which way a folder is loaded


def test_without_into_and_with_what_is_for_transformers(folder: Path) -> None:
    with pytest.raises(StreamlineError, match=r"VisionTransformer.*into=model\)"):
        load(folder)
    for options in ({"as_original": True}, {"dtype": "auto"}):
        with refused(f"{next(iter(options))} is for Transformers models", into := anew("timm")):
            load(folder, into=into, **options)  # type: ignore[call-overload]
    (folder / "config.json").write_text("{}")
    with pytest.raises(StreamlineError, match=r"config\.json.*streamline\.json"):
        load(folder)


def test_into_for_a_transformers_model(tmp_path: Path) -> None:
    model = repaired("llama")
    with pytest.raises(StreamlineError, match=r"into=.*Omit into"):
        load(save(model, tmp_path / "model"), into=model)
    assert torch.equal(load(tmp_path / "model")(tokens(1, 4)).logits, model(tokens(1, 4)).logits)


def test_no_plans() -> None:
    with pytest.raises(StreamlineError, match=r"OwnModel.*no record of a surgery"):
        read_plans(OwnModel())


# What is not saved


def test_no_surgery_or_one_that_is_open(tmp_path: Path) -> None:
    model, where = OwnModel(), tmp_path / "model"
    with pytest.raises(StreamlineError, match=r"OwnModel.*not a Transformers model.*no surgery"):
        save(model, where)
    window(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        duplicate = copy.deepcopy(model)
        for one in (model, duplicate):
            with pytest.raises(StreamlineError, match=r"LayerSurgeon.*OwnModel"):
                save(one, where)
    with committing(duplicate, "blocks") as surgeon:
        surgeon.insert(0, linear(0))
    with pytest.raises(StreamlineError, match=r"1 begins.*1 blocks.*2 were"):
        save(duplicate, where)
    assert not where.exists() and not list(tmp_path.iterdir())
    save(model, where)


def test_a_block_that_was_copied_inside_another_surgeon(tmp_path: Path) -> None:
    model = OwnModel()
    with LayerSurgeon(model) as surgeon:
        block = copy.deepcopy(surgeon.stack[1])
    with committing(model) as surgeon:
        surgeon.replace(range(1, 3), block)
    require_same(model, load(save(model, tmp_path / "model"), into=OwnModel()))


def test_a_part_that_was_operated_on(tmp_path: Path) -> None:
    model = OwnModel()
    window(model)
    with pytest.raises(StreamlineError, match=r"part of this Sequential, 0.*Save that part.*save\(model"):
        save(nn.Sequential(model), tmp_path / "model")


def test_blocks_that_something_else_changed(tmp_path: Path) -> None:
    model = OwnModel()
    window(model)
    whole = copy.deepcopy(model)
    del model.blocks[1]._modules["spliced_before"]
    with pytest.raises(StreamlineError, match=r"2 blocks.*0 spliced.*2 and 1"):
        save(model, tmp_path / "model")
    del whole.blocks[0]
    with pytest.raises(StreamlineError, match=r"1 blocks.*1 spliced.*2 and 1"):
        save(whole, tmp_path / "model")


def test_stacks_inside_one_another(tmp_path: Path) -> None:
    model = swin()
    with committing(model, "layers.1.blocks") as surgeon:
        surgeon.remove([1])
    with committing(model, "layers") as surgeon:
        surgeon.remove([2])
    with pytest.raises(StreamlineError, match=r"layers and layers\.1\.blocks.*both"):
        save(model, tmp_path / "model")


def test_what_safetensors_have_no_place_for(tmp_path: Path) -> None:
    class Extra(OwnModel):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

        def set_extra_state(self, state: Any) -> None: ...

    model = Extra()
    removal(model)
    with pytest.raises(StreamlineError, match=r"_extra_state.*Extra.*dict"):
        save(model, tmp_path / "model")
    views = OwnModel(tied=False)
    removal(views)
    views.head.weight = nn.Parameter(views.embed.weight.data[:20])
    with pytest.raises(StreamlineError, match=r"embed\.weight.*head\.weight"):
        save(views, tmp_path / "model")
    spliced = OwnModel()
    with committing(spliced) as surgeon:
        surgeon.insert(1, Nudge(WIDTH))
    with pytest.raises(StreamlineError, match=r"Nudge.*checkpoint"):
        save(spliced, tmp_path / "model")
    with pytest.raises(StreamlineError, match=r"max_shard_size='1GB'"):
        save(views, tmp_path / "model", max_shard_size="1GB")
    sparse, quantized = torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    for tensor in (sparse, quantized, torch.eye(3).as_subclass(OfAnotherClass)):
        other = OwnModel()
        removal(other)
        other.register_buffer("graph", tensor)
        with pytest.raises(StreamlineError, match=r"graph.*OwnModel.*Expected a dense"):
            save(other, tmp_path / "model")
    assert not list(tmp_path.iterdir())


class OfAnotherClass(Tensor):
    """As tensors that hold more than their values are, a scale or a part of a mesh."""


def test_tensors_that_partly_overlap_are_refused_wherever_they_begin(tmp_path: Path) -> None:
    flat = torch.zeros(64)
    for first, second in ((flat[8:20], flat[16:24]), (flat[:16], flat[15:40]), (flat[:8], flat[4:6])):
        model = OwnModel()
        removal(model)
        model.register_buffer("first", first)
        model.register_buffer("second", second)
        with pytest.raises(StreamlineError, match=r"first and second overlap"):
            save(model, tmp_path / "model")


def test_a_tensor_that_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    """As flattened weights are: each is written by itself."""
    model = OwnModel()
    removal(model)
    flat = torch.randn(2 * WIDTH)
    for number in (0, 1):
        model.blocks[number].mix.bias.data = flat[number * WIDTH : (number + 1) * WIDTH]
    require_same(model, load(save(model, tmp_path / "model"), into=OwnModel()))


# Measured, cut and repaired on images


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_images_alone_are_batches(kind: str, tmp_path: Path) -> None:
    model, _ = built(kind)
    torch.manual_seed(1)
    images = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    named = [{"x": batch} for batch in images]
    alone, by_name = (profile(model, batches, replicates=20) for batches in (images, named))
    assert (alone.num_boundaries, alone.tokens, alone.sequences) == (BLOCKS + 1, 12 * 5, 12)
    assert torch.equal(alone.cosine, by_name.cosine) and alone.interval("cosine", range(1, 3))[0] < 1
    (repair,) = fit_windows(model, [range(1, 3)], LinearConfig(), images[:2], images[2:])
    (again,) = fit_windows(model, [range(1, 3)], LinearConfig(), named[:2], named[2:])
    assert repair.repaired_error == again.repaired_error < repair.removal_error
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.remove(range(1, 3))
        assert surgeon.check([0]) == []
        shorter = model(images[0])
    with committing(model) as surgeon:
        insert_replacement(surgeon, range(1, 3), repair.replacement_module)
    loaded = load(save(model, tmp_path / "model"), into=anew(kind))
    with torch.no_grad():
        assert torch.equal(loaded(images[0]), model(images[0])) and not torch.equal(loaded(images[0]), shorter)


def test_a_bare_tensor_goes_where_the_model_takes_it() -> None:
    import transformers

    def names(model: nn.Module, batch: Tensor) -> list[str]:
        return [name for name, value in prepare_inputs(model, batch).items() if isinstance(value, Tensor)]

    ids, image, states = torch.ones(1, 4).long(), torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, WIDTH)
    assert names(NanoGPT(), ids) == ["idx"] and names(TuneDecoder(), ids) == ["tokens"]
    assert names(encoder(), states) == ["src"] and names(OwnModel(), ids) == ["ids"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    assert names(vit, image) == ["pixel_values"]
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**sizes, "vocab_size": 9}, vision_config={**sizes, "image_size": 16})
    )
    assert names(clip, image) == ["pixel_values"] and names(clip, ids) == ["input_ids"]
    llama = repaired("llama")
    assert names(llama, ids) == names(llama, states) == ["input_ids"]

    class Wrapper(nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return kwargs

    assert names(Wrapper(), ids) == ["input_ids"]


class Reaching(nn.Module):
    """A block that holds how far it looks back, which grows with its number."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.inner = reach, nn.Linear(8, 8)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + torch.tanh(self.inner(torch.roll(state, self.reach, 1)))


def test_what_may_be_a_number_or_something_else_is_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList(Reaching(k + 1) for k in range(6)))
    with LayerSurgeon(model, "1") as surgeon:
        with pytest.warns(UserWarning, match=r"of 1.*'reach' \(1.*2.*3"):
            surgeon.remove([2])
    with LayerSurgeon(model, "1") as surgeon, warnings.catch_warnings():
        warnings.simplefilter("error")
        surgeon.remove([5])  # behind it nothing is counted anew

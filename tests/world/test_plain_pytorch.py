"""Models that are no Transformers models: PyTorch's own encoder, nanoGPT, vision transformers, torchtune's decoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.surgery import resume
from tests.tiny_models import Nudge

WIDTH, BLOCKS = 16, 5


@dataclass
class GPTConfig:
    """As nanoGPT has it: a plain object, which says how many blocks there are."""

    n_layer: int = BLOCKS
    n_embd: int = WIDTH
    vocab_size: int = 31


class GPTBlock(nn.Module):
    """Causal attention and an MLP; it knows its number."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(config.n_embd)
        self.attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 32), nn.GELU(), nn.Linear(32, config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.norm(x)).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mlp(x)


class NanoGPT(nn.Module):
    """Blocks in a ``ModuleDict``, under the name of one letter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = GPTConfig()
        blocks = nn.ModuleList(GPTBlock(self.config, k) for k in range(BLOCKS))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(31, WIDTH), "h": blocks, "ln_f": nn.LayerNorm(WIDTH)})
        self.lm_head = nn.Linear(WIDTH, 31, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class TuneLayer(nn.Module):
    """A block whose mask and positions are keywords that must reach it unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        assert mask is not None and input_pos is not None
        q, k, v = self.attn(x).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(q + input_pos[..., None].cos(), k, v, attn_mask=mask)
        return x + self.mlp(x)


class TuneDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(31, WIDTH)
        self.layers = nn.ModuleList(TuneLayer() for _ in range(BLOCKS))
        self.output = nn.Linear(WIDTH, 31, bias=False)

    def forward(self, tokens: Tensor, *, mask: Tensor, input_pos: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.output(h)


Made = tuple[nn.Module, Callable[[], Any], str, str]  # the model, a forward, the stack's path, what describes it


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), BLOCKS)


def make(name: str) -> Made:
    """A model of a kind with random weights that are far from the identity."""
    torch.manual_seed(0)
    ids, image = torch.randint(0, 31, (2, 7)), torch.randn(2, 3, 16, 16)
    model: Any
    if name == "encoder":
        model, states = encoder(), torch.randn(2, 7, WIDTH)
        made: Made = (model, lambda: model(states), "layers", "no config")
    elif name == "nanogpt":
        model = NanoGPT()
        made = (model, lambda: model(ids), "transformer.h", "GPTConfig.n_layer")
    elif name == "torchtune":
        model, positions = TuneDecoder(), torch.arange(7).expand(2, 7)
        mask = torch.ones(7, 7).tril().bool().expand(2, 7, 7)
        made = (model, lambda: model(ids, mask=mask, input_pos=positions), "layers", "no config")
    elif name == "torchvision":
        vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
        model = vision.VisionTransformer(16, 8, BLOCKS, 2, WIDTH, 32, num_classes=5)
        made = (model, lambda: model(image), "encoder.layers", "no config")
    else:
        vision = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
        model = vision.VisionTransformer(16, 8, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, num_classes=5)
        made = (model, lambda: model(image), "blocks", "no config")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    return made


KINDS = ("encoder", "nanogpt", "torchtune", "torchvision", "timm")


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    return make(request.param)


def numbers(model: nn.Module) -> list[int]:
    return [vars(block)["layer_idx"] for block in find_stack(model).container.children() if "layer_idx" in vars(block)]


def test_the_stack_is_found_and_says_what_describes_it(made: Made) -> None:
    model, _, path, described = made
    stack = find_stack(model)
    assert (stack.path, len(stack)) == (path, BLOCKS)
    assert str(stack).endswith(f"described by {described}")


@pytest.mark.parametrize("config", ["base", (1, 2), {"depth": BLOCKS}])
def test_a_config_of_another_kind_is_no_config(config: object) -> None:
    model = encoder()
    model.config = config  # type: ignore[assignment]
    assert str(find_stack(model)).endswith("described by no config")


def test_what_is_recorded_is_what_the_blocks_get_and_give(made: Made) -> None:
    model, run, _, _ = made
    seen: list[tuple[Tensor, Tensor]] = []
    for block in find_stack(model).blocks:
        block.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output.clone())))
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        run()
    for k, (entering, leaving) in enumerate(seen):
        assert torch.equal(record.inputs[k][0], entering)
        assert torch.equal(record.outputs[k][0], leaving)


def test_removing_is_bypassing_and_everything_comes_back(made: Made) -> None:
    model, run, path, described = made
    keys, blocks = list(model.state_dict()), list(find_stack(model).container.named_children())
    with torch.no_grad():
        before = run()
        handles = [find_stack(model)[k].register_forward_hook(lambda m, args, out: args[0]) for k in (1, 2)]
        bypassed = run()
        for handle in handles:
            handle.remove()
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(range(1, 3))
            torch.testing.assert_close(run(), bypassed)
            assert str(surgeon.plan).startswith(f"{path}: {BLOCKS} blocks -> {BLOCKS - 2}")
            assert ("no configuration counts these blocks" in str(surgeon.plan)) == (described == "no config")
            names = [name.replace("4", "2") for name, _ in blocks if name.endswith(("0", "1", "4"))]
            assert list(dict(surgeon.stack.container.named_children())) == names
            assert [key for key in model.state_dict() if key.startswith(f"{path}.{names[-1]}")]
            assert numbers(model) in ([], [0, 1, 2])
        assert torch.equal(run(), before)
    assert list(model.state_dict()) == keys and numbers(model) in ([], [0, 1, 2, 3, 4])
    assert list(find_stack(model).container.named_children()) == blocks


def test_a_splice_runs_before_its_block_and_a_commit_keeps_it(made: Made) -> None:
    model, run, _, described = made
    nudge, end = Nudge(WIDTH, seed=1).requires_grad_(False), Nudge(WIDTH, seed=2).requires_grad_(False)
    with torch.no_grad():
        handles = [
            find_stack(model)[2].register_forward_pre_hook(lambda m, args: (nudge(args[0]), *args[1:])),
            find_stack(model)[-1].register_forward_hook(lambda m, args, output: end(output)),
            find_stack(model)[0].register_forward_hook(lambda m, args, output: args[0]),
        ]
        expected = run()
        for handle in handles:
            handle.remove()
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(2, nudge)
            surgeon.insert(BLOCKS, end)
            surgeon.remove([0])
            torch.testing.assert_close(run(), expected)
            surgeon.commit()
        torch.testing.assert_close(run(), expected)
        torch.testing.assert_close(len(find_stack(model)), BLOCKS - 1)
    assert str(find_stack(model)).endswith(f"described by {described}")
    if isinstance(model, NanoGPT):
        assert model.config.n_layer == BLOCKS - 1


# Nested tensors: in evaluation mode nn.TransformerEncoder drops the padding of a batch before its blocks


@pytest.fixture
def padded_batch() -> tuple[nn.TransformerEncoder, dict[str, Tensor], list[int]]:
    model, lengths = make("encoder")[0], [6, 3, 5]  # none is as long as the batch is wide
    assert isinstance(model, nn.TransformerEncoder)
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    return model, {"src": torch.randn(3, 7, WIDTH), "src_key_padding_mask": padding}, lengths


def one_by_one(model: nn.Module, batch: dict[str, Tensor], lengths: list[int], **options: Any) -> list[Any]:
    """The truth for a padded batch: each sequence alone, without padding."""
    records = []
    for row, length in enumerate(lengths):
        with torch.no_grad(), HiddenStateRecorder(model, **options) as record:
            output = model(batch["src"][row : row + 1, :length])
        records.append((record, output))
    return records


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_a_nested_state_is_recorded_with_its_padding(padded_batch: Any, mask_dtype: torch.dtype) -> None:
    model, batch, lengths = padded_batch
    if mask_dtype is not torch.bool:
        batch["src_key_padding_mask"] = torch.zeros(3, 7).masked_fill(batch["src_key_padding_mask"], float("-inf"))
    alone = one_by_one(model, batch, lengths)
    seen: list[bool] = []
    find_stack(model)[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].is_nested))
    recorders = [HiddenStateRecorder(model, tokens=tokens) for tokens in ("all", "real", "last")]
    with torch.no_grad():
        for record in recorders:
            with record:
                record(**batch)
    assert seen == [True] * 3
    whole, real, last = recorders
    for k in range(BLOCKS):
        for states, own in ((r.inputs, "inputs") for r in [whole]):
            assert states[k][0].shape == (3, 7, WIDTH)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(states[k][0][row, :length], getattr(alone[row][0], own)[k][0][0])
                assert not states[k][0][row, length:].any()
        torch.testing.assert_close(
            real.outputs[k][0], torch.cat([record.outputs[k][0][0] for record, _ in alone]), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            last.outputs[k][0], torch.cat([record.outputs[k][0][:, -1] for record, _ in alone]), rtol=1e-4, atol=1e-5
        )


def test_real_tokens_of_an_encoder_that_does_not_nest(padded_batch: Any) -> None:
    model, batch, lengths = padded_batch
    alone = one_by_one(model, batch, lengths)
    with HiddenStateRecorder(model, [2], tokens="real") as record:  # with gradients nothing is nested
        record(**batch)
    torch.testing.assert_close(
        record.outputs[2][0], torch.cat([r.outputs[2][0][0] for r, _ in alone]), rtol=1e-4, atol=1e-5
    )


def test_surgery_on_nested_states(padded_batch: Any) -> None:
    model, batch, lengths = padded_batch
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.remove([1])
        surgeon.insert(3, Nudge(WIDTH, seed=1))
        surgeon.insert(BLOCKS, Nudge(WIDTH, seed=2))
        alone = one_by_one(model, batch, lengths)
        together = model(**batch)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(together[row, :length], alone[row][1][0], rtol=1e-4, atol=1e-5)


def test_an_inserted_identity_changes_nothing_of_nested_states(padded_batch: Any) -> None:
    model, batch, _ = padded_batch
    with torch.no_grad():
        find_stack(model)[2].register_forward_pre_hook(lambda m, args: None)  # a hook alone closes the fast path
        before = model(**batch)
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(2, nn.Identity())
            assert torch.equal(model(**batch), before)


def test_statistics_and_resuming_leave_the_padding_out(padded_batch: Any) -> None:
    model, batch, lengths = padded_batch
    batch["src"] = batch["src"].masked_fill(batch["src_key_padding_mask"][..., None], 100.0)
    with HiddenStateRecorder(model).over([batch]) as passed:
        recorded = next(passed)
        record, mask, output = recorded.record, recorded.real, recorded.output
        assert mask.sum().item() == sum(lengths)
        with torch.no_grad():
            again = resume(model, 2, record.inputs[2][0], batch)
            at_end = resume(model, BLOCKS, record.outputs[BLOCKS - 1][0], batch)
        torch.testing.assert_close(again[mask], output[mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(at_end[mask], output[mask], rtol=1e-4, atol=1e-5)


def test_a_nested_tensor_that_the_user_gives() -> None:
    model = make("encoder")[0]
    rows = [torch.randn(length, WIDTH) for length in (4, 2)]
    with torch.no_grad(), HiddenStateRecorder(model, tokens="last") as record:
        model(torch.nested.as_nested_tensor(rows))
    torch.testing.assert_close(record.inputs[0][0], torch.stack([row[-1] for row in rows]))


def test_tokens_are_not_guessed_where_they_come_first() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32), 3).eval()
    with pytest.raises(StreamlineError, match=r"TransformerEncoderLayer.*batch_first"):
        HiddenStateRecorder(model, tokens="last").__enter__()
    batch = {"src": torch.randn(4, 4, WIDTH), "src_key_padding_mask": torch.zeros(4, 4).bool()}
    with pytest.raises(StreamlineError, match=r"Build.*batch_first=True"):
        with HiddenStateRecorder(model).over([batch]) as passed:
            next(passed)
    with HiddenStateRecorder(model) as record:
        model(batch["src"])
    assert torch.equal(record.inputs[0][0], batch["src"])


def test_a_stack_of_one_sequential_is_copied_with_its_names() -> None:
    """A deep copy of a torchvision model with surgery inside runs its own blocks."""
    model, run, _, _ = make("torchvision")
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.replace([1], Nudge(WIDTH))
        duplicate, expected = copy.deepcopy(model), run()
    image = torch.randn(2, 3, 16, 16)
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.replace([1], Nudge(WIDTH))
        assert torch.equal(model(image), duplicate(image)) and torch.equal(run(), expected)

"""The models of the state machine: as small as a block stack of each kind can be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from tests.tiny_models import tiny_config

WIDTH, VOCABULARY, BLOCKS, PROMPT, NEW_TOKENS = 16, 40, 4, 5, 2
_SMALL = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
_GROUPED = {**_SMALL, "num_key_value_heads": 1, "intermediate_size": 24}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GEMMA_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes
    ----------
    build : callable
        Build the model with its weights as the constructor leaves them.
    stack : str
        Path of the block stack; empty where there is one only.
    branches : dict
        Paths of the output projections below a block, by branch.
    generates : bool
        Whether ``generate()`` with a cache runs the stack.
    count : str or None
        Attribute of the configuration that holds the number of blocks.
    owners : tuple of int
        Blocks that cannot be removed because others use what they hold.
    """

    build: Callable[[], nn.Module]
    stack: str
    branches: dict[str, tuple[str, ...]]
    generates: bool = True
    count: str | None = "num_hidden_layers"
    owners: tuple[int, ...] = ()
    batch: Callable[[], dict[str, Tensor]] = field(default=lambda: prompt())


class PlainBlock(nn.Module):
    """A pre-norm block that knows its own number."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, state: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_1(state)).chunk(3, dim=-1)
        state = state + self.out(nn.functional.scaled_dot_product_attention(query, key, value))
        return state + self.down(torch.relu(self.up(self.norm_2(state))))


class PlainModel(nn.Module):
    """A classifier in plain PyTorch, which has no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock(k) for k in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        state = self.embed(x)
        for block in self.blocks:
            state = block(state)
        return self.head(state)


def prompt() -> dict[str, Tensor]:
    """Two rows of tokens, the second one padded on its left."""
    ids = torch.randint(3, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))}


def _vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))}


def _causal(family: str, **changes: object) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))


def _t5(encoder: int, decoder: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = transformers.T5Config(
            d_model=WIDTH, d_kv=8, d_ff=24, num_heads=2, vocab_size=VOCABULARY, num_layers=encoder, dropout_rate=0.0,
            num_decoder_layers=decoder, relative_attention_num_buckets=8, decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    return build


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=24, image_size=4,
        patch_size=2, num_labels=VOCABULARY,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


_LLAMA_LIKE = {"attention": ("self_attn.o_proj",), "mlp": ("mlp.down_proj",)}
FAMILIES = {
    "llama": Family(_causal("llama", **_GROUPED), "model.layers", _LLAMA_LIKE),
    "gpt2": Family(
        _causal("gpt2", **_SMALL, n_inner=24, **_NO_DROPOUT),
        "transformer.h",
        {"attention": ("attn.c_proj",), "mlp": ("mlp.c_proj",)},
        count="n_layer",
    ),
    "gemma3": Family(
        _causal("gemma3", **_GROUPED, head_dim=8, layer_types=_GEMMA_TYPES, sliding_window=3),
        "model.layers",
        _LLAMA_LIKE,
    ),
    "t5_decoder": Family(
        _t5(6, BLOCKS),
        "decoder.block",
        {},  # a block with cross attention has three branches, of which none can be zeroed
        count="num_decoder_layers",
        owners=(0,),
    ),
    "t5_encoder": Family(
        _t5(BLOCKS, 1),
        "encoder.block",
        {"attention": ("layer.0.SelfAttention.o",), "mlp": ("layer.1.DenseReluDense.wo",)},
        count="num_layers",
        owners=(0,),
    ),
    "vit": Family(
        _vit,
        "",
        {"attention": ("attention.o_proj",), "mlp": ("mlp.fc2",)},
        generates=False,
        batch=_pictures,
    ),
    "plain": Family(
        PlainModel, "blocks", {"attention": ("out",), "mlp": ("down",)}, generates=False, count=None, batch=_vectors
    ),
}


@functools.cache
def _original(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family].build().eval()
        for parameter in model.parameters():  # far from the identity, so that a wrong block shows
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_model(family: str) -> nn.Module:
    """Return a fresh copy of the model of a family."""
    return deepcopy(_original(family))

"""Each forward in training mode is the model without the drawn blocks; nothing else of the training changes."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack, load
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.training.stochastic_depth import BlockSkipper, StochasticDepth
from tests.processes import in_two_processes
from tests.surgery.test_surgeon import fingerprint as state_of
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens

HALF = {"rate": 0.5, "rule": "constant"}


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return model(**left_padded(3, 9, seed)).logits.square().mean()


@contextmanager
def without(model: nn.Module, blocks: tuple[int, ...]) -> Iterator[None]:
    with LayerSurgeon(model, probe=False) as surgeon:
        for k in blocks:
            surgeon.remove([k], despite_hazards=True)  # a splice that moves to the next block looks like a tied weight
        yield


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor | None], other: dict[str, torch.Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in ((one[name], other[name]) for name in one)
    )


# What a forward is


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_and_its_gradients_are_those_without_the_drawn_blocks(family: str) -> None:
    model, plain = tiny_model(family).train(), tiny_model(family).train()
    before, drawn = state_of(model), set()
    with StochasticDepth(model, **HALF, seed=4) as depth:
        entered = [(name, id(p)) for name, p in model.named_parameters()]
        for seed in range(4):
            model.zero_grad(), plain.zero_grad()
            torch.manual_seed(seed)  # some families drop out
            loss = loss_of(model, seed)
            loss.backward()
            drawn.add(depth.skipped)
            got = gradients(model)
            assert [(name, id(p)) for name, p in model.named_parameters()] == entered
            torch.manual_seed(seed)
            with without(plain, depth.skipped):
                wanted = loss_of(plain, seed)
                wanted.backward()
            assert torch.equal(loss, wanted) and same(got, gradients(plain))
            for k in range(BLOCKS):
                missing = [got[name] is None for name in got if f".{k}." in name]
                assert missing and all(missing) == any(missing) == (k in depth.skipped)
    assert len(drawn) > 2 and state_of(model) == before


def test_nothing_is_skipped_or_drawn_in_evaluation_mode() -> None:
    model = tiny_model("llama")
    whole = loss_of(model)
    with StochasticDepth(model, **HALF) as depth:
        state = depth.state_dict()
        assert torch.equal(loss_of(model), whole) and depth.skipped == () and depth.state_dict() == state
        model.train()
        loss_of(model)
        assert depth.skipped and depth.state_dict() != state
        assert torch.equal(loss_of(model.eval()), whole)
    assert torch.equal(loss_of(model.train()), whole)


def test_a_call_of_an_inner_model_draws_once_too() -> None:
    model, draws = tiny_model("llama").train(), []
    with StochasticDepth(model, **HALF) as depth:
        for _ in range(4):
            model.model(tokens(2, 5))
            draws.append(depth.skipped)
    model = tiny_model("llama").train()
    with StochasticDepth(model, **HALF) as depth:
        for skipped in draws:
            loss_of(model)
            assert depth.skipped == skipped


def test_hidden_states_that_are_asked_for_stay_right() -> None:
    model = tiny_model("llama").train()
    with StochasticDepth(model, **HALF) as depth:
        for _ in range(3):
            states = model(tokens(2, 5), output_hidden_states=True).hidden_states
            assert len(states) == BLOCKS - len(depth.skipped) + 1
        model.eval()
        assert len(model(tokens(2, 5), output_hidden_states=True).hidden_states) == BLOCKS + 1
    assert len(model(tokens(2, 5), output_hidden_states=True).hidden_states) == BLOCKS + 1


# Rates and draws


def test_the_rates_of_the_rules() -> None:
    model = tiny_model("llama")
    assert StochasticDepth(model, 0.6).rates == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert StochasticDepth(model, 0.3, rule="constant").rates == (0.3,) * 6
    assert StochasticDepth(model, 0.6, protect=[0, 5]).rates == pytest.approx((0, 0.2, 0.3, 0.4, 0.5, 0))
    assert StochasticDepth(model, [0, 0.1, 0.2, 0.9, 0, 0]).rates == (0, 0.1, 0.2, 0.9, 0, 0)


def test_the_share_of_skips_is_the_rate() -> None:
    model, count, forwards = tiny_model("llama").train(), [0] * BLOCKS, 400
    inputs = tokens(1, 2)
    with torch.no_grad(), StochasticDepth(model, 0.6, protect=[1], seed=11) as depth:
        for _ in range(forwards):
            model(inputs)
            for k in depth.skipped:
                count[k] += 1
    assert count[1] == 0
    for k in (0, 2, 3, 4, 5):
        rate = 0.6 * (k + 1) / BLOCKS
        assert abs(count[k] / forwards - rate) < 4 * (rate * (1 - rate) / forwards) ** 0.5


def test_a_block_is_left_whatever_is_drawn() -> None:
    model = tiny_of_type("llama", blocks=2).train()
    with torch.no_grad(), StochasticDepth(model, 0.95, rule="constant") as depth:
        for _ in range(20):
            model(tokens(1, 2))
            assert len(depth.skipped) < 2
    with pytest.raises(StreamlineError, match=r"one block.*at least two"):
        StochasticDepth(tiny_of_type("llama", blocks=1), stack="model.layers").__enter__()


def test_the_draws_are_its_own_and_go_on_where_they_were_saved() -> None:
    model = tiny_model("llama").train()

    def draws(depth: StochasticDepth, forwards: int) -> list[tuple[int, ...]]:
        drawn = []
        with torch.no_grad():
            for _ in range(forwards):
                model(tokens(1, 2))
                drawn.append(depth.skipped)
        return drawn

    around = torch.get_rng_state(), random.getstate()
    with StochasticDepth(model, 0.7, seed=3) as depth:
        draws(depth, 5)
        saved = json.loads(json.dumps(depth.state_dict()))
        expected = draws(depth, 8)
    assert torch.equal(torch.get_rng_state(), around[0]) and random.getstate() == around[1]
    with StochasticDepth(model, 0.1, seed=77) as resumed:  # what was saved says the rates too
        resumed.load_state_dict(saved)
        torch.manual_seed(5)
        assert draws(resumed, 8) == expected
    with StochasticDepth(model, 0.7, seed=4) as other:
        assert draws(other, 5) + draws(other, 8) != expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": 1.0}, r"probability 1\.0.*0 <= rate < 1"),
        ({"rate": [0.1, 0.2, -0.1, 0, 0, 0]}, r"probability -0.1"),
        ({"rate": [0.1, 0.2]}, r"2 values.*6 blocks"),
        ({"rate": [0.1] * 6, "rule": "linear"}, r"rule='linear'.*single rate"),
        ({"rate": 0.1, "rule": "cubic"}, r"rule='cubic' is unknown.*'linear' or 'constant'"),
        ({"protect": [6]}, "protect: block 6.*0 to 5.*6 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(StreamlineError, match=words):
        StochasticDepth(tiny_model("llama"), **arguments)  # type: ignore[arg-type]


def test_a_state_of_something_else_is_refused() -> None:
    depth = StochasticDepth(tiny_model("llama"))
    state = depth.state_dict()
    with pytest.raises(StreamlineError, match=r"4 blocks.*6.*Load"):
        depth.load_state_dict({**state, "rates": [0.1] * 4})
    with pytest.raises(StreamlineError, match=r"KeyError: 'rates'.*StochasticDepth.state_dict"):
        depth.load_state_dict({"random": state["random"]})
    with pytest.raises(StreamlineError, match="StochasticDepth"):
        depth.load_state_dict({**state, "random": [3, [1, 2]]})
    assert depth.state_dict() == state


# Ways to train


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """The blocks are run again after the forward, when the model has all of them."""
    model, plain = tiny_model("llama").train(), tiny_model("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with StochasticDepth(model, **HALF, seed=1) as depth:
        for seed in range(3):
            model.zero_grad(), plain.zero_grad()
            loss_of(model, seed).backward()
            assert depth.skipped
            with without(plain, depth.skipped):
                loss_of(plain, seed).backward()
            assert same(gradients(model), gradients(plain))


def test_two_forwards_before_one_backward() -> None:
    model, plain = tiny_model("llama").train(), tiny_model("llama").train()
    with StochasticDepth(model, **HALF, seed=1) as depth:
        first, skipped = loss_of(model, 0), depth.skipped
        second = loss_of(model, 1)
        assert skipped != depth.skipped
        (first + second).backward()
        with without(plain, skipped):
            first = loss_of(plain, 0)
        with without(plain, depth.skipped):
            (first + loss_of(plain, 1)).backward()
    assert same(gradients(model), gradients(plain))


def test_gradient_accumulation_under_autocast() -> None:
    model, plain = tiny_model("llama").train(), tiny_model("llama").train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    with StochasticDepth(model, **HALF, seed=6) as depth:
        for step in range(3):
            for part in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss_of(model, 2 * step + part).backward()
                with without(plain, depth.skipped), torch.autocast("cpu", torch.bfloat16):
                    loss_of(plain, 2 * step + part).backward()
            for optimizer in optimizers:
                optimizer.step(), optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_removal_in_the_middle_is_followed(tmp_path: Path) -> None:
    """Blocks keep their rates, whatever their number is; what was put in is never skipped."""
    model = tiny_model("llama").train()
    with StochasticDepth(model, 0.6, seed=1) as depth:
        loss_of(model)
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(range(1, 3), Nudge())
            surgeon.remove([4])
            surgeon.commit()
        saved = depth.state_dict()  # before the next forward
        assert saved["rates"] == list(depth.rates) and len(saved["rates"]) == len(find_stack(model))
        StochasticDepth(copy.deepcopy(model)).load_state_dict(saved)
        depth.load_state_dict(saved)
        for _ in range(3):
            skipped = ()
            while not skipped:
                loss, skipped = loss_of(model), depth.skipped
            with without(model.eval(), skipped):
                assert torch.equal(loss, loss_of(model))
            model.train()
        assert depth.rates == pytest.approx((0.1, 0.4, 0.6))
        resumed = StochasticDepth(model)
        resumed.load_state_dict(depth.state_dict())
        assert resumed.rates == depth.rates


def test_the_model_can_be_saved_between_two_forwards(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    with StochasticDepth(model, **HALF):
        loss_of(model).backward()
        model.save_pretrained(tmp_path)
    assert torch.equal(loss_of(load(tmp_path).eval()), loss_of(model.eval()))


def test_a_copy_of_the_model_skips_nothing() -> None:
    """An average of the weights is kept in such a copy."""
    model = tiny_model("llama").train()
    whole = loss_of(model)
    with StochasticDepth(model, **HALF) as depth:
        other = copy.deepcopy(model)
        assert torch.equal(loss_of(other), whole) and depth.skipped == ()
        assert not torch.equal(loss_of(model), whole) and len(model.model.layers) == BLOCKS
        assert torch.equal(loss_of(other), whole)


# What a draw leaves of a model is what LayerSurgeon leaves, whatever was drawn before


TYPES = ("bamba", "cohere2", "gemma3_text", "gpt_oss", "lfm2", "llama", "qwen3_next", "smollm3")


def said(model: nn.Module) -> list[object]:
    """Everything by which the parts of a model know how many blocks there are, and which."""
    rows: list[object] = [str(model.config.to_dict())]
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        plain = {key: str(v) for key, v in own.items() if isinstance(v, (bool, int, float, str, list, tuple, dict))}
        rows.append((name, id(module), plain))
        if "config" in own:
            rows.append((name, str(own["config"].to_dict())))
    return rows


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("draws", [[(0,), (5, 7), (1, 2, 6)], [(6, 7), (0, 3)]])
def test_it_is_what_a_surgeon_leaves(model_type: str, draws: list[tuple[int, ...]]) -> None:
    if model_type not in causal_model_types():
        pytest.skip(f"this Transformers has no {model_type}")
    model = tiny_of_type(model_type)
    layers = find_stack(model)
    for number, block in enumerate(layers.blocks):  # as some remote code does: each block has its own copies
        block.of_layers = layers.config.num_hidden_layers
        block.all_kinds = getattr(layers.config, "layer_types", None)
        block.mine = number
    before = state_of(model)
    skipping = BlockSkipper(model, layers)
    for drawn in draws:
        with LayerSurgeon(model, probe=False) as surgeon:
            for k in drawn:
                surgeon.remove([k], despite_hazards=True)
            expected = said(model)
        skipping.skip_blocks(drawn)
        got = said(model)
        skipping.restore()
        assert got == expected
        assert state_of(model) == before


# The end, however it comes


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("kind", [RuntimeError, Interrupted])
def test_a_forward_that_fails_leaves_all_blocks(kind: type[BaseException]) -> None:
    model = tiny_model("llama").train()
    before, fails = state_of(model), True

    def fail(module: nn.Module, args: object) -> None:
        if fails:
            raise kind("stop")

    with StochasticDepth(model, [0, 0.9, 0.9, 0.9, 0.9, 0]) as depth:
        handle = model.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(kind):
            loss_of(model)
        assert depth.skipped and (len(model.model.layers) == BLOCKS or kind is Interrupted)
        fails = False
        loss = loss_of(model)
        assert len(model.model.layers) == BLOCKS
        with without(model.eval(), depth.skipped):
            assert torch.equal(loss, loss_of(model))
        model.train()
        fails = True
        with pytest.raises(kind):
            loss_of(model)
        handle.remove()
    assert state_of(model) == before


def test_only_one_at_a_time() -> None:
    model = tiny_model("llama")
    with StochasticDepth(model):
        with pytest.raises(StreamlineError, match=r"Another StochasticDepth.*Leave"):
            StochasticDepth(model).__enter__()
        copied = copy.deepcopy(model)
    with StochasticDepth(copied):  # whose inherited hooks do nothing
        pass
    depth = StochasticDepth(model)
    for _ in range(2):
        with depth:
            pass


# What cannot be


def test_a_block_that_may_not_go_is_named() -> None:
    model = tiny_of_type("gemma3n_text")
    before = state_of(model)
    words = r"Block 5.*the keys.*protect="
    with pytest.raises(UnsupportedSurgery, match=words) as refused:
        StochasticDepth(model, protect=[4]).__enter__()
    assert refused.value.cause == "shared-keys"
    assert state_of(model) == before


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_model_whose_prompts_skip_blocks_is_refused(is_committed: bool) -> None:
    model = tiny_model("llama").train()
    with PromptSkip(model, range(3, 6)) as skip:
        if is_committed:
            skip.commit()
        else:
            with pytest.raises(StreamlineError, match="Expected a model without a PromptSkip"):
                StochasticDepth(model, 0.3).__enter__()
    if is_committed:
        with pytest.raises(StreamlineError, match="Expected a model without a PromptSkip"):
            StochasticDepth(model, 0.3).__enter__()
    else:
        with StochasticDepth(model, 0.3):
            loss_of(model)
            with PromptSkip(model, range(3, 6)), pytest.raises(StreamlineError, match="without a PromptSkip"):
                loss_of(model)


def test_blocks_with_parts_of_one_weight_are_refused() -> None:
    """Gradients would go to a copy of the weight without the parts of the skipped blocks."""
    model = tiny_of_type("gemma3n_text")
    before = state_of(model)
    with pytest.raises(UnsupportedSurgery, match=r"embed_tokens_per_layer.weight"):
        StochasticDepth(model, [0, 0.1, 0.1, 0, 0, 0, 0, 0]).__enter__()
    assert state_of(model) == before


def test_what_only_a_trial_shows_is_named_too() -> None:
    model = tiny_of_type("xlm")
    words = r"Block . cannot.*separate lists.*protect="
    with pytest.raises(UnsupportedSurgery, match=words):
        StochasticDepth(model).__enter__()


def test_a_cache_in_training_mode_is_refused() -> None:
    model = tiny_model("llama").train()
    with StochasticDepth(model):
        with pytest.raises(StreamlineError, match=r"a cache.*model.eval\(\)"):
            model.generate(tokens(1, 4), max_new_tokens=3)
        assert len(model.eval().generate(tokens(1, 4), max_new_tokens=3, min_new_tokens=3)[0]) == 7


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_is_refused(use_reentrant: bool) -> None:
    model = tiny_model("llama").train()
    with StochasticDepth(model, **HALF):
        states = model.get_input_embeddings()(tokens(2, 5))

        def run(given: torch.Tensor) -> torch.Tensor:
            return model(inputs_embeds=given, use_cache=False).logits

        loss = checkpoint(run, states, use_reentrant=use_reentrant).square().mean()
        with pytest.raises(StreamlineError, match="inside a backward"):
            loss.backward()


def test_a_replica_is_refused() -> None:
    model = tiny_model("llama").train()
    with StochasticDepth(model):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(StreamlineError, match=r"LlamaForCausalLM.*DistributedDataParallel"):
            replica(tokens(1, 3))


def test_compiled_models() -> None:
    torch.compiler.reset()
    model = tiny_model("llama").train()
    with pytest.raises(StreamlineError, match=r"skip blocks of a compiled.*compile it afterwards"):
        StochasticDepth(torch.compile(model, backend="eager")).__enter__()  # type: ignore[arg-type]
    with StochasticDepth(model, **HALF) as depth:
        compiled = torch.compile(model, backend="eager")  # costs a compilation a draw, and is right
        for _ in range(2):
            got = compiled(tokens(2, 5), use_cache=False).logits
            with without(model.eval(), depth.skipped):
                torch.testing.assert_close(got, model(tokens(2, 5), use_cache=False).logits)
            model.train()
        model.compile(backend="eager")
        with pytest.raises(StreamlineError, match=r"compiled while.*skipped"):
            model(tokens(2, 5))
    torch.compiler.reset()


# Several processes

TWO_PROCESSES = """
    from torch.nn.parallel import DistributedDataParallel
    from streamline_hooks import StreamlineError
    from streamline_hooks.training.stochastic_depth import StochasticDepth
    from tests.tiny_models import tiny_model, tokens

    model = tiny_model("llama").train()
    for parameter in model.parameters():
        parameter.data.mul_(1 + 0.1 * rank)  # DDP starts all processes from the first one's
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    try:
        StochasticDepth(ddp).__enter__()
    except StreamlineError as error:
        said["refused"] = str(error)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for name, seed in (("same", 1), ("own", 1 + rank)):
        drawn, missing = [], []
        with StochasticDepth(model, 0.5, rule="constant", seed=seed) as depth:
            for step in range(5):
                optimizer.zero_grad()
                ddp(tokens(2, 7, seed=10 * step + rank)).logits.square().mean().backward()
                drawn.append(depth.skipped)
                blocks = enumerate(model.model.layers)
                missing.append([k for k, b in blocks if all(p.grad is None for p in b.parameters())])
                optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(both, weights)
        said[name] = {"drawn": drawn, "missing": missing, "equal": torch.equal(*both)}
"""


@pytest.mark.long
def test_two_processes_draw_the_same_with_one_seed_and_stay_equal_with_two(tmp_path: Path) -> None:
    one, other = in_two_processes(TWO_PROCESSES, tmp_path)
    assert "DistributedDataParallel already" in one["refused"]
    assert one["same"]["equal"] and one["own"]["equal"]
    assert one["same"]["drawn"] == other["same"]["drawn"] == one["same"]["missing"] == other["same"]["missing"]
    assert any(one["same"]["drawn"]) and one["own"]["drawn"] != other["own"]["drawn"]
    both = [sorted(set(a) & set(b)) for a, b in zip(one["own"]["drawn"], other["own"]["drawn"], strict=True)]
    assert one["own"]["missing"] == other["own"]["missing"] == both


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield

"""The monitor measures what a plain computation gives, in every way to train, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError
from streamline_hooks.recording import RecordingConfig
from streamline_hooks.training import HiddenStateMonitor, Measurement, MonitorConfig
from tests.tiny_models import BLOCKS, FAMILIES, padded, tiny_model, tokens

SERIES = ("cosine", "influence", "change", "norm", "median_norm", "largest_norm", "gradient_norm")


def training(family: str = "llama", **options: Any) -> nn.Module:
    return tiny_model(family, **options).train()


def batch_of(lengths: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    batch = padded(lengths, side)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(3)  # of the dropout
    return model(**batch, use_cache=False).loss


def measured(model: nn.Module, *batches: dict[str, torch.Tensor], **options: Any) -> Measurement:
    with HiddenStateMonitor(model, **options) as monitor:
        for batch in batches:
            loss_of(model, batch).backward()
        found = monitor.step()
    model.zero_grad()
    assert found is not None
    return found


def reference(model: nn.Module, *batches: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The same numbers from recorded states, in float64."""
    rows: list[list[torch.Tensor]] = [[] for _ in range(BLOCKS + 1)]
    squares = [0.0] * (BLOCKS + 1)
    for batch in batches:
        with HiddenStateRecorder(model, config=RecordingConfig(detach=False, retain_grad=True)) as record:
            loss_of(model, batch).backward()
        real = batch["attention_mask"].bool()
        for place in range(BLOCKS + 1):
            state = record.inputs[0][0] if place == 0 else record.outputs[place - 1][0]
            rows[place].append(state.detach()[real].double())
            assert state.grad is not None
            squares[place] += float(state.grad.double().square().sum())
    model.zero_grad()
    states = [torch.cat(row) for row in rows]
    pairs = list(itertools.pairwise(states))
    cosine = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    return {
        "cosine": cosine,
        "influence": [1 - c for c in cosine],
        "change": [float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairs],
        "norm": [float(s.norm(dim=-1).mean()) for s in states],
        "median_norm": [float(s.norm(dim=-1).median()) for s in states],
        "largest_norm": [float(s.norm(dim=-1).max()) for s in states],
        "gradient_norm": [math.sqrt(s) for s in squares],
    }


def assert_same(one: Measurement, other: Measurement | dict[str, list[float]], tolerance: float = 1e-5) -> None:
    if isinstance(other, Measurement):
        assert one.tokens == other.tokens
    for name in SERIES:
        mine = list(getattr(one, name))
        theirs = list(other[name] if isinstance(other, dict) else getattr(other, name))
        bound = 0.023 if name == "median_norm" else tolerance
        assert mine == pytest.approx(theirs, rel=bound, abs=bound if name == "influence" else 1e-9), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_a_plain_computation(family: str, side: str) -> None:
    model, batches = training(family), (batch_of([9, 4, 7], side), batch_of([5], side))
    found = measured(model, *batches)
    assert found.tokens == 25
    assert_same(found, reference(model, *batches))


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_neither_the_outputs_nor_the_gradients(family: str) -> None:
    model, batch = training(family), batch_of([9, 4, 7])
    plain = loss_of(model, batch)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with HiddenStateMonitor(model):
        watched = loss_of(model, batch)
        watched.backward()
    assert torch.equal(watched, plain)
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)


@contextlib.contextmanager
def checkpointed(model: nn.Module, reentrant: bool) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # what reentrant checkpointing needs
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_counts_each_block_once(family: str, reentrant: bool) -> None:
    model, batches = training(family), (batch_of([9, 4, 7]), batch_of([6]))
    plain = measured(model, *batches)
    with checkpointed(model, reentrant):
        assert_same(measured(model, *batches), plain)


@pytest.mark.parametrize("in_between", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_inside_the_checkpoint_and_a_forward_before_the_backward(reentrant: bool, in_between: bool) -> None:
    """As where a block itself is checkpointed, and a teacher or an average of the weights is run in between."""
    model, batches = training(), (batch_of([9, 4, 7]), batch_of([6]))
    plain = measured(model, *batches)
    for block in model.model.layers:
        call = functools.partial(type(block).__call__, block)

        def checkpointed_call(self: nn.Module, *args: Any, call: Any = call, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(functools.partial(call, **kwargs), *args, use_reentrant=reentrant)

        block.__class__ = type("Checkpointed", (type(block),), {"__call__": checkpointed_call})
    with HiddenStateMonitor(model) as monitor:
        for batch in batches:
            loss = loss_of(model, batch)
            if in_between:
                with torch.no_grad():
                    loss_of(model, batch_of([3, 3]))
            loss.backward()
        assert_same(monitor.step(), plain)
    model.zero_grad()


def test_autocast_and_bfloat16() -> None:
    model, batch = training(), batch_of([9, 4, 7])
    plain = measured(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(measured(model, batch), plain, tolerance=0.05)
    assert_same(measured(training(dtype=torch.bfloat16), batch), plain, tolerance=0.1)


def compile_whole(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compile_in_place(model: nn.Module) -> Callable[..., Any]:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.long
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place])
def test_compiled_inside(compiled: Callable[[nn.Module], Callable[..., Any]]) -> None:
    torch.compiler.reset()
    model, batch = training(), batch_of([9, 4, 7])
    plain = measured(model, batch)
    found = []
    with HiddenStateMonitor(model, every=2) as monitor:
        run = compiled(model)
        for _ in range(4):
            run(**batch, use_cache=False).loss.backward()
            found.append(monitor.step())
            model.zero_grad()
    assert [one and one.step for one in found] == [1, None, 3, None]
    assert_same(found[0], plain)
    assert_same(found[2], plain)
    torch.compiler.reset()


def test_compiled_with_gradient_checkpointing() -> None:
    torch.compiler.reset()
    model, batch = training(), batch_of([9, 4, 7])
    plain = measured(model, batch)
    with checkpointed(model, reentrant=False), HiddenStateMonitor(model) as monitor:
        torch.compile(model, backend="aot_eager")(**batch, use_cache=False).loss.backward()
        assert_same(monitor.step(), plain)
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [[0, 1, 2], [3, 4, 5], [1, 4]])
def test_some_blocks_are_compiled_and_others_not(compiled: list[int]) -> None:
    """As where the compiler reaches its limit of versions of one function."""
    torch.compiler.reset()
    model, batch = training(), batch_of([9, 4, 7])
    plain = measured(model, batch)
    with HiddenStateMonitor(model, every=1) as monitor:
        for k in compiled:
            monitor.stack[k].compile(backend="aot_eager")
        for _ in range(2):
            loss_of(model, batch).backward()
            assert_same(monitor.step(), plain)
            model.zero_grad()
    torch.compiler.reset()


def test_which_steps_are_measured() -> None:
    model, batch = training(), batch_of([5])

    def steps(done: int, numbers: list[int | None]) -> list[int]:
        monitor, found = HiddenStateMonitor(model, every=3).open(done), []
        for number in numbers:
            loss_of(model, batch).backward()
            found.append(monitor.step(number))
        monitor.close()
        return [one.step for one in found if one is not None]

    assert steps(0, [None] * 8) == [1, 4, 7]
    assert steps(5, [None] * 6) == [7, 10]
    assert steps(0, [10, 11, 12, 13]) == [10, 13]  # the loop counts itself


def test_an_evaluation_in_between_does_not_count() -> None:
    model, batch = training(), batch_of([9, 4, 7])
    plain = measured(model, batch)
    with HiddenStateMonitor(model) as monitor:
        loss_of(model, batch).backward()
        with torch.no_grad():
            loss_of(model.eval(), batch_of([3, 3]))
        assert_same(monitor.step(), plain)


def test_padding_does_not_count_unless_asked_for() -> None:
    model, batch = training(), batch_of([9, 2])
    batch["labels"][1, 7] = -100  # else a padded place predicts the first real token, and has a gradient
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)}
    assert_same(measured(model, batch), measured(model, other))
    assert measured(model, batch).tokens == 11
    all_tokens = MonitorConfig(tokens="all")
    assert measured(model, batch, config=all_tokens).tokens == 18
    assert measured(model, batch, config=all_tokens).norm != measured(model, other, config=all_tokens).norm


def test_a_mask_that_is_not_by_token_is_refused() -> None:
    model, batch = training(), batch_of([6, 6])
    square = torch.zeros(2, 1, 6, 6)
    with (
        HiddenStateMonitor(model),
        pytest.raises(StreamlineError, match=r"\(2.*1.*6.*6\).*Give tokens='all'"),
    ):
        loss_of(model, {**batch, "attention_mask": square})
    with HiddenStateMonitor(model, config=MonitorConfig(tokens="all")) as monitor:
        loss_of(model, {**batch, "attention_mask": square}).backward()
        assert monitor.step().tokens == 12


def test_a_scaled_loss() -> None:
    model, batch = training(), batch_of([9])
    plain = measured(model, batch)
    with HiddenStateMonitor(model) as monitor:
        (1024 * loss_of(model, batch)).backward()
        assert_same(monitor.step(grad_scale=1024.0), plain)


def test_frozen_blocks_have_no_gradient_and_gain_none() -> None:
    model = training()
    for part in (model.model.embed_tokens, *model.model.layers[:3]):
        part.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    found = measured(model, batch_of([9]))
    assert [value is None for value in found.gradient_norm] == [True] * 4 + [False] * 3
    without = measured(model, batch_of([9]), config=MonitorConfig(gradients=False))
    assert without.gradient_norm == (None,) * 7
    assert without.norm == found.norm


def test_a_dead_block_and_a_massive_one_and_one_that_is_not_finite() -> None:
    model = training()
    assert measured(model, batch_of([12])).dead == ()
    for parameter in (model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight):
        nn.init.zeros_(parameter)
    found = measured(model, batch_of([12]))
    assert (found.dead, found.massive, found.not_finite) == ((2,), (), ())
    assert measured(model, batch_of([12]), config=MonitorConfig(dead=1e9)).dead == tuple(range(len(model.model.layers)))
    assert found.change[2] == 0.0 and abs(found.influence[2]) < 1e-6

    def first_token(block: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e4 * (torch.arange(output.shape[1]) == 0)[None, :, None]

    handle = model.model.layers[4].register_forward_hook(first_token)
    assert measured(model, batch_of([12])).massive == (4,)
    handle.remove()
    model.model.layers[5].register_forward_hook(lambda block, args, output: output * torch.nan)
    found = measured(model, batch_of([12]))
    assert found.not_finite == (6,)
    assert (found.norm[6], found.largest_norm[6], found.influence[5]) == (None, None, None)
    assert json.loads(found.line())["norm"][6] is None
    assert "states/norm/6" not in found.scalars()


def test_refuses_what_would_measure_nothing() -> None:
    model, batch = training(), batch_of([5])
    with HiddenStateMonitor(model) as monitor:
        loss_of(copy.deepcopy(model), batch).backward()
        with pytest.raises(StreamlineError, match=r"Step 1.*no forward"):
            monitor.step()
        with pytest.raises(StreamlineError, match=r"already open.*close"):
            monitor.open()
    with pytest.raises(StreamlineError, match=r"not open.*with statement"):
        monitor.step()
    with pytest.raises(StreamlineError, match="every=0"):
        HiddenStateMonitor(model, every=0)
    with pytest.raises(StreamlineError, match="tokens='some'.*Expected one of real, all"):
        MonitorConfig(tokens="some")  # type: ignore[arg-type]
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(StreamlineError, match=r"hidden states of a compiled.*compile it afterwards"):
        HiddenStateMonitor(model).open()


def hooks_of(model: nn.Module) -> list[list[Any]]:
    return [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in model.modules()]


def test_leaves_no_hook_behind() -> None:
    model = training()
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="mid-way"), HiddenStateMonitor(model):
        loss_of(model, batch_of([5])).backward()
        raise RuntimeError("mid-way")
    assert hooks_of(model) == before


def test_copies_of_a_monitored_model_do_not_count() -> None:
    model, batch = training(), batch_of([9, 4])
    plain = measured(model, batch)
    with HiddenStateMonitor(model, log=lambda values, step: None) as monitor:  # a function that cannot be pickled
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            loss_of(other, batch_of([3])).backward()
        loss_of(model, batch).backward()
        assert_same(monitor.step(), plain)


@pytest.mark.parametrize("before_the_step_is_told", [True, False])
def test_goes_on_after_a_surgery(before_the_step_is_told: bool) -> None:
    """And never tells numbers of before as those of now."""
    model, batch, found = training(), batch_of([9, 4]), []

    def remove() -> None:
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(range(1, 3))
            surgeon.commit()

    with HiddenStateMonitor(model, every=2) as monitor:
        for number in range(1, 7):
            loss_of(model, batch).backward()
            if number == 2 and before_the_step_is_told:
                remove()
            found.append(monitor.step())
            if number == 2 and not before_the_step_is_told:
                remove()
            model.zero_grad()
    steps = {one.step: len(one.influence) for one in found if one is not None}
    # Step 3 ran other blocks than those that were watched, where nobody had told of the surgery.
    assert steps == ({1: 6, 3: 4, 5: 4} if before_the_step_is_told else {1: 6, 4: 4, 5: 4})
    last = found[4]
    assert last is not None
    assert_same(last, measured(model, batch))


def test_finds_the_blocks_anew_when_it_is_opened() -> None:
    model, batch = training(), batch_of([9, 4])
    monitor = HiddenStateMonitor(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    with monitor:
        loss_of(model, batch).backward()
        found = monitor.step()
    assert len(found.influence) == 4 and None not in found.influence


def test_an_encoder_that_hands_on_a_square_mask() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertForMaskedLM(config).train()
    for lengths, counted in (([9, 4, 7], 20), ([5, 5], 10)):
        batch = padded(lengths, "right")
        with HiddenStateMonitor(model) as monitor:
            model(**batch, labels=batch["input_ids"]).loss.backward()
            assert monitor.step().tokens == counted
        with HiddenStateRecorder(model, tokens="real") as record, torch.no_grad():
            model(**batch)
        assert len(record.inputs[0][0]) == counted


class Around(nn.Module):
    """A training module, or DDP: it does not say which of the stacks inside is the decoder."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapper_does_not_change_which_stack_is_watched() -> None:
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=5, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    assert HiddenStateMonitor(model).stack.path == "model.decoder.layers"
    assert HiddenStateMonitor(Around(model)).stack.path == "module.model.decoder.layers"
    assert HiddenStateMonitor(Around(Around(model))).stack.path == "module.module.model.decoder.layers"


def test_a_block_that_was_not_called_is_told_as_none() -> None:
    model, batch = training(), batch_of([9, 4])
    with HiddenStateMonitor(model) as monitor:
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(range(2, 3))
            loss_of(model, batch).backward()
        found = monitor.step()
    assert [value is None for value in found.influence] == [False, False, True, False, False, False]
    assert found.massive == ()


class AddingInPlace(nn.Module):
    """A block that works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state.add_(self.inside(state.clone()))


class Plain(nn.Module):
    """Blocks without a configuration, a mask or a head."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            state = block(state)
        return state


def test_blocks_that_work_in_place_and_blocks_with_another_layout() -> None:
    torch.manual_seed(0)
    for block, state in (
        (AddingInPlace, torch.randn(2, 5, 8)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), torch.randn(5, 2, 8)),
    ):
        model = Plain(block)
        with HiddenStateMonitor(model) as monitor:
            given = state.clone().requires_grad_() * 1.0
            model(given).square().sum().backward()
            found = monitor.step()
        first = model.blocks[0]
        expected = state + first.inside(state) if isinstance(first, AddingInPlace) else first(state)
        change = (expected - state).norm(dim=-1) / state.norm(dim=-1)
        assert found.tokens == 10
        assert found.change[0] == pytest.approx(float(change.mean()), rel=1e-5)
        assert None not in found.gradient_norm


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_keeps_no_graph_and_does_not_grow() -> None:
    torch.manual_seed(0)
    model = Plain(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    counts = []
    with HiddenStateMonitor(model, every=1) as monitor:
        for step in range(120):
            loss = model(torch.randn(2, 5, 8)).square().mean()
            loss.backward()
            del loss
            monitor.step()
            if step in (10, 119):
                counts.append(live_tensors())
    assert counts[1] <= counts[0]  # what earlier tests left may go meanwhile


def test_the_file_and_the_log(tmp_path: Path) -> None:
    model, file, seen = training(), tmp_path / "deep" / "states.jsonl", []

    def train(steps: int, done: int = 0) -> None:
        monitor = HiddenStateMonitor(model, every=2, file=file, log=lambda values, step: seen.append((step, values)))
        monitor.open(done)
        for _ in range(steps):
            loss_of(model, batch_of([5])).backward()
            monitor.step()
        monitor.close()

    train(3)
    assert [step for step, _ in seen] == [1, 3]
    file.write_bytes(file.read_bytes() + b'{"step": 4, "tok')  # killed while it wrote
    train(2, done=4)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5]
    step, values = seen[-1]
    assert (step, values["states/influence/3"]) == (5, lines[-1]["influence"][3])
    assert values["states/dead"] == 0.0
    assert len(values) == 3 * BLOCKS + 4 * (BLOCKS + 1) + 3
    notes = tmp_path / "notes.txt"
    notes.write_text("first line\nnot of a monitor")
    with HiddenStateMonitor(model, file=notes) as monitor:
        loss_of(model, batch_of([5])).backward()
        with pytest.raises(StreamlineError, match=r"notes.txt.*b'not"):
            monitor.step()
    assert notes.read_text() == "first line\nnot of a monitor"
    blocked = HiddenStateMonitor(model, file=tmp_path / "deep" / "states.jsonl" / "no.jsonl").open()
    loss_of(model, batch_of([5])).backward()
    with pytest.raises(StreamlineError, match=r"no.jsonl.*Choose"):
        blocked.step()
    blocked.close()


def test_numbers_in_names_sort_by_block() -> None:
    values = tuple(float(k) for k in range(12))
    names = list(Measurement(1, 1, values, values, values, values, values, values, values).scalars())
    assert names[:12] == sorted(names[:12])
    assert tokens(1, 3).shape == (1, 3)


def test_measures_what_was_compiled_before() -> None:
    torch.compiler.reset()
    model = tiny_model("llama").train()
    loss = torch.compile(lambda ids: model(ids, labels=ids).loss, backend="eager")
    ids, measured = tokens(2, 9), []
    loss(ids).backward()
    for run in (loss, lambda ids: model(ids, labels=ids).loss):
        with HiddenStateMonitor(model, config=MonitorConfig(gradients=False)) as monitor:
            run(ids).backward()
            measured.append(monitor.step())
    torch.compiler.reset()
    assert measured[0] is not None and measured[0].tokens == measured[1].tokens == ids.numel()
    assert measured[0].influence == pytest.approx(measured[1].influence, rel=1e-4)

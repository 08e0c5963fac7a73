"""Tests on an emulated accelerator or a real one; `test_emulated_device` runs them in a process of their own.

Results of the CPU are computed before the device is emulated, which slows each operation.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import (
    DistillationConfig,
    HealingConfig,
    HiddenStateRecorder,
    LayerSurgeon,
    LinearConfig,
    SwiGLUConfig,
    fit_windows,
    perplexity,
    profile,
    train,
)
from streamline_hooks.distillation import Student, student_of
from streamline_hooks.evaluation import agreement, distances_of_candidates
from streamline_hooks.modeling import Candidate, find_stack
from streamline_hooks.repair import insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.statistics import Profile, WindowMoments
from streamline_hooks.surgery import PromptSkip, resume
from streamline_hooks.testing import tiny_model
from tests.world.emulated_device import NAME, emulated_device

Batches = list[dict[str, Tensor]]
WINDOW = range(1, 3)


@pytest.fixture
def waits() -> Iterator[Counter[str]]:
    with emulated_device() as counted:
        yield counted


def batches_of(count: int, tokens: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :2] = 0
    return [
        {"input_ids": torch.randint(3, 60, (2, tokens), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def on(device: str, batches: Batches) -> Batches:
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def replacement(seed: int = 1) -> LinearReplacement:
    module = LinearReplacement(32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.projection.weight.copy_(torch.randn(32, 32, generator=generator) * 0.1)
    return module


def generated(model: Any, batches: Batches) -> Tensor:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids: Tensor = model.generate(**batches[0], **options)
    return ids.cpu()


def recorded(model: Any, batches: Batches) -> Tensor:
    with torch.no_grad(), HiddenStateRecorder(model, [2], sites=["block.input", "mlp.output"]) as record:
        model(**batches[0])
    assert record.inputs[2][0].device == next(model.parameters()).device
    return torch.cat([record.inputs[2][0], record["mlp.output"][2][0]]).cpu()


def resumed(model: Any, batches: Batches) -> Tensor:
    with torch.no_grad(), HiddenStateRecorder(model, [2]) as record:
        model(**batches[0])
    with torch.no_grad():
        logits: Tensor = resume(model, 2, record.inputs[2][0], batches[0]).logits
    return logits.cpu()


def spliced(model: Any, batches: Batches) -> Tensor:
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, replacement())
        surgeon.remove([5])
        surgeon.commit()
    assert {parameter.device.type for parameter in model.parameters()} == {model.device.type}
    with torch.no_grad():
        logits: Tensor = model(**batches[0]).logits
    return torch.cat([logits.flatten().cpu(), generated(model, batches).flatten()])


def skipped(model: Any, batches: Batches) -> Tensor:
    with PromptSkip(model, range(5, 8), [replacement(k) for k in range(3)], last_tokens=2):
        return generated(model, batches)


def fitted(kind: Any) -> Callable[[Any, Batches], Tensor]:
    def run(model: Any, batches: Batches) -> Tensor:
        (repair,) = fit_windows(model, [WINDOW], kind, batches, batches[:1])
        assert repair.replacement_module is not None
        weights = [value.flatten().cpu() for value in repair.replacement_module.state_dict().values()]  # type: ignore[union-attr]
        return torch.cat([torch.tensor([repair.removal_error, repair.repaired_error]), *weights])

    return run


def trained(healing: HealingConfig | None) -> Callable[[Any, Batches], Tensor]:
    def run(model: Any, batches: Batches) -> Tensor:
        config = DistillationConfig(loss={"kl": 1.0, "lm": 1.0, "mse": 1.0}, validations=1, learning_rate=1e-2)
        module = replacement().to(model.device)
        student = student_of(find_stack(model), [(WINDOW, module)], healing)
        result = train(student, batches, batches[:1], config)
        weights = [value.detach().flatten().cpu() for value in student.parameters().values()]
        return torch.cat([torch.tensor([row["validated"] for row in result.history]), *weights])

    return run


RUNS: dict[str, Callable[[Any, Batches], Any]] = {
    "forward": lambda model, batches: model(**batches[0]).logits.detach().cpu(),
    "record": recorded,
    "resume": resumed,
    "splice": spliced,
    "generate": generated,
    "skip": skipped,
    "profile": lambda model, batches: profile(model, batches, replicates=8).cosine,
    "fit linear": fitted(LinearConfig()),
    "fit swiglu": fitted(SwiGLUConfig()),
    "train": trained(None),
    "train partial": trained(HealingConfig("partial", "after", learning_rate_ratio=0.2)),
    "train lora": trained(HealingConfig("lora")),
    "verify": lambda model, batches: distances_of_candidates(
        model, batches, [Candidate(WINDOW), Candidate(range(4, 6), replacement().to(model.device))]
    ),
    "perplexity": lambda model, batches: [perplexity(model, batches).nll],
}


@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_of_the_cpu(name: str) -> None:
    model, batches = tiny_model("llama"), batches_of(3)
    expected = RUNS[name](copy.deepcopy(model), batches)
    with emulated_device():
        emulated: Any = model.to(NAME)
        assert next(emulated.parameters()).device.type == NAME
        result = RUNS[name](emulated, on(NAME, batches))
    torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["verify", "perplexity", "train", "train partial"])
def test_large_logits_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_model("llama"), batches_of(2)
    expected = RUNS[name](copy.deepcopy(model), batches)
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.WHOLE_LOGIT_BYTES", 0)
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.LOGIT_BYTES", 3 * 64)  # three tokens
    sizes: list[int] = []
    with emulated_device():
        emulated: Any = model.to(NAME)
        emulated.lm_head.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
        result = RUNS[name](emulated, on(NAME, batches))
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert max(sizes[1:]) == 3


def test_states_of_a_model_on_two_devices_are_compared() -> None:
    """The blocks of a model with a device map are on several devices."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 8, 16, generator=generator) for _ in range(4)]
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :2], mask[1, 4] = False, False  # padding, and an excluded token
    expected, moments = Profile(4).sums, WindowMoments(16)
    expected.update(states, mask)
    moments.update(states[0], states[3], mask)
    with emulated_device():
        spread = [state.to(NAME) if k < 2 else state for k, state in enumerate(states)]
        for order in (spread, spread[::-1]):
            found, fitted_moments = Profile(4).sums, WindowMoments(16)
            found.update(order, mask)
            fitted_moments.update(order[0], order[3], mask)
            if order is spread:
                torch.testing.assert_close(found.similarity.cosine, expected.similarity.cosine)
                torch.testing.assert_close(found.entropy.mean, expected.entropy.mean)
                torch.testing.assert_close(fitted_moments.xd.cpu(), moments.xd)


def test_a_splice_moves_the_state_to_its_device() -> None:
    """Accelerate moves the state of a block to its device after the splices before it ran."""
    model: Any = tiny_model("llama")
    inputs = batches_of(1)[0]
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        module = replacement()
        insert_replacement(surgeon, WINDOW, module)
        expected = model(**inputs).logits
        block = model.model.layers[1]
        block.register_forward_pre_hook(lambda _, args, kwargs: ((args[0].cpu(), *args[1:]), kwargs), with_kwargs=True)
        with emulated_device():
            for spliced in model.modules():
                if isinstance(spliced, LinearReplacement):
                    spliced.to(NAME)
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda here, there: here + there,
    "sum in place": lambda here, there: torch.zeros(()).add_(there.sum()),
    "stack of numbers": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "index of the CPU": lambda here, there: here[there > 0],
    "value": lambda here, there: there.index_put_((torch.tensor([0, 1]).to(NAME),), here[:2]),
}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("name", MIXED)
def test_operations_on_two_devices_raise(name: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name](torch.ones(3), torch.ones(3).to(NAME))


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("place", ["forward hook", "replacement"])
def test_a_tensor_on_the_cpu_is_noticed(place: str) -> None:
    """Planted: a tensor that is created without a device."""
    model: Any = tiny_model("llama").to(NAME)
    batches = on(NAME, batches_of(1))
    if place == "forward hook":
        model.model.norm.register_forward_hook(lambda _, __, output: output + torch.zeros(32))
    else:
        forward = LinearReplacement.forward
        module = replacement().to(NAME)
        module.forward = lambda state: forward(module, state) * torch.ones(32)  # type: ignore[method-assign]
        surgeon = LayerSurgeon(model).__enter__()
        insert_replacement(surgeon, WINDOW, module)
    with pytest.raises(RuntimeError, match="same device"):
        model(**batches[0])


def compared(model: Any, batches: Batches) -> object:
    return agreement(model, copy.deepcopy(model), batches)


WAITING: dict[str, tuple[Callable[[Any, Batches], Any], int]] = {
    "profile": (profile, 24),
    "fit": (RUNS["fit linear"], 10),
    "verify": (lambda model, batches: distances_of_candidates(model, batches, [Candidate(WINDOW)]), 20),
    "perplexity": (perplexity, 10),
    "agreement": (compared, 20),
    "train": (RUNS["train"], 45),
}
"""By step: a function of a model and batches, and the bound of the waits per batch of two sequences."""


def waits_per_batch(run: Callable[[Any, Batches], Any], blocks: int, tokens: int, waits: Counter[str]) -> float:
    """Return how often the host waits for each further batch."""
    counts = []
    for number in (1, 3):
        model = tiny_model("llama", blocks=blocks).to(NAME)
        batches = on(NAME, batches_of(number, tokens))
        waits.clear()
        run(model, batches)
        counts.append(sum(waits.values()))
    return (counts[1] - counts[0]) / 2


@pytest.mark.parametrize("name", WAITING)
def test_the_host_waits_a_constant_number_of_times_per_batch(name: str, waits: Counter[str]) -> None:
    run, bound = WAITING[name]
    few = waits_per_batch(run, 4, 8, waits)
    assert 0 < few <= bound, waits
    assert waits_per_batch(run, 7, 8, waits) == few, "more blocks"
    assert waits_per_batch(run, 4, 40, waits) == few, "more tokens"


def test_a_generated_token_waits_as_often_as_in_the_original(waits: Counter[str]) -> None:
    counts = {}
    for is_spliced in (False, True):
        model: Any = tiny_model("llama", blocks=6).to(NAME)
        if is_spliced:
            with LayerSurgeon(model) as surgeon:
                insert_replacement(surgeon, WINDOW, replacement())
                surgeon.commit()
        prompt = torch.tensor([[5, 6, 7]]).to(NAME)
        for count in (4, 12):
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            waits.clear()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            counts[is_spliced, count] = sum(waits.values())
    assert counts[True, 12] - counts[True, 4] == counts[False, 12] - counts[False, 4] > 0


def test_a_read_for_each_block_is_noticed(monkeypatch: pytest.MonkeyPatch, waits: Counter[str]) -> None:
    """Planted: a value that is read for each boundary."""

    def reads_state(state: Tensor, block: nn.Module) -> Tensor:
        assert float(state.sum()) < 1e9
        return state

    monkeypatch.setattr("streamline_hooks.recording.recorder.by_token", reads_state)
    few, many = (waits_per_batch(profile, blocks, 8, waits) for blocks in (4, 7))
    assert many > few


def test_a_read_for_each_token_is_noticed(monkeypatch: pytest.MonkeyPatch, waits: Counter[str]) -> None:
    """Planted: a value that is read for each token."""
    update = WindowMoments.update

    def reads_tokens(self: Any, entering: Tensor, leaving: Tensor, mask: Tensor, **options: Any) -> None:
        assert all(float(token.norm()) > 0 for token in entering.flatten(0, 1))
        update(self, entering, leaving, mask, **options)

    monkeypatch.setattr(WindowMoments, "update", reads_tokens)
    few, many = (waits_per_batch(RUNS["fit linear"], 4, tokens, waits) for tokens in (8, 40))
    assert many > few


@pytest.mark.usefixtures("waits")
def test_students_are_trained_where_the_model_is() -> None:
    model: Any = tiny_model("llama").to(NAME)
    module = LinearReplacement(32).to(NAME)
    train(Student(model, [(WINDOW, module)]), on(NAME, batches_of(2)), on(NAME, batches_of(1)), DistillationConfig())
    assert module.projection.weight.device.type == NAME

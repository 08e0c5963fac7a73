"""Recording and changing activations of a model that is compiled afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, StreamlineError, UnsupportedSurgery
from streamline_hooks.recording import (
    BLOCK_SITES,
    MODEL_SITES,
    Add,
    Edit,
    Intervention,
    Mean,
    Patch,
    Resample,
    Scale,
    Zero,
    recorder,
)
from streamline_hooks.testing import tiny_model
from tests.tiny_models import WIDTH, tokens

SITES = (*BLOCK_SITES, *MODEL_SITES)
BLOCKS = [0, 2]
SHAPES = [(2, 5), (3, 7), (2, 5)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A compiled model, and the number of graphs compiled for its forward."""

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.count = 0
        self._backend = torch._dynamo.lookup_backend(backend)
        self.run = torch.compile(model, backend=self._compile, fullgraph=True)

    def _compile(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.count += any(node.op == "call_function" and "linear" in str(node.target) for node in graph.graph.nodes)
        return self._backend(graph, inputs)


def left_padded_batch(rows: int, length: int) -> dict[str, Any]:
    ids = tokens(rows, length, seed=rows * length)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def recorded(record: HiddenStateRecorder) -> dict[str, list[Tensor]]:
    """Return all recorded tensors by site, in the order of the blocks and calls."""
    by_site = {}
    for site in SITES:
        found: Any = record[site]  # type: ignore[call-overload]
        by_site[site] = found if isinstance(found, list) else [state for k in found for state in found[k]]
    return by_site


@pytest.mark.sample(1)
@pytest.mark.parametrize(("family", "selected", "backend"), [
    ("llama", "all", "aot_eager"),
    ("gpt2", "real", "eager"),
])  # fmt: skip
def test_each_site_is_recorded_as_without_compilation(family: str, selected: Any, backend: str) -> None:
    model, uncompiled = tiny_model(family, blocks=3), tiny_model(family, blocks=3)
    options: dict[str, Any] = {"blocks": BLOCKS, "sites": SITES, "tokens": selected}
    record, expected = HiddenStateRecorder(model, **options), HiddenStateRecorder(uncompiled, **options)
    with torch.no_grad(), record, expected:
        compiled, counts = Graphs(model, backend), []
        for shape in SHAPES:
            compiled.run(**left_padded_batch(*shape))
            uncompiled(**left_padded_batch(*shape))
            counts.append(compiled.count)
    assert counts == [1, 2, 2]  # one shape, then any: recording adds no compilation
    for site, states in recorded(record).items():
        calls = len(SHAPES) * (1 if site in MODEL_SITES else len(BLOCKS))
        assert len(states) == len(recorded(expected)[site]) == calls, site
        for state, right in zip(states, recorded(expected)[site], strict=True):
            torch.testing.assert_close(state, right, rtol=1e-5, atol=1e-6)


def test_a_closed_recorder_receives_nothing() -> None:
    model = tiny_model("llama", blocks=3)
    sites = ["block.output", "logits"]
    with torch.no_grad():
        with HiddenStateRecorder(model, [2], sites=sites) as record:
            compiled = Graphs(model)
            compiled.run(**left_padded_batch(2, 5))
        compiled.run(**left_padded_batch(2, 5))
        assert len(record["logits"]) == len(record["block.output"][2]) == 1


@pytest.mark.parametrize("sites", [["block.output"], ["mlp.input", "attention.output"]])
def test_a_recorder_that_is_opened_after_compilation_records(sites: list[str]) -> None:
    model, batch = tiny_model("llama", blocks=3), left_padded_batch(2, 5)
    with torch.no_grad():
        compiled = torch.compile(lambda batch: model(**batch), backend="eager")
        compiled(batch)
        with HiddenStateRecorder(model, [2], sites=sites) as record:
            compiled(batch)
        with HiddenStateRecorder(model, [2], sites=sites) as expected:
            model(**batch)
    for site in sites:
        ((state,),) = record[site].values()  # type: ignore[call-overload]
        torch.testing.assert_close(state, expected[site][2][0])  # type: ignore[call-overload]


@pytest.mark.parametrize("sites", [["block.output"], ["mlp.input", "attention.output"]])
def test_compiled_code_that_records_nothing_does_not_pass_unnoticed(
    sites: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "forget_compiled_graphs", lambda: None)
    model = tiny_model("llama", blocks=3)
    with torch.no_grad():
        compiled = Graphs(model)
        compiled.run(**left_padded_batch(2, 5))
        with pytest.raises(
            StreamlineError, match=r"ran in compiled code, but nothing was recorded.*before torch.compile"
        ):
            with HiddenStateRecorder(model, [2], sites=sites):
                compiled.run(**left_padded_batch(2, 5))


def test_the_model_may_change_a_recorded_state_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).add_(1.0)
            return x

    model, x = InPlace().eval(), torch.randn(2, 4, 8)
    with torch.no_grad(), HiddenStateRecorder(model, tokens=torch.ones(2, 4, dtype=torch.bool)) as record:
        model(x)
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    for visits in (*record.inputs.values(), *record.outputs.values()):
        torch.testing.assert_close(visits[1], visits[0])


def test_generation_with_a_model_compiled_in_place() -> None:
    model = tiny_model("llama", blocks=3).eval()
    ids = tokens(2, 5)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), HiddenStateRecorder(model, [1], sites=["mlp.output"], tokens="last") as expected:
        text = model.generate(ids, **settings)
    with torch.no_grad(), HiddenStateRecorder(model, [1], sites=["mlp.output"], tokens="last") as record:
        model.compile(backend="eager", fullgraph=True)
        assert torch.equal(model.generate(ids, **settings), text)
    pairs = zip(record["mlp.output"][1], expected["mlp.output"][1], strict=True)
    for state, right in pairs:
        torch.testing.assert_close(state, right)


def test_contributions_are_verified_in_the_first_compiled_call() -> None:
    model = tiny_model("llama", blocks=3)
    with torch.no_grad(), HiddenStateRecorder(model, [1], sites=["attention.output", "mlp.output"]):
        model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(UnsupportedSurgery, match="contributions of block 1 do not sum to its output"):
            compiled(**left_padded_batch(2, 5))


VECTOR = torch.linspace(-1, 1, WIDTH)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("family", "selection", "backend"), [
    ("llama", {"tokens": [0, -1]}, "aot_eager"),
    ("gpt2", {"tokens": "last", "steps": "prefill"}, "eager"),
])  # fmt: skip
def test_edits_and_their_gradients_are_those_without_compilation(family: str, selection: Any, backend: str) -> None:
    vector = VECTOR.clone().requires_grad_()
    vectors = [site for site in BLOCK_SITES if site != "attention.heads"]
    edits: dict[Any, Any] = {(site, 2): Add(vector, 0.5) for site in vectors}
    edits |= {site: Scale(1.5) for site in MODEL_SITES}
    edits |= {("attention.heads", 1): Scale(0.5), ("mlp.output", 1): [Zero(), Add(vector)]}
    edits |= {("attention.output", 1): Mean(torch.ones(4, WIDTH))}
    model, uncompiled = tiny_model(family, blocks=3), tiny_model(family, blocks=3)
    plain = uncompiled(**left_padded_batch(2, 5)).logits
    with Intervention(model, edits, **selection), Intervention(uncompiled, edits, **selection):
        compiled, counts = Graphs(model, backend), []
        for shape in SHAPES:
            results = []
            for run in (compiled.run, uncompiled):
                vector.grad = None
                logits = run(**left_padded_batch(*shape)).logits
                logits.square().mean().backward()
                results.append((logits.detach(), vector.grad))
            counts.append(compiled.count)
            torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
            assert vector.grad is not None and vector.grad.abs().sum() > 0
        assert not torch.allclose(results[0][0], plain, atol=1e-2)
    assert counts == [1, 2, 2]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("edit", "selection", "message"),
    [
        (Add(VECTOR), {"tokens": [4]}, r"Token 4 does not exist.*mlp.output of block 1: the shortest has 3 real"),
        (Resample(torch.ones(3, WIDTH)), {}, r"mlp.output of block 1 cannot be compiled.*without torch.compile"),
        (Mean(), {}, "cannot be compiled"),
        (Patch([torch.zeros(1, 5, WIDTH)] * 2), {}, "cannot be compiled"),
        (Add(VECTOR), {"steps": "decode"}, "edits of mlp.output of block 1 were not applied"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(edit: Edit, selection: Any, message: str) -> None:
    model = tiny_model("llama", blocks=3)
    with torch.no_grad(), pytest.raises(StreamlineError, match=message):
        with Intervention(model, {("mlp.output", 1): edit}, **selection):
            torch.compile(model, backend="eager", fullgraph=True)(**left_padded_batch(2, 5))


def test_steps_are_refused_with_a_cache() -> None:
    model = tiny_model("llama", blocks=3)
    with torch.no_grad():
        cache = model(tokens(2, 3), use_cache=True).past_key_values
        with pytest.raises(StreamlineError, match=r"cannot be compiled.*with a cache steps='all'"):
            with Intervention(model, {("mlp.output", 1): Add(VECTOR)}, steps="decode"):
                torch.compile(model, backend="eager", fullgraph=True)(tokens(2, 1), past_key_values=cache)

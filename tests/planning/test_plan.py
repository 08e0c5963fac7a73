"""Plans by arithmetic, against shapes that are known and runs that are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plan import llama_3_70b
from streamline_hooks.planning import Asked, Rates, h100, plan_blockwise
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.testing import tiny_model

ASKED = Asked(calibration=1000, validation=100, test=50, sequence_length=10, window=2, shortlist=3, memory=0)


@pytest.fixture(scope="module")
def llama_70b() -> BlockStack:
    import accelerate

    with accelerate.init_empty_weights(include_buffers=True):
        return find_stack(llama_3_70b())


def test_a_model_of_70_billion_is_planned_by_hand(llama_70b: BlockStack) -> None:
    asked = Asked(calibration=1_000_000, validation=0, test=0, sequence_length=1, window=20, memory=0)
    plan = plan_blockwise(llama_70b, asked, bytes_a_weight=2)
    matrices = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672  # of a block
    weights = matrices + 2 * 8192
    stages = {stage.name: stage for stage in plan.stages}
    assert plan.parameters == 80 * weights + 8192 + 2 * 128256 * 8192 == 70_553_706_496
    assert plan.bytes == 2 * plan.parameters
    assert stages["rank"].products == 1e6 * 80 * (2 * matrices + 4 * 8192)
    assert stages["rank"].sums == 2 * 1e6 * 81**2 * 8192
    assert stages["rank"].states == stages["rank"].written == 81 * 1e6 * 8192 * 2
    assert stages["rank"].read == 80 * weights * 2 + stages["rank"].states
    assert stages["check"].read == 80 * weights * 2
    assert stages["save"].written == plan.bytes - 20 * weights * 2
    one, eight = h100(), h100(8)
    assert plan.seconds(eight) < plan.seconds(one)
    assert stages["verify"].eigen == 8 * 2 * 10 * 8192**3
    alone = sum(s.read / one.read + s.written / one.write + s.eigen / one.eigen for s in plan.stages)
    assert plan.seconds(eight) - alone == pytest.approx((plan.seconds(one) - alone) / 8)


def test_memory_takes_states_from_the_disk_and_is_counted() -> None:
    stack = find_stack(tiny_model("llama"))
    on_disk, held = plan_blockwise(stack, ASKED), plan_blockwise(stack, replace(ASKED, memory=2**30))
    assert all(stage.written == 0 for stage in held.stages if stage.name != "save")
    assert on_disk.states == held.states
    assert held.resident - on_disk.resident == held.states
    assert sum(s.read for s in on_disk.stages) - sum(s.read for s in held.stages) > 0


def test_more_of_anything_never_takes_less() -> None:
    stack, rates = find_stack(tiny_model("llama")), Rates(1e9, 1e8, 1e8, 1e7, 1e6)
    base = plan_blockwise(stack, ASKED).seconds(rates)
    for changed in ({"calibration": 2000}, {"validation": 200}, {"test": 100}, {"shortlist": 6}):
        assert plan_blockwise(stack, replace(ASKED, **changed)).seconds(rates) > base, changed


def test_the_table_has_a_line_a_stage_and_one_for_all() -> None:
    plan = plan_blockwise(find_stack(tiny_model("gpt2")), ASKED)
    lines = plan.table(Rates(1e9, 1e8, 1e8, 1e7, 1e6)).splitlines()
    assert len(lines) == 2 + len(plan.stages) + 1
    assert lines[-1].startswith("| **all** |")
    assert "0.00 billion parameters" in str(plan)


def test_a_head_of_its_own_is_read_when_it_is_needed() -> None:
    tied, untied = tiny_model("gpt2"), tiny_model("llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    for model, own in ((tied, 0), (untied, untied.lm_head.weight.numel() * 4)):
        if model is untied and model.lm_head.weight is model.model.embed_tokens.weight:
            pytest.skip("this one is tied too")
        stages = {stage.name: stage for stage in plan_blockwise(find_stack(model), replace(ASKED, memory=2**30)).stages}
        assert stages["measure"].read - stages["check"].read == own


def test_the_precision_of_the_checkpoint_counts() -> None:
    stack = find_stack(tiny_model("llama"))
    wide, narrow = plan_blockwise(stack, ASKED, bytes_a_weight=4), plan_blockwise(stack, ASKED, bytes_a_weight=2)
    assert wide.bytes == 2 * narrow.bytes
    assert wide.stages[0].read == 2 * narrow.stages[0].read

"""Estimates and plans, by a clock that the parts of a model move by known times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import CompressionConfig, HiddenStateRecorder, StreamlineError, compress, find_stack
from streamline_hooks.core import count_tokens
from streamline_hooks.data import PARTS
from streamline_hooks.distillation import DistillationConfig, HealingConfig, student_of
from streamline_hooks.modeling import Task, find_stacks
from streamline_hooks.pipeline import CostEstimate, estimate_cost, plan_training, stage_times
from streamline_hooks.pipeline.cost import compression_bytes, format_duration, write_rate
from streamline_hooks.pipeline.plan import TextParts, estimate_ranking, fit_to_budget
from streamline_hooks.pipeline.stage_times import StageRates, StageTokens, measure_training
from streamline_hooks.repair import LinearConfig
from streamline_hooks.testing import tiny_model
from tests.configured import configured
from tests.evaluation.fake_clock import FakeClock
from tests.other_models import OTHERS, made
from tests.pipeline.test_compress_tasks import drawn
from tests.processes import in_processes

BEST = CompressionConfig.preset("best")
BLOCK, HEAD = 1.0, 5.0  # seconds a token
KL = DistillationConfig(loss={"kl": 1.0}, validations=1)


def parts(rows: int = 2, length: int = 8, batches: int = 8) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    names = ("calibration", "validation", "test")
    return {name: [torch.randint(3, 60, (rows, length), generator=generator) for _ in range(batches)] for name in names}


def charged(slow: int | None = None, times: float = 10.0) -> tuple[Any, FakeClock]:
    """A model of 8 blocks whose forwards move a clock; one block may be slower."""
    model, clock = tiny_model("llama"), FakeClock()
    clock.charge(model.lm_head, HEAD)
    for k, block in enumerate(model.model.layers):
        clock.charge(block.mlp, BLOCK * (times if k == slow else 1.0))
    return model, clock


def estimated(config: CompressionConfig, text: Any = None, **model: Any) -> dict[str, float]:
    subject, clock = charged(**model)
    found = estimate_cost(subject, None, text or parts(), config, clock=clock)
    return {stage.name: stage.seconds for stage in found.stages}


def test_the_stages_of_a_closed_form_are_those_of_its_forwards() -> None:
    text = 8 * 16  # tokens of each part
    found = estimated(configured(remove=2, shortlist=3))
    assert found["rank"] == found["fit"] == text * 8 * BLOCK
    whole = text * (8 * BLOCK + HEAD)
    candidate = (found["verify"] - whole) / 3
    assert text * HEAD < candidate < whole
    # The expected two of at most three attempts, and the result.
    assert found["evaluate"] == pytest.approx(whole + 2 * candidate + 0.75 * whole)
    assert found["generate"] == found["save"] == 0.0


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"search": "window"},
        {"search": "window", "repair": "block"},
        {"search": "disjoint"},
        {"search": "window", "repair": "swiglu", "distillation": KL},
    ],
)
def test_a_compression_takes_what_was_estimated(settings: dict[str, Any]) -> None:
    config = configured(remove=2, shortlist=4, speed=False, generation=False, **settings)
    estimate = sum(estimated(config).values())
    model, clock = charged()
    compress(model, parts(), config)
    assert estimate == pytest.approx(clock.now, rel=0.25)


def test_a_cost_is_linear_in_the_text() -> None:
    config = configured(remove=2, distillation=KL)
    once, twice = (estimated(config, parts(batches=batches)) for batches in (8, 16))
    for name in ("rank", "fit", "verify", "train", "evaluate"):
        assert twice[name] == pytest.approx(2 * once[name], rel=0.15), name


def test_a_slow_block_moves_the_stages_that_run_it() -> None:
    config = configured(remove=2, protect=(0, 7), distillation=KL)
    plain, slow = estimated(config), estimated(config, slow=7)  # behind every window, and kept
    for name, share in {"verify": 1.5, "train": 1.5, "evaluate": 1.3}.items():
        assert slow[name] > share * plain[name], name
    assert (slow["rank"], slow["fit"]) == (plain["rank"], plain["fit"])  # which end before it


def test_a_slow_stage_moves_its_own_cost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(remove=2, shortlist=2)
    plain = estimated(config)
    model, clock = charged()
    made = stage_times.fit_windows

    def slow(*given: Any, **options: Any) -> Any:
        clock.now += 1000.0
        return made(*given, **options)

    monkeypatch.setattr(stage_times, "fit_windows", slow)
    found = {stage.name: stage.seconds for stage in estimate_cost(model, None, parts(), config, clock=clock).stages}
    assert found.pop("fit") == plain.pop("fit") + 2000.0  # one solution for each of two windows
    assert found == plain


def test_the_first_run_of_a_stage_does_not_count() -> None:
    model, clock = charged()
    first = iter([100.0])
    model.model.layers[0].register_forward_hook(lambda *_: setattr(clock, "now", clock.now + next(first, 0.0)))
    assert estimate_ranking(model, parts()["calibration"], clock=clock).seconds == 8 * 16 * 8 * BLOCK


def test_rounds_share_the_text_and_keep_the_original() -> None:
    config = configured(remove=2, distillation=KL, shortlist=2)
    model = tiny_model("llama")
    size = sum(p.numel() * 4 for p in model.parameters())
    once, twice = (
        {stage.name: stage for stage in estimate_cost(model, None, parts(), one).stages}
        for one in (configured(config, remove=1), replace(config, rounds=2))
    )
    assert {name: twice[name].tokens / once[name].tokens for name in once if once[name].tokens} == {
        "rank": 1, "fit": 1, "verify": 2, "train": 1, "evaluate": 2,
    }  # fmt: skip
    assert all(twice[name].bytes - once[name].bytes == size for name in once)


def test_a_criterion_that_runs_the_model_is_counted() -> None:
    plain, searched = (estimated(configured(remove=2, criterion=by))["rank"] for by in ("cosine", "kl"))
    assert searched > 2 * plain


TASKS = {"vit": "kl", "bert": "embedding", "bart decoder": "kl", "bart encoder": "kl", "dinov2": "embedding"}


def charged_task(name: str, clock: FakeClock) -> Any:
    """A model whose last projection of each block, in all of its stacks, moves a clock."""
    model = made(name)
    for stack in find_stacks(model):
        for block in stack.blocks:
            clock.charge([one for one in block.modules() if isinstance(one, nn.Linear)][-1], BLOCK)
    return model


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "trained"), [*((name, False) for name in TASKS), ("vit", True), ("bart decoder", True)]
)
def test_a_compression_for_another_task_takes_what_was_estimated(name: str, trained: bool) -> None:
    """Images, embeddings and pairs of texts have the stages of text, and no generation."""
    training = DistillationConfig(loss={TASKS[name]: 1.0}, validations=1) if trained else None
    path = OTHERS[name].path(made(name))
    config = configured(remove=1, shortlist=2, protect=(0,), stack=path, distillation=training)
    given = {part: drawn(name, k, 8) for k, part in enumerate(PARTS)}
    clock, image = FakeClock(), Task.of(made(name)).unit == "image" or name == "dinov2"
    model = charged_task(name, clock)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = estimate_cost(model, object(), given, config, clock=clock)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tokens = sum(map(count_tokens, given["test"]))
    assert {stage.name: stage.tokens for stage in found.stages}["evaluate"] == tokens
    assert ("images" if image else "tokens") in found.table().splitlines()[0]
    assert {stage.name: stage.seconds for stage in found.stages}["generate"] == 0.0
    clock = FakeClock()
    compress(charged_task(name, clock), given, config)
    assert found.seconds == pytest.approx(clock.now, rel=0.3)


@pytest.mark.parametrize("name", ["vit", "bart decoder"])
def test_the_memory_of_a_stage_is_that_of_its_states(name: str) -> None:
    """An image is one of what is counted, and has a state for each patch and the class; labels change nothing."""
    model, given = made(name), drawn(name, 0, 1)
    stack = find_stack(model, OTHERS[name].path(model))
    record = HiddenStateRecorder(model, [1], sites=["block.input"], stack=stack.path)
    with record.over(given) as passes:
        states = [record.inputs[1][0].shape for _ in passes]
    (shape,) = states
    expected = compression_bytes(stack, batch=shape[:-1].numel(), text=1)["rank"]
    found = estimate_ranking(model, given, stack=stack.path)
    assert found.stages[0].bytes == expected and shape[:-1].numel() == {"vit": 10, "bart decoder": 12}[name]


# The training.


def student(model: nn.Module, healing: HealingConfig | None = BEST.healing) -> Any:
    stack = find_stack(model)
    return student_of(stack, [(range(2, 4), BEST.repair.build(stack, range(2, 4)))], healing)


def test_warm_up_of_a_training_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run, and the first step of each run, take a hundred times as long."""
    clock, made = FakeClock(), torch.optim.AdamW.step
    seconds = iter([9600.0, 1600.0, 1600.0, 16.0, 16.0, 16.0])

    def step(self: Any, *given: Any) -> Any:
        clock.now += next(seconds)
        return made(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    text = parts()["calibration"]
    assert BEST.distillation is not None
    assert measure_training(student(tiny_model("llama")), text, text[0], BEST.distillation, clock=clock) == 1.0


@pytest.mark.parametrize(("accumulation", "batches"), [(1, 8), (2, 8), (4, 2)])
def test_a_training_is_extrapolated_from_its_steps(accumulation: int, batches: int) -> None:
    config = replace(KL, gradient_accumulation_steps=accumulation, epochs=3, validations=2)
    text = parts()["calibration"][:batches]
    model, clock = charged()
    pace = measure_training(student(model), text, text[0], config, clock=clock)
    # The teacher runs 8 blocks once; a student the last 4, and the teacher's head in each step.
    assert pace == pytest.approx(8 * BLOCK + 4 * BLOCK + 2 * HEAD, rel=0.2)


# What is left behind.


@contextmanager
def unchanged(model: nn.Module, folder: Path) -> Iterator[None]:
    def everything() -> list[Any]:
        return [
            {name: value.clone() for name, value in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [(id(p), p.requires_grad) for p in model.parameters()],
            [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
             for name, m in model.named_modules()],
            torch.get_rng_state(),
            sorted(folder.rglob("*")),
        ]  # fmt: skip

    before = everything()
    yield
    after = everything()
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2:4] == after[2:4] and torch.equal(before[4], after[4]) and before[5] == after[5]


@pytest.mark.parametrize("healing", [BEST.healing, HealingConfig(method="lora", rank=2, dropout=0.5)])
def test_an_estimate_leaves_everything_as_it_was(healing: HealingConfig, tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = None if k % 3 else torch.full_like(parameter, float(k))
        parameter.requires_grad_(k % 4 != 0)
    config = configured(replace(BEST, healing=healing), remove=2, repeated_context=0.0, autocast="bfloat16")
    with unchanged(model, tmp_path):
        estimate_cost(model, None, parts(), config, output=tmp_path / "new" / "out")


def test_a_plan_leaves_everything_as_it_was(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with unchanged(story_model[0], tmp_path):
        plan_training(
            story_model[0],
            story_texts,
            3600.0,
            small(speed=True, generation=True),
            tokenizer=story_model[1],
            output=tmp_path / "out",
        )
    assert "tok/s" not in capfd.readouterr().err


# A budget, by arithmetic.

RATES = StageRates(
    fixed={"prepare": 1.0, "rank": 3.0, "fit": 4.0, "verify": 0.0, "train": 0.0, "evaluate": 0.0, "save": 12.0},
    per_token={"rank": 1e-3, "fit": 1.5e-3, "verify": 8e-3, "train": 5e-3, "evaluate": 4e-3},
    forward=1e-3,
    peaks={},
)
MINUTES = st.floats(8.0, 600.0)


def planned(minutes: float, available: int | None = None, **fixed: Any) -> tuple[StageTokens, CostEstimate]:
    sizes = fit_to_budget(60 * minutes, RATES, TextParts(**{"length": 512, "available": available, **fixed}))
    return sizes, RATES.estimate(sizes)


def test_an_estimate_by_hand() -> None:
    sizes = StageTokens(training=102_400, fitting=20_480, validation=4_096, test=12_288, epochs=2, validations=5)
    estimate = RATES.estimate(sizes)
    assert {stage.name: stage.seconds for stage in estimate.stages} == pytest.approx(
        {
            "prepare": 1.0,
            "rank": 20.48 + 3.0,
            "fit": 30.72 + 4.0,
            "verify": 32.768,
            "train": 512.0 + 409.6 + 7 * 4.096,
            "evaluate": 49.152,
            "save": 12.0,
        }
    )
    lines = estimate.table().splitlines()
    assert [line.split()[0] for line in lines] == ["stage", *(stage.name for stage in estimate.stages), "total"]
    assert "204,800" in lines[5] and lines[-1].split()[1:3] == format_duration(estimate.seconds).split()


@given(MINUTES)
def test_as_much_as_fits_and_one_sequence_more_does_not(minutes: float) -> None:
    sizes, estimate = planned(minutes)
    more = RATES.estimate(TextParts(512).sizes(sizes.training // 512 + 1)).seconds
    assert 0.95 * 60 * minutes <= estimate.seconds <= 60 * minutes < more


@given(MINUTES, MINUTES, st.integers(20_480, 2_000_000))
def test_more_time_or_more_text_is_never_for_less(one: float, other: float, there: int) -> None:
    less, more = sorted((one, other))
    (short, _), (long, _) = (planned(minutes, there) for minutes in (less, more))
    assert short.training <= long.training and short.training * short.epochs <= long.training * long.epochs
    assert long.epochs == 1 or long.training == there // 512 * 512
    assert long.training <= planned(more, 2 * there)[0].training


@given(st.integers(2, 10_000), st.integers(1, 4), st.sampled_from([512, 4_096, 50_000]))
def test_the_parts_keep_to_their_bounds(sequences: int, epochs: int, length: int) -> None:
    sizes = TextParts(length).sizes(sequences, epochs)
    assert sizes.training == length * sequences and 2 <= sizes.validations <= 8
    assert 2 * length <= sizes.fitting <= max(2 * length, 40_960)  # a ridge is chosen on another sequence
    assert sizes.validation <= max(length, 4_096) and sizes.test <= max(length, 12_288)
    assert all(size % length == 0 for size in sizes[:4])


def test_text_that_does_not_suffice_is_seen_up_to_four_times() -> None:
    free = planned(30)[0]
    sizes, estimate = planned(30, round(0.7 * free.training))
    assert 1.3 < sizes.epochs < 1.6 and 0.93 * 1800 <= estimate.seconds <= 1800
    sizes, estimate = planned(30, 30_000)
    assert sizes == TextParts(512).sizes(58, 4) and estimate.seconds < 0.9 * 1800
    assert planned(20, validation=1_000, test=640, length=64)[0][2:4] == (960, 640)


def test_a_budget_that_is_too_small_names_one_that_is_not() -> None:
    with pytest.raises(StreamlineError, match=r"2.0 min is too small.*20,480 training tokens") as raised:
        planned(2)
    minutes = int(str(raised.value).split("Expected ")[1].split("m or more")[0])
    assert planned(minutes)[0].training >= 20_480
    with pytest.raises(StreamlineError, match="is too small for this machine"):
        planned(minutes - 1)


@pytest.mark.parametrize(
    ("found", "apart", "left", "others"),
    [
        ((40_960, 2_048, 7_168), False, 50_176 - 2_048 - 8_192, (2_048, 8_192)),
        ((3_584, 512, 1_024), False, 5_120 - 1_536, (512, 1_024)),  # a tenth and a fifth
        ((40_960, 2_048, 1_024), True, 40_960, (2_048, 1_024)),  # the test alone has too little
    ],
)
def test_the_training_gets_what_the_other_parts_leave(
    found: tuple[int, int, int], apart: bool, left: int, others: tuple[int, int]
) -> None:
    shrunk = TextParts(512).shrunk(StageTokens(40_960, 8_192, 2_048, 8_192), found, apart=apart)
    sizes = shrunk.sizes(1)
    assert shrunk.available == left and (sizes.validation, sizes.test) == others


# A budget, on a model.


_QUIET = {"speed": False, "generation": False}


def small(base: CompressionConfig = BEST, **more: Any) -> CompressionConfig:
    return configured(base, **{"remove": 1, "sequence_length": 64, "shortlist": 2, "batch_size": 1, **_QUIET, **more})


def test_little_text_is_all_taken_and_the_plan_is_carried_out(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    """The parts that were planned are those that the text is dealt into, to the token."""
    (model, tokenizer), texts = story_model, story_texts[:30]
    found = plan_training(model, texts, 3600.0, small(batch_size=4), tokenizer=tokenizer)
    data, training = found.config.data, found.config.distillation
    assert training is not None and training.epochs == 4 and "add more text" in found.table()
    result = compress(model, texts, found.config, tokenizer=tokenizer)
    assert result.training is not None and result.training.tokens == 4 * data.calibration_tokens
    for name in ("calibration", "fitting", "validation", "test"):
        assert result.data[f"{name}_tokens"] == getattr(data, f"{name}_tokens")
    assert not any("shrunk" in note for note in result.data["notes"])


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_faster_precision_is_planned(
    fast: torch.dtype, story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, product = FakeClock(), torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock.now += 1.0 if a.dtype == fast else 2.0
        return product(a, b)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr("streamline_hooks.pipeline.plan.perf_counter", clock)
    found = plan_training(story_model[0], story_texts, 3600.0, small(), tokenizer=story_model[1])
    assert found.config.hardware.autocast == ("bfloat16" if fast == torch.bfloat16 else None)
    costs = {stage.name: stage.seconds for stage in found.estimate.stages}
    after = costs["generate"] + costs["save"] + costs["evaluate"] / 5
    assert found.config.train_until == pytest.approx(1.1 * 3600 - costs["plan"] - after)


def test_the_last_block_stays_where_blocks_after_the_window_are_healed(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    assert plan_training(
        story_model[0], story_texts, 3600.0, small(protect=(0, 1)), tokenizer=story_model[1]
    ).config.search.protect == (0, 1, -1)
    beside = replace(BEST, healing=HealingConfig(method="partial", where="beside", count=1))
    assert plan_training(
        story_model[0], story_texts, 3600.0, small(beside, protect=(0, 1)), tokenizer=story_model[1]
    ).config.search.protect == (
        0,
        1,
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CompressionConfig.preset("iterative"), "has 2 rounds"),
        (CompressionConfig.preset("none"), "trains nothing"),
        (replace(BEST, train_until=10.0), "train_until"),
        (CompressionConfig(repair=LinearConfig(), distillation=replace(KL, max_minutes=1.0)), "max_minutes"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(
    config: CompressionConfig, said: str, story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    with pytest.raises(StreamlineError, match=f"{said}.*Expected .* one round"):
        plan_training(story_model[0], story_texts, 600.0, config, tokenizer=story_model[1])


def test_a_size_of_a_part_that_the_budget_decides_is_refused(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    model, tokenizer = story_model
    with pytest.raises(StreamlineError, match=r"sizes.*'calibration'.*Expected validation and test.*Leave"):
        plan_training(model, story_texts, 600.0, small(), tokenizer=tokenizer, sizes={"calibration": 640})


def test_a_disk_is_measured_above_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_rate(tmp_path / "new" / "out") > 0 and not list(tmp_path.iterdir())

    def full(*given: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(StreamlineError, match=r"No space left.*Choose"):
        write_rate(tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_all_processes_have_the_plan_of_the_first(stories_folder: Path, story_texts: list[str], tmp_path: Path) -> None:
    code = """
        import json
        from streamline_hooks import CompressionConfig
        from streamline_hooks.pipeline import estimate_cost, plan_training
        from streamline_hooks.checkpoint.pretrained import load_pretrained
        from tests.configured import configured
        model, tokenizer = load_pretrained(args[0])
        texts = json.loads(open(f"{folder}/texts.json").read())
        quiet = {"speed": False, "generation": False}
        sizes = {"remove": 1, "sequence_length": 64, "shortlist": 2, "batch_size": 1, **quiet}
        config = configured(CompressionConfig.preset("best"), **sizes)
        plan = plan_training(model, texts, 3600.0, config, tokenizer=tokenizer)
        said["plan"] = plan.config.to_yaml()
        sizes = {"calibration_tokens": 640, "validation_tokens": 64, "test_tokens": 64}
        config = configured(remove=1, sequence_length=64, **sizes, **quiet)
        said["seconds"] = estimate_cost(model, tokenizer, texts, config).seconds
    """
    (tmp_path / "texts.json").write_text(json.dumps(story_texts))
    first, second = in_processes(code, tmp_path, 2, stories_folder)
    assert first == second and "calibration_tokens" in first["plan"]

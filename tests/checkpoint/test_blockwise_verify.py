"""Block by block, windows are repaired and judged as in memory, each block read once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack, load
from streamline_hooks.checkpoint import BlockwiseSource, blockwise_source
from streamline_hooks.checkpoint.offloaded import open_checkpoint
from streamline_hooks.checkpoint.streaming import BlockwisePass
from streamline_hooks.cli import parse_replacement
from streamline_hooks.data import packed_batches
from streamline_hooks.evaluation import perplexity_of_candidates
from streamline_hooks.modeling import Candidate, read_input
from streamline_hooks.repair import NoneConfig
from streamline_hooks.selection import Selection, Trial, VerifiedSelection, trial_perplexities, verify_shortlist
from streamline_hooks.surgery import lm_head_of
from tests.checkpoint.block_by_block import blockwise, calibration, on_disk, reads, written  # noqa: F401
from tests.repair.own_kinds import register_kind
from tests.tiny_models import left_padded, padded, tiny_model, tokens

WINDOWS = [range(0, 2), range(2, 4), range(1, 4), range(4, 6), range(3, 4), range(2, 5)]
SELECTIONS = [Selection((window,), score=float(k)) for k, window in enumerate(WINDOWS)]
FIT, HELD_OUT = calibration(), [tokens(3, 9, seed=7), padded([8, 4], "right")]
VALIDATION = [left_padded(2, 11, seed=3), tokens(3, 7, seed=4)]
TEXTS = (FIT, HELD_OUT, VALIDATION)


def numbers(judged: list[VerifiedSelection]) -> list[tuple[Any, ...]]:
    """The windows, and what was measured of each: of a selection, then of each replacement."""
    return [
        (one.windows, one.score, one.distance, r.removal_error, r.repaired_error, r.ridge)
        for one in judged
        for r in one.repairs
    ]


def weights(judged: list[VerifiedSelection]) -> list[dict[str, torch.Tensor]]:
    modules = [repair.replacement_module for one in judged for repair in one.repairs]
    return [module.state_dict() if isinstance(module, nn.Module) else {} for module in modules]


def require_same(found: list[VerifiedSelection], wanted: list[VerifiedSelection]) -> None:
    for mine, theirs in zip(numbers(found), numbers(wanted), strict=True):
        assert mine[0] == theirs[0] and (mine[-1] is None) == (theirs[-1] is None)
        assert mine[1:-1] == pytest.approx(theirs[1:-1], rel=1e-5)
        assert mine[-1] is None or mine[-1] == pytest.approx(theirs[-1], rel=1e-5)
    for one, other in zip(weights(found), weights(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "linear", torch.float32),  # its LM head is on disk
        ("llama", "swiglu:width=8", torch.bfloat16),
        ("gpt2", "linear:rank=3", torch.float32),  # tied, and in memory
        ("qwen3", "none", torch.float32),
        ("gemma3", "mlp:width=8", torch.float32),
        ("gemma3", "linear:diagonal", torch.bfloat16),
    ],
)
def test_it_is_what_is_found_in_memory(family: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, _ = written(tmp_path, family, dtype)
    whole = load(folder, dtype="auto")
    wanted = verify_shortlist(whole, SELECTIONS, *TEXTS, replacement=parse_replacement(kind))
    model = open_checkpoint(folder)
    require_same(
        blockwise(verify_shortlist, model, SELECTIONS, *TEXTS, replacement=parse_replacement(kind), memory=4000), wanted
    )
    assert all(on_disk(model)) and len({one.distance for one in wanted}) == len(WINDOWS)


def test_each_block_is_read_once_in_a_pass(tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    """One pass fits up to the end of the last window, the other verifies; the last block also carries the head."""
    folder, _ = written(tmp_path)
    model = open_checkpoint(folder)
    blockwise(verify_shortlist, model, SELECTIONS[1:3], *TEXTS, check=False)
    counts = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(6)}
    assert counts == {0: 2, 1: 2, 2: 2, 3: 2, 4: 1, 5: 2} and reads["lm_head.weight"] == 1


def test_each_text_goes_through_the_blocks_that_it_needs(tmp_path: Path) -> None:
    model = open_checkpoint(written(tmp_path)[0])
    calls: Counter[int] = Counter()
    for k, block in enumerate(find_stack(model).blocks):
        block.register_forward_hook(lambda *_, k=k: calls.update([k]))
    blockwise(verify_shortlist, model, SELECTIONS[1:3], *TEXTS, check=False)
    fitted, judged = len(FIT) + len(HELD_OUT), len(VALIDATION)
    at_end = calls.pop(5)
    both = fitted + judged
    assert calls == {0: both, 1: both, 2: both, 3: both, 4: 3 * judged}, "the two windows end at 4"
    assert at_end > 3 * judged, "and it runs in vain for what follows it"


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
def test_tokens_are_judged_a_few_at_a_time(
    tokens_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = written(tmp_path, "gemma3")
    monkeypatch.setattr("streamline_hooks.surgery.token_outputs.LOGIT_BYTES", tokens_at_once * 61 * 4)
    sizes: list[int] = []
    model: Any = open_checkpoint(folder)
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
    found = blockwise(verify_shortlist, model, SELECTIONS[:3], *TEXTS, check=False)
    require_same(found, verify_shortlist(whole, SELECTIONS[:3], *TEXTS))
    assert max(sizes[9:]) == min(tokens_at_once, 11), "the first look whether a token is judged by itself"


def test_what_looks_at_several_tokens_behind_the_blocks_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    model: Any = open_checkpoint(folder)
    model.model.norm.register_forward_hook(lambda _, __, output: output - output.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedSurgery, match=r"after its blocks.*depend on the other tokens"):
        blockwise(verify_shortlist, model, SELECTIONS[:1], *TEXTS, check=False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_is_what_the_model_says(family: str, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, whole = written(tmp_path, family)
    model, batch = open_checkpoint(folder), tokens(2, 9)
    with BlockwisePass(model, [batch]) as states:
        list(states)
        reads.clear()
        with lm_head_of(states.stack) as head:
            said = torch.stack([head(states.read(6, 0)[row]) for row in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(said, whole(batch).logits, rtol=1e-5, atol=1e-5)
    assert set(reads.values()) == {1}, "the last block and the head stay until the end"
    assert all(on_disk(model)) and len(find_stack(model)) == 6


def test_the_head_runs_the_last_block_on_one_sequence() -> None:
    model: Any = tiny_model("llama")
    stack, state, rows = find_stack(model), torch.linspace(-1, 1, 5 * 32).view(5, 32), []
    stack[-1].register_forward_pre_hook(
        lambda block, args, kwargs: rows.append(read_input(args, kwargs, block).shape[0]), with_kwargs=True
    )
    with lm_head_of(stack) as head, torch.no_grad():
        assert torch.equal(head(state), model.lm_head(model.model.norm(state)))
    assert rows == [1]


def test_perplexity_is_that_in_memory(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    best = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS[:2], *TEXTS)
    candidates = [Candidate(one.windows[0], one.repairs[0].replacement_module) for one in best]  # type: ignore[arg-type]
    candidates += [Candidate(range(1, 3)), Candidate(range(4, 6)), Candidate(range(0, 1))]
    found = blockwise(perplexity_of_candidates, open_checkpoint(folder), calibration(), candidates, memory=4000)
    wanted = perplexity_of_candidates(whole, calibration(), candidates)
    for one, other in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        assert one.tokens == other.tokens and one.nll == pytest.approx(other.nll, rel=1e-6)


def test_perplexity_of_packed_rows_is_that_in_memory(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    rows = packed_batches([[[5, 6, 7], [8, 9, 10, 11]], [[12, 13, 14, 15, 16, 17]]], batch_size=2)
    candidates = [Candidate(range(2, 4))]
    found = blockwise(perplexity_of_candidates, open_checkpoint(folder), rows, candidates, memory=4000)
    wanted = perplexity_of_candidates(whole, rows, candidates)
    for mine, theirs in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        assert mine.tokens == theirs.tokens == 2 + 3 + 5
        assert mine.nll == pytest.approx(theirs.nll, rel=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_nothing_but_padding_is_passed_over(row: int) -> None:
    """As in memory: in the first row, where it is looked whether a token is judged by itself, or in another."""
    model, batch = tiny_model("llama"), left_padded(3, 10)
    batch["attention_mask"][row] = 0
    candidates = [Candidate(range(1, 3))]
    original, others = blockwise(perplexity_of_candidates, model, [batch], candidates)
    wanted, theirs = perplexity_of_candidates(model, [batch], candidates)
    for one, other in zip([original, *others], [wanted, *theirs], strict=True):
        assert one.tokens == other.tokens > 0 and one.nll == pytest.approx(other.nll, rel=1e-5)
    texts = ([tokens(3, 9)], [tokens(3, 9, seed=1)], [batch])
    require_same(
        blockwise(verify_shortlist, model, SELECTIONS[:2], *texts),
        verify_shortlist(model, SELECTIONS[:2], *texts),
    )


def test_text_of_nothing_but_padding_is_nothing_to_judge_on() -> None:
    batch = {"input_ids": tokens(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    with pytest.raises(StreamlineError, match="holds no token"):
        blockwise(verify_shortlist, tiny_model("llama"), SELECTIONS[:1], FIT, HELD_OUT, [batch], check=False)


class Interrupted(Exception):
    pass


@pytest.mark.sample(1)
@pytest.mark.parametrize("block", [0, 3, 5])
def test_it_goes_on_at_its_block(block: int, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path)
    states, calls = tmp_path / "states", Counter[str]()
    wanted = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, check=False)
    model = open_checkpoint(folder)

    def break_off(*_: Any) -> None:
        calls["block"] += 1
        if calls["block"] > 3:
            raise Interrupted

    handle = find_stack(model)[block].register_forward_hook(break_off)
    with pytest.raises(Interrupted):
        blockwise(verify_shortlist, model, SELECTIONS, *TEXTS, check=False, folder=states)
    handle.remove()
    reads.clear()
    found = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, check=False, folder=states)
    require_bits(found, wanted)
    looked = reads["model.layers.0.mlp.up_proj.weight"] - (block == 0)  # for the fingerprint
    again = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] - looked for k in range(6)}
    assert again == {k: int(k >= block) + (k == 5) for k in range(6)}
    assert not states.exists()


def require_bits(found: list[VerifiedSelection], wanted: list[VerifiedSelection]) -> None:
    assert numbers(found) == numbers(wanted)
    for one, other in zip(weights(found), weights(wanted), strict=True):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("number", "after"), [(0, False), (3, True), (5, False), (11, True)])
def test_it_goes_on_between_a_place_and_its_windows(
    number: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the file with the sums of a window and a part is there, and after it."""
    folder, _ = written(tmp_path)
    wanted = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, check=False)
    original, saved = blockwise_source.write_file, Counter[str]()

    def breaking_off(*args: Any) -> None:
        saved["files"] += 1
        if after:
            original(*args)
        if saved["files"] == number + 1:
            raise Interrupted
        if not after:
            original(*args)

    monkeypatch.setattr(blockwise_source, "write_file", breaking_off)
    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}
    with pytest.raises(Interrupted):
        blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, **options)
    found = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, **options)
    require_bits(found, wanted)
    assert not (tmp_path / "states").exists()


def test_states_stay_until_the_result_of_a_step_is_written(tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path)
    wanted = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, check=False)

    def verify(source: BlockwiseSource, write: Any) -> list[VerifiedSelection]:
        return source.cached("verify", lambda: verify_shortlist(source, SELECTIONS, *TEXTS), write, lambda file: None)

    def break_off(judged: list[VerifiedSelection], file: Path) -> None:
        require_bits(judged, wanted)
        raise Interrupted

    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}
    with pytest.raises(Interrupted):
        blockwise(verify, open_checkpoint(folder), break_off, **options)
    model = open_checkpoint(folder)
    reads.clear()
    found = blockwise(verify, model, lambda judged, file: file.write_text(""), **options)
    require_bits(found, wanted)
    looked = reads["model.layers.0.mlp.up_proj.weight"]  # for the fingerprints
    assert all(reads[f"model.layers.{k}.mlp.up_proj.weight"] == looked for k in range(5)), "no block is run again"
    assert not (tmp_path / "states").exists()


def test_another_kind_or_shortlist_is_not_gone_on_with(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}

    def verify_and_break_off(source: BlockwiseSource, *args: Any, **given: Any) -> None:
        source.cached("verify", lambda: verify_shortlist(source, *args, **given), break_off, break_off)

    def break_off(*_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        blockwise(verify_and_break_off, open_checkpoint(folder), SELECTIONS[:2], *TEXTS, **options)
    with pytest.raises(StreamlineError, match="candidates was .*LinearReplacement.* and is .*NoneType"):
        given = {"replacement": NoneConfig(), **options}
        blockwise(verify_and_break_off, open_checkpoint(folder), SELECTIONS[:2], *TEXTS, **given)
    with pytest.raises(StreamlineError, match=r"\[\[0.*2\].*\[2.*4\]\]"):
        blockwise(verify_and_break_off, open_checkpoint(folder), SELECTIONS[1:3], *TEXTS, **options)


def test_a_candidate_without_finite_logits_comes_last(tmp_path: Path) -> None:
    class Exploding(nn.Module):
        def start_at(self, map_: torch.Tensor) -> None:
            pass

        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state * torch.inf

    folder, _ = written(tmp_path)
    register_kind("test-exploding", lambda features: Exploding())
    with pytest.raises(StreamlineError, match=r"6 selections.*finite outputs"):
        blockwise(
            verify_shortlist,
            open_checkpoint(folder),
            SELECTIONS,
            *TEXTS,
            replacement=parse_replacement("test-exploding"),
        )
    fitting: Any = sys.modules["streamline_hooks.repair.fit"]
    solve = fitting.solve_window

    def solved(work: Any, window: range, *parts: Any) -> Any:
        repair = solve(work, window, *parts)
        if window == range(2, 4):
            nn.init.constant_(repair.replacement_module.projection.weight, torch.inf)
        return repair

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "solve_window", solved)
        found = blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS)
    assert found[-1].windows == (range(2, 4),)
    assert all(one.distance < 100 for one in found[:-1])


@pytest.mark.parametrize(("family", "kind"), [("llama", "mlp:width=8,linear=false"), ("gpt2", "feed_forward:width=8")])
def test_modules_that_hold_no_map_are_fitted_as_in_memory(family: str, kind: str, tmp_path: Path) -> None:
    folder, whole = written(tmp_path, family)
    wanted = verify_shortlist(whole, SELECTIONS, *TEXTS, replacement=parse_replacement(kind))
    options: dict[str, Any] = {"replacement": parse_replacement(kind), "memory": 4000}
    require_same(blockwise(verify_shortlist, open_checkpoint(folder), SELECTIONS, *TEXTS, **options), wanted)


INHERITED = [Selection((window,), score=float(k)) for k, window in enumerate([range(0, 3), range(1, 4), range(3, 6)])]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "block", torch.float32),
        ("llama", "block:count=2,solve=false", torch.bfloat16),
        ("gpt2", "block:count=2", torch.float32),
        ("llama", "silenced", torch.float32),
        ("qwen3", "merged:weight=0.5", torch.float32),
        ("gemma3", "merged:solve", torch.bfloat16),
    ],
)
def test_inherited_blocks_are_fitted_and_judged_as_in_memory(
    family: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, _ = written(tmp_path, family, dtype)
    wanted = verify_shortlist(load(folder, dtype="auto"), INHERITED, *TEXTS, replacement=parse_replacement(kind))
    model = open_checkpoint(folder)
    options: dict[str, Any] = {"replacement": parse_replacement(kind), "memory": 4000}
    found = blockwise(verify_shortlist, model, INHERITED, *TEXTS, **options)
    require_same(found, wanted)
    assert all(on_disk(model)) and len(find_stack(model)) == 6
    for module in [part for one in found for repair in one.repairs for part in repair.replacement_module.modules()]:  # type: ignore[union-attr]
        assert not hasattr(module, "_hf_hook") and not any(p.is_meta for p in module.parameters())


SEVERAL = [
    Selection((range(0, 1), range(2, 4))),
    Selection((range(0, 1), range(3, 4), range(5, 6))),
    Selection((range(2, 4),)),
    Selection((range(1, 3), range(4, 6))),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "linear", torch.float32),
        ("gemma3", "none", torch.bfloat16),
        ("gpt2", "swiglu:width=8", torch.float32),
    ],
)
def test_several_windows_are_fitted_and_judged_as_in_memory(
    family: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Later windows on the model in which those before them are replaced; one ends with the stack, one is its start."""
    folder, _ = written(tmp_path, family, dtype)
    wanted = verify_shortlist(load(folder, dtype="auto"), SEVERAL, *TEXTS, replacement=parse_replacement(kind))
    model = open_checkpoint(folder)
    options: dict[str, Any] = {"replacement": parse_replacement(kind), "memory": 4000}
    found = blockwise(verify_shortlist, model, SEVERAL, *TEXTS, **options)
    require_same(found, wanted)
    assert len({one.distance for one in found}) == len(SEVERAL)
    assert all(on_disk(model)) and len(find_stack(model)) == 6
    trials = [Trial(one, tuple(repair.replacement_module for repair in one.repairs)) for one in found]
    mine = blockwise(trial_perplexities, model, VALIDATION, trials)
    theirs = trial_perplexities(find_stack(load(folder, dtype="auto")), VALIDATION, trials)
    for one, other in zip([mine[0], *mine[1]], [theirs[0], *theirs[1]], strict=True):
        assert one.tokens == other.tokens and one.nll == pytest.approx(other.nll, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("block", [1, 3])
def test_several_windows_go_on(block: int, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    wanted = blockwise(verify_shortlist, open_checkpoint(folder), SEVERAL, *TEXTS, check=False)
    calls = Counter[int]()
    for limit in (3, 9, 12):
        model = open_checkpoint(folder)
        calls.clear()

        def break_off(*_: Any, limit: int = limit) -> None:
            calls.update([block])
            if calls[block] > limit:
                raise Interrupted

        find_stack(model)[block].register_forward_hook(break_off)
        with pytest.raises(Interrupted):
            blockwise(verify_shortlist, model, SEVERAL, *TEXTS, check=False, folder=tmp_path / "states")
    found = blockwise(
        verify_shortlist, open_checkpoint(folder), SEVERAL, *TEXTS, check=False, folder=tmp_path / "states"
    )
    require_bits(found, wanted)
    assert not (tmp_path / "states").exists()


def test_an_error_in_judging_that_is_kept_leaves_no_surgery_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is a model of one block, which must not stay one for as long as the error is kept."""
    folder, _ = written(tmp_path, "llama", torch.float32)
    model = open_checkpoint(folder)
    monkeypatch.setattr("streamline_hooks.evaluation.candidates.sum_distance", lambda *logits: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        blockwise(verify_shortlist, model, SELECTIONS[:2], *TEXTS)
    assert kept.value.__traceback__ is not None and torch.is_grad_enabled()
    assert len(find_stack(model)) == 6


def test_candidates_with_another_option_of_equal_weights_are_not_gone_on_with(tmp_path: Path) -> None:
    """An activation has no weights, and a network that starts at the closed form is that map with each of them."""
    folder, _ = written(tmp_path)
    given: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}

    def verify_and_break_off(source: BlockwiseSource, *args: Any, **options: Any) -> None:
        source.cached("verify", lambda: verify_shortlist(source, *args, **options), break_off, break_off)

    def break_off(*_: Any) -> None:
        raise Interrupted

    kinds = [parse_replacement(f"mlp:width=8,activation={name}") for name in ("relu", "silu")]
    with pytest.raises(Interrupted):
        blockwise(verify_and_break_off, open_checkpoint(folder), SELECTIONS[:2], *TEXTS, replacement=kinds[0], **given)
    with pytest.raises(StreamlineError, match=r"candidates was .*MLPReplacement"):
        blockwise(verify_and_break_off, open_checkpoint(folder), SELECTIONS[:2], *TEXTS, replacement=kinds[1], **given)

"""Block by block, windows are repaired and judged as in memory, each block read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import streamline_hooks.selection
from streamline_hooks import StreamlineError, UnsupportedSurgery, find_stack, load
from streamline_hooks.blockwise import BlockwisePass, judging, open_checkpoint, perplexity_of_candidates, verified
from streamline_hooks.blockwise import verifying as module
from streamline_hooks.blockwise.judging import head_of
from streamline_hooks.calibration import packed_batches
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.evaluation.perplexity import perplexity_of_candidates as perplexity_in_memory
from streamline_hooks.repair import NoneConfig
from streamline_hooks.selection import Selection, VerifiedSelection
from tests.blockwise.checkpoints import calibration, on_disk, reads, written  # noqa: F401
from tests.repair.own_kinds import register_kind
from tests.tiny_models import left_padded, padded, tiny_model, tokens

WINDOWS = [range(0, 2), range(2, 4), range(1, 4), range(4, 6), range(3, 4), range(2, 5)]
SELECTIONS = [Selection((window,), score=float(k)) for k, window in enumerate(WINDOWS)]
FIT, HELD_OUT = calibration(), [tokens(3, 9, seed=7), padded([8, 4], "right")]
VALIDATION = [left_padded(2, 11, seed=3), tokens(3, 7, seed=4)]
TEXTS = (FIT, HELD_OUT, VALIDATION)


def numbers(judged: list[VerifiedSelection]) -> list[tuple[Any, ...]]:
    repairs = [one.repairs[0] for one in judged]
    return [
        (one.windows, one.score, one.distance, r.removal_error, r.repaired_error, r.ridge)
        for one, r in zip(judged, repairs, strict=True)
    ]


def weights(judged: list[VerifiedSelection]) -> list[dict[str, torch.Tensor]]:
    stand_ins = [one.repairs[0].stand_in for one in judged]
    return [stand_in.state_dict() if isinstance(stand_in, nn.Module) else {} for stand_in in stand_ins]


def require_same(found: list[VerifiedSelection], wanted: list[VerifiedSelection]) -> None:
    for mine, theirs in zip(numbers(found), numbers(wanted), strict=True):
        assert mine[0] == theirs[0]
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-5)
    for one, other in zip(weights(found), weights(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


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
    wanted = streamline_hooks.selection.verified(whole, SELECTIONS, *TEXTS, replacement=parse_replacement(kind))
    model = open_checkpoint(folder)
    require_same(verified(model, SELECTIONS, *TEXTS, replacement=parse_replacement(kind), memory=4000), wanted)
    assert all(on_disk(model)) and len({one.distance for one in wanted}) == len(WINDOWS)


def test_each_block_is_read_once_and_the_last_one_twice(tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path)
    model = open_checkpoint(folder)
    verified(model, SELECTIONS[1:3], *TEXTS, check=False)
    assert {name.split(".")[2] for name in reads if ".layers." in name} == set("012345")
    assert {n for name, n in reads.items() if ".layers." in name and ".5." not in name} == {1}
    assert {n for name, n in reads.items() if ".5." in name} == {2} and reads["lm_head.weight"] == 1


def test_the_text_to_fit_on_stops_behind_the_last_window(tmp_path: Path) -> None:
    model = open_checkpoint(written(tmp_path)[0])
    calls: Counter[int] = Counter()
    for k, block in enumerate(find_stack(model).blocks):
        block.register_forward_hook(lambda *_, k=k: calls.update([k]))
    verified(model, SELECTIONS[1:3], *TEXTS, check=False)
    texts, judged = sum(map(len, TEXTS)), len(VALIDATION)
    at_end = calls.pop(5)
    assert calls == {0: texts, 1: texts, 2: texts, 3: texts, 4: 3 * judged}, "the two windows end at 4"
    assert at_end > 3 * judged, "and it runs in vain for what follows it"


@pytest.mark.parametrize("tokens_at_once", [1, 3, 100])
def test_tokens_are_judged_a_few_at_a_time(
    tokens_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = written(tmp_path, "gemma3")
    monkeypatch.setattr(judging, "LOGITS", tokens_at_once * 61 * 4)
    sizes: list[int] = []
    model: Any = open_checkpoint(folder)
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
    found = verified(model, SELECTIONS[:3], *TEXTS, check=False)
    require_same(found, streamline_hooks.selection.verified(whole, SELECTIONS[:3], *TEXTS))
    assert max(sizes[9:]) == min(tokens_at_once, 11), "the first look whether a token is judged by itself"


def test_what_looks_at_several_tokens_behind_the_blocks_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    model: Any = open_checkpoint(folder)
    model.model.norm.register_forward_hook(lambda _, __, output: output - output.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedSurgery, match=r"what follows.*other logits"):
        verified(model, SELECTIONS[:1], *TEXTS, check=False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_is_what_the_model_says(family: str, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, whole = written(tmp_path, family)
    model, batch = open_checkpoint(folder), tokens(2, 9)
    with BlockwisePass(model, [batch]) as states:
        list(states)
        reads.clear()
        with head_of(states.stack) as head:
            said = torch.stack([head(states.read(6, 0)[row]) for row in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(said, whole(batch).logits, rtol=1e-5, atol=1e-5)
    assert set(reads.values()) == {1}, "the last block and the head stay until the end"
    assert all(on_disk(model)) and len(find_stack(model)) == 6


def test_perplexity_is_that_in_memory(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    best = verified(open_checkpoint(folder), SELECTIONS[:2], *TEXTS)
    candidates = [Candidate(one.windows[0], one.repairs[0].stand_in) for one in best]  # type: ignore[arg-type]
    candidates += [Candidate(range(1, 3)), Candidate(range(4, 6)), Candidate(range(0, 1))]
    found = perplexity_of_candidates(open_checkpoint(folder), calibration(), candidates, memory=4000)
    wanted = perplexity_in_memory(whole, calibration(), candidates)
    for one, other in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        assert one.tokens == other.tokens and one.nll == pytest.approx(other.nll, rel=1e-6)


def test_perplexity_of_packed_rows_is_that_in_memory(tmp_path: Path) -> None:
    folder, whole = written(tmp_path)
    rows = packed_batches([[[5, 6, 7], [8, 9, 10, 11]], [[12, 13, 14, 15, 16, 17]]], batch_size=2)
    candidates = [Candidate(range(2, 4))]
    found = perplexity_of_candidates(open_checkpoint(folder), rows, candidates, memory=4000)
    wanted = perplexity_in_memory(whole, rows, candidates)
    for mine, theirs in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        assert mine.tokens == theirs.tokens == 2 + 3 + 5
        assert mine.nll == pytest.approx(theirs.nll, rel=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_nothing_but_padding_is_passed_over(row: int) -> None:
    """As in memory: in the first row, where it is looked whether a token is judged by itself, or in another."""
    model, batch = tiny_model("llama"), left_padded(3, 10)
    batch["attention_mask"][row] = 0
    candidates = [Candidate(range(1, 3))]
    original, others = perplexity_of_candidates(model, [batch], candidates)
    wanted, theirs = perplexity_in_memory(model, [batch], candidates)
    for one, other in zip([original, *others], [wanted, *theirs], strict=True):
        assert one.tokens == other.tokens > 0 and one.nll == pytest.approx(other.nll, rel=1e-5)
    texts = ([tokens(3, 9)], [tokens(3, 9, seed=1)], [batch])
    require_same(
        verified(model, SELECTIONS[:2], *texts), streamline_hooks.selection.verified(model, SELECTIONS[:2], *texts)
    )


def test_text_of_nothing_but_padding_is_nothing_to_judge_on() -> None:
    batch = {"input_ids": tokens(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    with pytest.raises(StreamlineError, match="holds no token"):
        verified(tiny_model("llama"), SELECTIONS[:1], FIT, HELD_OUT, [batch], check=False)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("block", [0, 2, 3, 4, 5])
def test_it_goes_on_at_its_block(block: int, tmp_path: Path, reads: Counter[str]) -> None:  # noqa: F811
    folder, _ = written(tmp_path)
    states, calls = tmp_path / "states", Counter[str]()
    wanted = verified(open_checkpoint(folder), SELECTIONS, *TEXTS, check=False)
    model = open_checkpoint(folder)

    def break_off(*_: Any) -> None:
        calls["block"] += 1
        if calls["block"] > 3:
            raise Interrupted

    handle = find_stack(model)[block].register_forward_hook(break_off)
    with pytest.raises(Interrupted):
        verified(model, SELECTIONS, *TEXTS, check=False, folder=states)
    handle.remove()
    reads.clear()
    found = verified(open_checkpoint(folder), SELECTIONS, *TEXTS, check=False, folder=states)
    require_bits(found, wanted)
    looked = reads["model.layers.0.mlp.up_proj.weight"] - (block == 0)  # for the fingerprint
    again = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] - looked for k in range(6)}
    assert again == {k: int(k >= block) + (k == 5) for k in range(6)}
    assert not states.exists()


def require_bits(found: list[VerifiedSelection], wanted: list[VerifiedSelection]) -> None:
    assert numbers(found) == numbers(wanted)
    for one, other in zip(weights(found), weights(wanted), strict=True):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["linear", "none"])
@pytest.mark.parametrize("number", [0, 1, 3, 5])
@pytest.mark.parametrize("after", [False, True])
def test_it_goes_on_between_a_place_and_its_windows(
    kind: str, number: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the file of a window is there, which says that its states are, and after it."""
    folder, _ = written(tmp_path)
    wanted = verified(open_checkpoint(folder), SELECTIONS, *TEXTS, replacement=parse_replacement(kind), check=False)
    original, saved = module.save_repair, Counter[str]()

    def breaking_off(*args: Any) -> None:
        saved["files"] += 1
        if after:
            original(*args)
        if saved["files"] == number + 1:
            raise Interrupted
        if not after:
            original(*args)

    monkeypatch.setattr(module, "save_repair", breaking_off)
    with pytest.raises(Interrupted):
        verified(
            open_checkpoint(folder),
            SELECTIONS,
            *TEXTS,
            replacement=parse_replacement(kind),
            check=False,
            folder=tmp_path / "states",
        )
    found = verified(
        open_checkpoint(folder),
        SELECTIONS,
        *TEXTS,
        replacement=parse_replacement(kind),
        check=False,
        folder=tmp_path / "states",
    )
    require_bits(found, wanted)


def test_it_goes_on_with_the_judgement(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    wanted = verified(open_checkpoint(folder), SELECTIONS, *TEXTS, check=False)
    seen: list[list[VerifiedSelection]] = []

    def break_off(judged: list[VerifiedSelection]) -> None:
        seen.append(judged)
        raise Interrupted

    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}
    with pytest.raises(Interrupted):
        verified(open_checkpoint(folder), SELECTIONS, *TEXTS, before_done=break_off, **options)
    require_bits(seen[0], wanted)
    require_bits(verified(open_checkpoint(folder), SELECTIONS, *TEXTS, **options), wanted)


def test_another_kind_or_shortlist_is_not_gone_on_with(tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    options: dict[str, Any] = {"check": False, "folder": tmp_path / "states"}

    def break_off(_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        verified(open_checkpoint(folder), SELECTIONS[:2], *TEXTS, before_done=break_off, **options)
    with pytest.raises(StreamlineError, match="kind was linear and is none"):
        verified(open_checkpoint(folder), SELECTIONS[:2], *TEXTS, replacement=NoneConfig(), **options)
    with pytest.raises(StreamlineError, match=r"\[\[0.*2\].*\[2.*4\]\]"):
        verified(open_checkpoint(folder), SELECTIONS[1:3], *TEXTS, **options)


def test_a_candidate_without_finite_logits_comes_last(tmp_path: Path) -> None:
    class Exploding(nn.Module):
        def start_at(self, map_: torch.Tensor) -> None:
            pass

        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state * torch.inf

    folder, _ = written(tmp_path)
    register_kind("test-exploding", lambda features: Exploding())
    with pytest.raises(StreamlineError, match=r"6 shortlisted.*finite logits"):
        verified(open_checkpoint(folder), SELECTIONS, *TEXTS, replacement=parse_replacement("test-exploding"))
    build = module.solve_window

    def solved(stack: Any, kind: Any, window: range, *parts: Any) -> Any:
        repair = build(stack, kind, window, *parts)
        if window == range(2, 4):
            nn.init.constant_(repair.stand_in.projection.weight, torch.inf)
        return repair

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "solve_window", solved)
        found = verified(open_checkpoint(folder), SELECTIONS, *TEXTS)
    assert found[-1].windows == (range(2, 4),)
    assert all(one.distance < 100 for one in found[:-1])


@pytest.mark.parametrize("kind", ["block", "silenced", "folded", "scale", "feed_forward", "mlp:linear=false"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedSurgery, match=rf"'{kind}'.*least-squares map"):
        verified(tiny_model("llama"), SELECTIONS, *TEXTS, replacement=parse_replacement(kind))


def test_other_selections_are_refused() -> None:
    for selection in (Selection((range(0, 1), range(2, 3))), Selection((), ((0, "mlp"),))):
        with pytest.raises(StreamlineError, match="not a single window"):
            verified(tiny_model("llama"), [selection], *TEXTS)
    with pytest.raises(StreamlineError, match=r"2 windows.*1 of.*give"):
        verified(tiny_model("llama"), [SELECTIONS[0]] * 2, *TEXTS)
    with pytest.raises(StreamlineError, match="Got 0 windows"):
        verified(tiny_model("llama"), [], *TEXTS)


def test_an_error_in_judging_that_is_kept_leaves_no_surgery_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is a model of one block, which must not stay one for as long as the error is kept."""
    folder, _ = written(tmp_path, "llama", torch.float32)
    model = open_checkpoint(folder)
    monkeypatch.setattr(judging, "summed_kl", lambda *logits: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        verified(model, SELECTIONS[:2], *TEXTS)
    assert kept.value.__traceback__ is not None and torch.is_grad_enabled()
    assert len(find_stack(model)) == 6

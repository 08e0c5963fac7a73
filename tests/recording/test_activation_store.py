"""A store contains each real token once, in order, with the state that the block returned."""

from __future__ import annotations

import builtins
import gc
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from streamline_hooks import HiddenStateRecorder, StreamlineError, find_stack
from streamline_hooks.recording import ActivationStore, Intervention, Scale
from streamline_hooks.surgery import bypassing
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.tiny_models import BLOCKS, WIDTH, padded, tiny_model, tokens

LENGTHS = ([7, 4], [5], [3, 6, 2], [8, 1])
DOCUMENTS = sum(map(len, LENGTHS))
TOTAL = sum(map(sum, LENGTHS))
COLUMNS = {"tokens", "positions", "document_ids"}


def batches_of(side: str = "right") -> list[dict[str, Tensor]]:
    """Return batches in which every sequence has other tokens."""
    batches = []
    for number, lengths in enumerate(LENGTHS):
        batch = padded(lengths, side)
        fresh = tokens(*batch["input_ids"].shape, seed=number)
        batches.append({**batch, "input_ids": fresh * batch["attention_mask"]})
    return batches


def sequences(side: str = "right") -> list[Tensor]:
    """Return the token ids of each sequence, without padding."""
    return [ids[mask.bool()] for b in batches_of(side) for ids, mask in zip(*b.values(), strict=True)]


def content(store: ActivationStore) -> dict[str, Tensor]:
    shards = list(store)
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store") / "states"
    model = tiny_model("llama")
    sites = ["block.input", "block.output"]
    return ActivationStore(folder, shard_bytes=3000).record(model, batches_of("left"), blocks=[2, -1], sites=sites)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_row_is_the_state_of_its_token_run_without_padding(family: str, side: str, tmp_path: Path) -> None:
    """The tokens, positions and documents of the rows identify the token whose state is computed alone."""
    model = tiny_model(family)
    stored = content(ActivationStore(tmp_path / "s").record(model, batches_of(side), blocks=[0, 3], dtype=None))
    assert len(stored["tokens"]) == TOTAL
    row = 0
    for document, ids in enumerate(sequences(side)):
        with torch.no_grad(), HiddenStateRecorder(model, [0, 3]) as record:
            model(ids[None])
        rows = slice(row, row + len(ids))
        assert torch.equal(stored["tokens"][rows], ids)
        assert stored["positions"][rows].tolist() == list(range(len(ids)))
        assert stored["document_ids"][rows].tolist() == [document] * len(ids)
        for k in (0, 3):
            torch.testing.assert_close(stored[f"block.output.{k}"][rows], record.outputs[k][0][0])
        row += len(ids)


def test_states_are_the_blocks_own_bit_for_bit(store: ActivationStore) -> None:
    """The output of the last block is the one before the final norm."""
    model, expected = tiny_model("llama"), {}
    blocks = find_stack(model).blocks
    calls: dict[str, list[Tensor]] = {}
    for k in (2, BLOCKS - 1):
        name = f"block.input.{k}"
        blocks[k].register_forward_pre_hook(lambda m, args, name=name: calls.setdefault(name, []).append(args[0]))
        name = f"block.output.{k}"
        blocks[k].register_forward_hook(lambda m, args, out, name=name: calls.setdefault(name, []).append(out))
    with torch.no_grad():
        for batch in batches_of("left"):
            model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=False)
    masks = [batch["attention_mask"].bool() for batch in batches_of("left")]
    expected = {n: torch.cat([s[m] for s, m in zip(states, masks, strict=True)]) for n, states in calls.items()}
    stored = content(store)
    assert expected.keys() == stored.keys() - COLUMNS
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_contributions_and_heads_are_stored_of_the_same_tokens(tmp_path: Path) -> None:
    """What the branches add to the input of a block is its output, and the heads give what the attention adds."""
    model = tiny_model("llama")
    sites = ["block.input", "attention.output", "mlp.output", "block.output", "attention.heads"]
    stored = content(ActivationStore(tmp_path / "s").record(model, batches_of("left"), blocks=[2, 4], sites=sites))
    for k in (2, 4):
        added = stored[f"block.input.{k}"] + stored[f"attention.output.{k}"] + stored[f"mlp.output.{k}"]
        torch.testing.assert_close(added, stored[f"block.output.{k}"])
        projected = find_stack(model).blocks[k].self_attn.o_proj(stored[f"attention.heads.{k}"]).detach()
        torch.testing.assert_close(projected, stored[f"attention.output.{k}"])


def test_bfloat16_is_the_rounded_float32_state(store: ActivationStore, tmp_path: Path) -> None:
    rounded = ActivationStore(tmp_path / "s").record(
        tiny_model("llama"), batches_of("left"), blocks=[2], dtype=torch.bfloat16
    )
    assert rounded.columns == {"block.output.2": {"dtype": "bfloat16", "features": WIDTH}}
    exact = content(store)["block.output.2"]
    assert exact.dtype == torch.float32
    assert torch.equal(content(rounded)["block.output.2"], exact.bfloat16())


@pytest.mark.parametrize("shard_bytes", [1, 700, 1500, 10**6])
def test_content_does_not_depend_on_the_size_of_a_shard(shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = ActivationStore(tmp_path / "a").record(model, batches_of(), blocks=[1])
    parts = ActivationStore(tmp_path / "b", shard_bytes=shard_bytes).record(model, batches_of(), blocks=[1])
    assert equal(content(whole), content(parts))
    assert [len(shard["tokens"]) for shard in whole] == [TOTAL]
    assert len(list(parts)) == {1: 4, 700: 4, 1500: 4, 10**6: 1}[shard_bytes]


def test_rows_by_index_equal_the_rows_of_the_shards(store: ActivationStore) -> None:
    everything = content(store)
    ends = [0]
    for shard in store:
        ends.append(ends[-1] + len(shard["tokens"]))
    assert len(ends) > 3
    for start in {*ends, *(end + 1 for end in ends), *(end - 1 for end in ends)}:
        for stop in {*ends, *(end + 1 for end in ends)}:
            rows = {name: value[start:stop] for name, value in everything.items()}
            assert equal(store[start:stop], rows), (start, stop)
    for row in (0, 5, ends[1] - 1, ends[1], -1, -TOTAL):
        assert equal(store[row], {name: value[row] for name, value in everything.items()})
        assert equal(store[torch.tensor(row)], store[row])
    with pytest.raises(IndexError):
        store[TOTAL]


def test_order_of_batches_determines_document_ids(tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), batches_of()
    swapped = content(ActivationStore(tmp_path / "s").record(model, batches[::-1], blocks=[1]))
    ids = {d: swapped["tokens"][swapped["document_ids"] == d] for d in range(DOCUMENTS)}
    expected = [ids[mask.bool()] for b in batches[::-1] for ids, mask in zip(*b.values(), strict=True)]
    assert all(torch.equal(ids[d], expected[d]) for d in range(DOCUMENTS))


def test_document_ids_of_the_caller_are_stored_per_sequence_and_per_token(tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), batches_of()
    ids = [100 * number + torch.arange(len(batch["input_ids"])) for number, batch in enumerate(batches)]
    per_row = content(ActivationStore(tmp_path / "a").record(model, batches, blocks=[1], document_ids=ids))
    wide = [i[:, None].expand(b["input_ids"].shape) for i, b in zip(ids, batches, strict=True)]
    per_token = content(ActivationStore(tmp_path / "b").record(model, batches, blocks=[1], document_ids=wide))
    expected = [
        i for n, lengths in enumerate(LENGTHS) for r, length in enumerate(lengths) for i in [100 * n + r] * length
    ]
    assert per_row["document_ids"].tolist() == per_token["document_ids"].tolist() == expected
    with pytest.raises(StreamlineError, match="3 tensors for 4 batches"):
        ActivationStore(tmp_path / "c").record(model, batches, document_ids=ids[:3])


def test_restarts_of_positions_in_a_packed_row_are_documents(tmp_path: Path) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 0, 1]])
    batch = {"input_ids": tokens(3, 5), "position_ids": positions}
    stored = content(ActivationStore(tmp_path / "s").record(tiny_model("llama"), [batch, batch], blocks=[1]))
    assert stored["positions"].tolist() == 2 * positions.flatten().tolist()
    once = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 5]
    assert stored["document_ids"].tolist() == once + [i + 6 for i in once]


def test_padding_before_the_positions_of_the_caller_is_no_document(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = {
        "input_ids": tokens(2, 4),
        "attention_mask": mask,
        "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]),
    }
    stored = content(ActivationStore(tmp_path / "s").record(tiny_model("llama"), [batch], blocks=[1]))
    assert stored["document_ids"].tolist() == [0, 0, 1, 1, 1, 1]


class Interrupt(Exception):
    pass


def interrupted(
    folder: Path, after: int, change: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> ActivationStore:
    """Record, inside a context of the model, until the forward pass of a batch is interrupted."""
    model, calls = tiny_model("llama"), []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Interrupt

    find_stack(model)[0].register_forward_pre_hook(count)
    store = ActivationStore(folder, shard_bytes=1500)
    with pytest.raises(Interrupt), change(model):
        store.record(model, batches_of(), blocks=[1])
    return store


@pytest.mark.parametrize("after", range(len(LENGTHS)))
@pytest.mark.parametrize("again", [True, False], ids=["same object", "new object"])
def test_a_run_continues_to_the_files_of_an_uninterrupted_one(after: int, again: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ActivationStore(tmp_path / "whole", shard_bytes=1500).record(model, batches_of(), blocks=[1])
    store = interrupted(tmp_path / "parts", after)
    assert not store.complete and store.batches <= after
    skipped, runs = store.batches, []
    find_stack(model)[0].register_forward_hook(lambda *_: runs.append(1))
    if not again:
        store = ActivationStore(tmp_path / "parts", shard_bytes=1500)
    store.record(model, batches_of(), blocks=[1])
    compared = int(skipped > 0)  # the first batch
    assert store.complete and len(runs) == len(LENGTHS) - skipped + compared
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    store.record(model, batches_of(), blocks=[1])
    assert len(runs) == len(LENGTHS) - skipped + compared + 1


def test_an_incomplete_store_is_not_read_unless_requested(tmp_path: Path) -> None:
    store = interrupted(tmp_path / "s", 3)
    assert store.batches == 2
    for read in (list, lambda s: s[0], lambda s: s.dataset()):
        with pytest.raises(StreamlineError, match="interrupted after 2 batches"):
            read(ActivationStore(tmp_path / "s"))
    partial = ActivationStore(tmp_path / "s", partial=True)
    assert len(partial) == len(content(partial)["tokens"]) == sum(sum(lengths) for lengths in LENGTHS[:2])


def other_weights() -> nn.Module:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    return model


def other_token() -> list[dict[str, Tensor]]:
    batches = batches_of()
    batches[-1]["input_ids"][0, 0] += 1
    return batches


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", {"model": other_weights}),
        ("data", {"batches": other_token}),
        ("data", {"batches": lambda: batches_of()[::-1]}),
        ("data", {"batches": lambda: batches_of()[:-1]}),
        ("data", {"document_ids": lambda: [torch.zeros(len(lengths), dtype=torch.long) for lengths in LENGTHS]}),
        ("blocks", {"blocks": lambda: [2]}),
        ("sites", {"sites": lambda: ["block.input"]}),
        ("dtype", {"dtype": lambda: torch.float16}),
    ],
)
@pytest.mark.parametrize("after", [3, None], ids=["interrupted", "complete"])
def test_the_folder_of_another_run_is_refused(
    name: str, change: dict[str, Any], after: int | None, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"model": tiny_model("llama"), "batches": batches_of(), "blocks": [1]}
    if after is None:
        ActivationStore(tmp_path / "s").record(**arguments)
    else:
        interrupted(tmp_path / "s", after)
    before = files(tmp_path / "s")
    with pytest.raises(StreamlineError, match=rf"belongs to another run: {name} is .* there and .* here"):
        ActivationStore(tmp_path / "s").record(**arguments | {key: make() for key, make in change.items()})
    assert files(tmp_path / "s") == before


CHANGES: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "bypass": lambda model: bypassing(model, range(1)),
    "intervention": lambda model: Intervention(model, {("block.output", 0): Scale(1.1)}),
    "hook": lambda model: find_stack(model)[1].register_forward_hook(lambda module, args, output: output * 1.1),
}


@pytest.mark.parametrize("is_changed", [False, True], ids=["changed later", "changed first"])
@pytest.mark.parametrize("after", [3, None], ids=["interrupted", "complete"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_states_that_a_hook_changes_are_not_mixed_with_others(
    change: Callable[[nn.Module], AbstractContextManager[Any]], after: int | None, is_changed: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    folder = tmp_path / "s"

    def record(*, changed: bool) -> None:
        with change(model) if changed else nullcontext():
            ActivationStore(folder, shard_bytes=1500).record(model, batches_of(), blocks=[1])

    if after is None:
        record(changed=is_changed)
    else:
        interrupted(folder, after, change if is_changed else nullcontext)
    before = files(folder)
    with pytest.raises(StreamlineError, match=r"other states of the first batch: those of block.output.1 differ"):
        record(changed=not is_changed)
    assert files(folder) == before
    record(changed=is_changed)
    assert ActivationStore(folder).complete


def test_rounding_and_a_first_batch_of_padding_do_not_stop_a_run(tmp_path: Path) -> None:
    """Rounding changes the experts of single tokens, and thereby their states by more than a tenth."""
    model = tiny_of_type("mixtral", dtype=torch.bfloat16)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        ActivationStore(tmp_path / "experts").record(model, batches_of(), blocks=[2])
    empty = {"input_ids": tokens(1, 3), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}
    for _ in range(2):
        ActivationStore(tmp_path / "padding").record(tiny_model("llama"), [empty, *batches_of()], blocks=[2])


def test_other_metadata_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ActivationStore(tmp_path / "s", metadata={"steered": [3]}).record(model, batches_of(), blocks=[1])
    with pytest.raises(StreamlineError, match="metadata is"):
        ActivationStore(tmp_path / "s").record(model, batches_of(), blocks=[1])
    with pytest.raises(StreamlineError, match="cannot be written as JSON"):
        ActivationStore(tmp_path / "t", metadata={"model": model})


def test_files_of_others_are_neither_replaced_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StreamlineError, match="not created by an ActivationStore"):
        ActivationStore(tmp_path)
    interrupted(tmp_path / "s", 3)
    foreign = tmp_path / "s" / "shard-00002.safetensors"
    foreign.write_bytes(b"mine")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(StreamlineError, match="is not a shard of this run"):
        ActivationStore(tmp_path / "s", shard_bytes=1500).record(tiny_model("llama"), batches_of(), blocks=[1])
    assert foreign.read_bytes() == b"mine" and (tmp_path / "s" / "notes.txt").read_text() == "mine"
    foreign.unlink()
    store = ActivationStore(tmp_path / "s", shard_bytes=1500).record(tiny_model("llama"), batches_of(), blocks=[1])
    assert store.complete and (tmp_path / "s" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "half-written"])
def test_a_damaged_last_shard_is_written_again_and_an_earlier_one_refused(damage: str, tmp_path: Path) -> None:
    def spoil(path: Path) -> None:
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    model, folder = tiny_model("llama"), tmp_path / "s"
    ActivationStore(folder, shard_bytes=1500).record(model, batches_of(), blocks=[1])
    before = files(folder)
    spoil(folder / "shard-00003.safetensors")
    with pytest.raises(StreamlineError, match="missing or incomplete"):
        list(ActivationStore(folder))
    ActivationStore(folder, shard_bytes=1500).record(model, batches_of(), blocks=[1])
    assert files(folder) == before
    spoil(folder / "shard-00001.safetensors")
    with pytest.raises(StreamlineError, match="00001.*missing or incomplete"):
        ActivationStore(folder, shard_bytes=1500).record(model, batches_of(), blocks=[1])


def test_exchanged_shards_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "copy"
    shutil.copytree(store.folder, folder)
    first, second = (folder / f"shard-{k:05d}.safetensors" for k in (0, 1))
    first.rename(folder / "x"), second.rename(first), (folder / "x").rename(second)  # type: ignore[func-returns-value]
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"], index["shards"][1]["bytes"] = first.stat().st_size, second.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    for read in (list, lambda s: s[0], lambda s: list(s.dataset())):
        with pytest.raises(StreamlineError, match="has another number"):
            read(ActivationStore(folder))


def rows(value: float) -> tuple[Any, ...]:
    """Arguments of `append`."""
    ids, numbers = torch.arange(3)[None], torch.zeros(1, dtype=torch.long)
    return {"x": torch.full((1, 3, 4), value)}, tokens(1, 3), ids, numbers


def test_boolean_tokens_are_refused(tmp_path: Path) -> None:
    states, ids, positions, documents = rows(1.0)
    with ActivationStore(tmp_path) as store, pytest.raises(StreamlineError, match="torch.bool.*Expected integers"):
        store.append(states, ids > 0, positions, documents)


def test_a_store_that_was_refused_continues_after_another(tmp_path: Path) -> None:
    """The other has replaced the half-written shard."""
    for value in (1.0, 2.0):
        with ActivationStore(tmp_path, shard_bytes=1) as written:
            written.append(*rows(value))
    (tmp_path / "shard-00001.safetensors").write_bytes(b"half")
    first = ActivationStore(tmp_path, shard_bytes=1)
    with pytest.raises(StreamlineError, match="not finite|NaN|nan"), first:
        first.append(*rows(float("nan")))
    for store, value in ((ActivationStore(tmp_path, shard_bytes=1), 2.0), (first, 3.0)):
        with store:
            store.append(*rows(value))
    assert content(ActivationStore(tmp_path))["x"][:, 0].tolist() == [1.0] * 3 + [2.0] * 3 + [3.0] * 3


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, shard_bytes=1) as first, pytest.raises(StreamlineError, match="Another process"):
        with ActivationStore(tmp_path, shard_bytes=1) as second:
            for _ in range(2):
                first.append(*rows(1.0))
            for _ in range(2):
                second.append(*rows(2.0))
    assert (content(ActivationStore(tmp_path))["x"] == 1.0).all()


# append


def test_appended_rows_are_those_of_record(tmp_path: Path, store: ActivationStore) -> None:
    model = tiny_model("llama")
    recorder = HiddenStateRecorder(model, [2, -1])
    with ActivationStore(tmp_path, shard_bytes=3000) as appended, recorder.over(batches_of("left")) as recorded:
        first = 0
        for batch, run in zip(batches_of("left"), recorded, strict=True):
            mask, rows = batch["attention_mask"].bool(), len(batch["input_ids"])
            states = {f"block.input.{k}": run.entering(k) for k in recorder.blocks}
            states |= {f"block.output.{k}": run.leaving(k) for k in recorder.blocks}
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            appended.append(states, batch["input_ids"], positions, first + torch.arange(rows), mask)
            first += rows
            for state in states.values():
                state.zero_()  # the store has its own copy
    assert equal(content(appended), content(store)) and appended.complete


def test_appending_continues_after_the_stored_batches(tmp_path: Path) -> None:
    def run(folder: Path, stop: int) -> None:
        with ActivationStore(folder, shard_bytes=400) as store:
            for number in range(store.batches, 6):
                if number == stop:
                    raise Interrupt
                ids = tokens(2, 3, seed=number)
                states = {"attention.output.3": ids[..., None].expand(2, 3, 4).float()}
                store.append(states, ids, torch.arange(3).expand(2, 3), torch.tensor([2 * number, 2 * number + 1]))

    run(tmp_path / "whole", 9)
    with pytest.raises(Interrupt):
        run(tmp_path / "parts", 4)
    run(tmp_path / "parts", 9)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(ActivationStore(tmp_path / "parts")) == 36


def test_invalid_rows_are_refused(tmp_path: Path) -> None:
    ids, positions, documents = tokens(2, 3), torch.arange(3).expand(2, 3), torch.arange(2)
    state = {"x": torch.zeros(2, 3, 4)}
    store = ActivationStore(tmp_path / "s")
    with pytest.raises(StreamlineError, match="not open"):
        store.append(state, ids, positions, documents)
    with store:
        store.append(state, ids, positions, documents)
        for match, arguments in {
            "positions": (state, ids, torch.arange(3), documents),
            "document_ids": (state, ids, positions, torch.arange(3)),
            "tokens is a torch.float32": (state, ids.float(), positions, documents),
            "one state per token": ({"x": torch.zeros(2, 4, 4)}, ids, positions, documents),
            "under a name other than": ({"tokens": torch.zeros(2, 3, 4)}, ids, positions, documents),
            "mask is": (state, ids, positions, documents, ids),
            "NaN or infinite": ({"x": torch.full((2, 3, 4), torch.nan)}, ids, positions, documents),
            "those of the first batch": ({"x": torch.zeros(2, 3, 5)}, ids, positions, documents),
            "Expected those of the first": ({"y": torch.zeros(2, 3, 4)}, ids, positions, documents),
            "bfloat16": ({"x": torch.zeros(2, 3, 4).bfloat16()}, ids, positions, documents),
        }.items():
            with pytest.raises(StreamlineError, match=match):
                store.append(*arguments)
        padded_state = {"x": torch.zeros(2, 3, 4).index_fill(1, torch.tensor(2), torch.inf)}
        store.append(padded_state, ids, positions, documents, torch.tensor([[True, True, False]] * 2))
    assert len(ActivationStore(tmp_path / "s")) == 6 + 4


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    model, store = tiny_model("llama"), ActivationStore(tmp_path / "s")
    embedded = {"inputs_embeds": torch.zeros(1, 3, WIDTH)}
    for match, batches, options in (
        ("'blocks.output' is unknown.*block.output", batches_of(), {"sites": ["blocks.output"]}),
        ("no input_ids", [embedded], {}),
        ("out of range", batches_of(), {"blocks": [BLOCKS]}),
    ):
        with pytest.raises(StreamlineError, match=match):
            store.record(model, batches, **options)
    assert not (tmp_path / "s").exists()


# Reading as a data set


def keys(rows: Any) -> list[tuple[int, int]]:
    return [(int(row["document_ids"]), int(row["positions"])) for row in rows]


@pytest.mark.parametrize("workers", [0, 1, 3, 7])
def test_workers_read_each_row_once(workers: int, store: ActivationStore) -> None:
    """The store has fewer shards than seven."""
    pytest.importorskip("datasets")
    everything, read = content(store), []
    loader = DataLoader(store.dataset(shuffle_seed=3), batch_size=4, num_workers=workers)
    for batch in loader:
        read += keys([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])
        for document, position, state in zip(
            batch["document_ids"], batch["positions"], batch["block.output.2"], strict=True
        ):
            row = (everything["document_ids"] == document) & (everything["positions"] == position)
            assert torch.equal(everything["block.output.2"][row][0], state)
    assert len(list(store)) == 4
    assert sorted(read) == sorted(keys(store[k] for k in range(TOTAL)))


def test_the_order_depends_on_the_seed_only(store: ActivationStore) -> None:
    pytest.importorskip("datasets")
    stored = keys(store[k] for k in range(TOTAL))
    assert keys(store.dataset()) == stored
    first, again, other = (keys(store.dataset(shuffle_seed=seed)) for seed in (0, 0, 1))
    assert first == again and first != other and first != stored
    assert sorted(first) == sorted(other) == sorted(stored)
    assert keys(ActivationStore(store.folder).dataset(shuffle_seed=0)) == first


def test_columns_are_selected_and_keep_their_dtype(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    store = ActivationStore(tmp_path / "s").record(
        tiny_model("llama"), batches_of(), blocks=[1, 2], dtype=torch.bfloat16
    )
    row = next(iter(store.dataset(columns=["block.output.2", "tokens"])))
    assert row.keys() == {"block.output.2", "tokens"} and row["block.output.2"].dtype == torch.bfloat16
    with pytest.raises(StreamlineError, match="'block.output.3' is unknown.*Did you mean"):
        store.dataset(columns=["block.output.3"])


def test_without_datasets_the_error_names_the_extra(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StreamlineError, match=r"streamline_hooks\[datasets\]"):
        store.dataset()
    assert len(list(store)) == 4


# Space


def test_a_disk_that_is_too_small_is_refused_after_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = TOTAL * (3 * 8 + 2 * WIDTH)
    usage = namedtuple("usage", "total used free")
    model, runs = tiny_model("llama"), []
    find_stack(model)[0].register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    store = ActivationStore(tmp_path / "s", shard_bytes=1)
    with pytest.raises(StreamlineError, match=f"need {needed:,} bytes.*{needed - 1:,} free"):
        store.record(model, batches_of("left"), blocks=[1], dtype=torch.bfloat16)
    assert len(runs) == 1 and store.batches == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    store.record(model, batches_of("left"), blocks=[1], dtype=torch.bfloat16)
    assert len(store) == TOTAL


def test_the_buffer_is_at_most_a_shard_and_a_batch(tmp_path: Path) -> None:
    model, peak = tiny_model("llama"), []
    batches = [tokens(4, 16, seed=k) for k in range(24)]
    state_bytes = 4 * 16 * WIDTH * 4

    def states() -> dict[int, torch.UntypedStorage]:
        """Return each state of a batch or of its tokens that is in memory, by address."""
        tensors = [
            t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape[-1:] == (WIDTH,) and t.is_contiguous()
        ]
        storages = [t.untyped_storage() for t in tensors if len(t) in (4, 64)]
        return {storage.data_ptr(): storage for storage in storages}

    others = states()  # of tests that ran before in this process; held, so that no address is used again

    def measure(*_: object) -> None:
        peak.append(sum(s.nbytes() for address, s in states().items() if address not in others))

    find_stack(model)[0].register_forward_hook(measure)
    ActivationStore(tmp_path / "s", shard_bytes=3 * state_bytes).record(model, batches, blocks=[1])
    assert max(peak[12:]) <= max(peak[:12]) <= 6 * state_bytes

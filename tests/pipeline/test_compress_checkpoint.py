"""A checkpoint compressed block by block is the one compressed in memory, however often it was interrupted."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from streamline_hooks import StreamlineError, UnsupportedSurgery, compress, find_stack, load
from streamline_hooks.checkpoint import CHECKSUMS, BlockwiseSource, open_checkpoint, save
from streamline_hooks.data import PackedText, PackingConfig, packed_text
from streamline_hooks.pipeline import apply, compress_checkpoint
from streamline_hooks.repair import NoneConfig
from streamline_hooks.selection import DisjointSearch, Target, WindowSearch
from streamline_hooks.surgery import ModelSource
from streamline_hooks.testing import tiny_model
from tests.checkpoint.block_by_block import AMOUNTS, compressible, reader, reads  # noqa: F401
from tests.configured import arguments, configured
from tests.golden import inputs
from tests.processes import in_a_new_process

compressing = sys.modules["streamline_hooks.pipeline.one_round"]


def run(folder: Path, output: Path, **options: Any) -> Any:
    tokenizer, texts = reader()
    given = arguments(compress_checkpoint, **{**AMOUNTS, **options})
    return compress_checkpoint(folder, texts, tokenizer=tokenizer, output=output, **given)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (it is no mapping)
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("family", "kind", "dtype", "changes"),
    [
        ("llama", "linear", torch.float32, {}),
        ("gpt2", "swiglu:width=8", torch.bfloat16, {}),
        ("gemma3", "none", torch.bfloat16, {"tie_word_embeddings": True}),
        ("llama", "block", torch.float32, {}),
        ("llama", "silenced", torch.bfloat16, {}),
        ("llama", "folded", torch.float32, {}),
        ("gpt2", "folded", torch.bfloat16, {}),
        ("llama", "scale", torch.float32, {}),
        ("qwen3", "scale", torch.bfloat16, {}),
    ],
)
def test_it_is_what_is_compressed_in_memory(
    family: str, kind: str, dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path, log_messages: list[str]
) -> None:
    folder = compressible(tmp_path, family, dtype, **changes)
    options = {**AMOUNTS, "repair": kind, "seed": 3, "speed": False, "generation": False}
    found = run(folder, tmp_path / "apart", max_shard_size="40KB", **options)
    whole = load(folder, dtype="auto")
    tokenizer, texts = reader()
    wanted = compress(whole, texts, tokenizer=tokenizer, output=tmp_path / "whole", **arguments(**options))
    assert found.plan == wanted.plan and found.data == wanted.data and found.size == wanted.size
    assert [one.windows for one in found.candidates] == [one.windows for one in wanted.candidates]
    for one, other in zip(found.candidates, wanted.candidates, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5) and one.score == pytest.approx(other.score)
        assert one.repairs[0].repaired_error == pytest.approx(other.repairs[0].repaired_error, rel=1e-5)
    assert found.perplexities == pytest.approx(wanted.perplexities, rel=1e-5)
    assert (found.parameters, found.size_in_bytes) == (wanted.parameters, wanted.size_in_bytes)
    mine, theirs = weights_in(tmp_path / "apart"), weights_in(tmp_path / "whole")
    assert sorted(mine) == sorted(theirs)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
    assert (tmp_path / "apart/config.json").read_text() == (tmp_path / "whole/config.json").read_text()
    assert len(list((tmp_path / "apart").glob("*.safetensors"))) > 2 and (tmp_path / "apart" / CHECKSUMS).is_file()
    loaded, ids = load(found.folder), torch.arange(3, 19)[None]
    assert type(loaded) is type(whole)
    torch.testing.assert_close(loaded(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "apart/report.json").read_text())["perplexity"] == found.perplexities
    assert "6 -> 4, removed" in found.table() and any("<- chosen" in line for line in log_messages)
    if kind == "none":
        assert type(loaded).__module__.startswith("transformers.")
        assert transformers.AutoModelForCausalLM.from_pretrained(found.folder).config.num_hidden_layers == 4


def test_bytes_that_may_be_left(tmp_path: Path) -> None:
    folder = compressible(tmp_path, "llama", torch.bfloat16)
    total = sum(weight.nbytes for weight in weights_in(folder).values())
    found = run(folder, tmp_path / "out", remove=Target(memory_bytes=0.7 * total), repair="linear")
    assert found.target is not None and found.target.original == total and found.target.is_reached
    assert found.target.predicted == found.target.measured == found.size_in_bytes[1] <= 0.7 * total
    assert found.target.measured == sum(
        p.numel() * p.element_size() for p in load(found.folder, dtype="auto").parameters()
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("search", "options"),
    [
        ("disjoint", {"repair": "linear", "remove": 3}),
        ("mixed", {"repair": "swiglu:width=8", "remove": 3}),
        ("one-shot", {"repair": "none", "repeated_context": 0.5}),
    ],
)
def test_several_windows_are_what_is_compressed_in_memory(search: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    options = {**AMOUNTS, "protect": (), "search": search, "speed": False, "generation": False, **options}
    found = run(folder, tmp_path / "apart", work_folder=tmp_path / "work", **options)
    tokenizer, texts = reader()
    wanted = compress(load(folder), texts, tokenizer=tokenizer, output=tmp_path / "whole", **arguments(**options))
    assert found.plan == wanted.plan and found.data == wanted.data
    assert max(len(one.windows) for one in found.candidates) > 1
    for one, other in zip(found.candidates, wanted.candidates, strict=True):
        assert one.windows == other.windows and one.distance == pytest.approx(other.distance, rel=1e-5)
    assert found.perplexities == pytest.approx(wanted.perplexities, rel=1e-5)
    mine, theirs = weights_in(tmp_path / "apart"), weights_in(tmp_path / "whole")
    assert sorted(mine) == sorted(theirs)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_compress_takes_a_source(tmp_path: Path) -> None:
    folder, (tokenizer, texts) = compressible(tmp_path), reader()
    config = configured(**AMOUNTS)
    with BlockwiseSource(open_checkpoint(folder), memory=4000) as source:
        compress(source, texts, config, tokenizer=tokenizer, output=tmp_path / "apart")
        with pytest.raises(StreamlineError, match="inplace=False.*cannot be copied"):
            compress(source, texts, config, tokenizer=tokenizer, inplace=False)
        with pytest.raises(StreamlineError, match="own folder"):
            compress(source, texts, config, tokenizer=tokenizer, output=folder)
    run(folder, tmp_path / "whole")
    require_same_bytes(tmp_path / "apart", tmp_path / "whole")


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["linear", "folded"])
def test_a_mixture_of_experts_takes_an_offload_folder(kind: str, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    folder, offload = tmp_path / "mixtral", tmp_path / "offload"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    found = run(folder, tmp_path / "apart", offload_folder=offload, max_shard_size="40KB", repair=kind)
    whole = load(folder, dtype="auto")
    tokenizer, texts = reader()
    config = configured(speed=False, generation=False, repair=kind, **AMOUNTS)
    wanted = compress(whole, texts, config, tokenizer=tokenizer, output=tmp_path / "whole")
    assert found.plan == wanted.plan
    mine, theirs = weights_in(tmp_path / "apart"), weights_in(tmp_path / "whole")
    assert sorted(mine) == sorted(theirs)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(load(found.folder)(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)


class Interrupted(Exception):
    pass


STAGES = {
    "rank": (WindowSearch, "find"),
    "choose": (compressing, "first_applicable"),
    "measure": (compressing, "trial_perplexities"),
    "carried out": (compressing, "LayerSurgeon"),
    "save": (compressing, "save"),
}


def test_it_goes_on_wherever_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in one stage after the other: what was done is not done again, and the bytes are the same."""
    folder, work = compressible(tmp_path), tmp_path / "work"
    run(folder, tmp_path / "at once")
    for stage, (owner, name) in STAGES.items():
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(owner, name, _breaking_off)
            run(folder, tmp_path / "in parts", work_folder=work)
        assert not (tmp_path / "in parts").exists(), stage
    kept = sorted(path.name for path in work.iterdir())
    assert kept == ["measure.safetensors", "pass.json", "profile.safetensors", "verify.safetensors"]
    with monkeypatch.context() as patched:
        for name in ("measure_profile", "verify_shortlist", "trial_perplexities"):
            patched.setattr(compressing, name, _breaking_off)
        run(folder, tmp_path / "in parts", work_folder=work)
    assert not work.exists()
    require_same_bytes(tmp_path / "in parts", tmp_path / "at once")


def test_another_search_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work = compressible(tmp_path), tmp_path / "work"
    options: dict[str, Any] = {"work_folder": work, "search": "disjoint", "remove": 3, "protect": ()}
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(DisjointSearch, "find", _breaking_off)
        run(folder, tmp_path / "out", windows=2, **options)
    with pytest.raises(StreamlineError, match="another pass: search was .*'windows': 2.* and is .*'windows': 3"):
        run(folder, tmp_path / "out", windows=3, **options)


def test_the_stack_is_that_of_the_source() -> None:
    paths = ["model.encoder.layers", "model.decoder.layers"]
    for path, other in (paths, paths[::-1]):
        source = ModelSource(inputs.model_named("bart"), path)
        with pytest.raises(StreamlineError, match=f"config.stack='{other}'.*'{path}'"):
            compress(source, inputs.pair_batches(), remove=1, stack=other)
        result = compress(source, inputs.pair_batches(), remove=1, repair=NoneConfig())
        assert result.plan.stack == path


def _breaking_off(*_: Any, **__: Any) -> Any:
    raise Interrupted


def require_same_bytes(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "report.json":  # which contains times, and its checksum changes with them
            lines = [(folder / name).read_bytes().splitlines() for folder in (one, other)]
            first, second = ([line for line in part if not line.endswith(b"  report.json")] for part in lines)
            assert first == second, name


KILLED = """
    import os, sys
    from pathlib import Path
    from streamline_hooks.pipeline import BlockwiseOptions, compress_checkpoint
    from streamline_hooks.checkpoint import streaming
    from tests.checkpoint.block_by_block import AMOUNTS, reader
    from tests.configured import configured
    original, seen = streaming.BlockwisePass.advance, []
    def kill(self, place):
        found = original(self, place)
        seen.append(place)
        if len(seen) == int(sys.argv[4]):
            os.kill(os.getpid(), 9)
        return found
    streaming.BlockwisePass.advance = kill
    tokenizer, texts = reader()
    compress_checkpoint(Path(sys.argv[1]), texts, configured(**AMOUNTS), tokenizer=tokenizer, output=Path(sys.argv[2]),
                        blockwise=BlockwiseOptions(work_folder=Path(sys.argv[3])))
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("places", "step", "at"), [(3, "profile", 2), (9, "verify", 2), (16, "verify", 3), (24, "measure", 4)]
)
def test_a_killed_process_is_gone_on_with(places: int, step: str, at: int, tmp_path: Path) -> None:
    """Seven boundaries are reached in a pass over six blocks; the profile and the fits leave out the last, which stays.

    The verification is two passes: one to fit, one to compare the outputs.
    """
    folder, work = compressible(tmp_path), tmp_path / "work"
    killed = in_a_new_process(KILLED, folder, tmp_path / "killed", work, places, check=False)
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in work.iterdir() if path.is_dir()] == [step]
    latest = max((work / step).rglob("pass.json"), key=lambda file: file.stat().st_mtime_ns)
    assert json.loads(latest.read_text())["place"] == at
    found = run(folder, tmp_path / "killed", work_folder=work)
    assert not work.exists() and found.folder == (tmp_path / "killed").resolve()
    run(folder, tmp_path / "at once")
    require_same_bytes(tmp_path / "killed", tmp_path / "at once")


def test_other_arguments_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work = compressible(tmp_path), tmp_path / "work"
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(WindowSearch, "find", _breaking_off)
        run(folder, tmp_path / "out", work_folder=work)
    for changes, differs in (
        ({"repair": "none"}, "kind was linear and is none"),
        ({"remove": 1}, "target was 2 and is 1"),
        ({"seed": 1}, "batches was"),
        ({"protect": ()}, r"keep was \[5\] and is \[\]"),
        ({"shortlist": 2}, "shortlist was 3 and is 2"),
        ({"criterion": "cosine"}, "criterion was cosine_and_magnitude and is cosine"),
        ({"dtype": torch.bfloat16}, "fingerprint was"),
    ):
        with pytest.raises(StreamlineError, match=f"another pass: {differs}"):
            run(folder, tmp_path / "out", work_folder=work, **changes)


def test_a_window_that_cannot_go_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    folder = compressible(tmp_path)
    first = run(folder, tmp_path / "first").candidates[0].windows[0]
    original = apply.apply_selection

    def carry_out(surgeon: Any, selection: Any) -> None:
        if selection.windows[0] == first:
            raise UnsupportedSurgery("not this one")
        original(surgeon, selection)

    monkeypatch.setattr(apply, "apply_selection", carry_out)
    result = run(folder, tmp_path / "other")
    assert result.candidates[0].windows[0] != first and result.plan.removed == tuple(result.candidates[0].windows[0])
    assert any(line.startswith("skipped") and line.endswith("not this one") for line in log_messages)


@pytest.mark.parametrize(("keep", "checks"), [((-1,), 2), ((0,), 1)])
def test_each_block_is_read_as_often_as_is_said(
    keep: tuple[int, ...],
    checks: int,
    tmp_path: Path,
    reads: Counter[str],  # noqa: F811
) -> None:
    """By the profile, the judgment and the measurement, ten times for the probe, once to write."""
    result = run(compressible(tmp_path), tmp_path / "out", protect=keep)
    gone = set(result.plan.removed)
    counts = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(6)}
    looked = 1  # at 16 values of each weight, for the profile's fingerprint
    for k in range(6):
        passes = 4 if k < 5 or checks == 1 else 2  # where it stays, the profile and the fits leave the last block out
        judged, probe, written = 2 * (k == 5), 6 if k in gone else 10, int(k not in gone)
        assert counts[k] == looked + checks + passes + judged + probe + written, k


def test_every_block_is_held_against_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one too, which the profile leaves out where it must stay."""
    folder, seen = compressible(tmp_path), []
    original = sys.modules["streamline_hooks.checkpoint.streaming"].compare_with_whole_model

    def watched(stack: Any, place: int, *rest: Any) -> None:
        seen.append(place)
        original(stack, place, *rest)

    monkeypatch.setattr("streamline_hooks.checkpoint.streaming.compare_with_whole_model", watched)
    run(folder, tmp_path / "out")
    assert set(seen) == set(range(1, 7))


def test_packed_text_is_what_it_is_in_memory(tmp_path: Path) -> None:
    tokenizer, documents = reader()
    (tmp_path / "text.txt").write_text("\n\n\n".join(documents))
    sizes = {"calibration": 256, "validation": 64, "test": 64}
    text = packed_text(tmp_path / "text.txt", tokenizer, sizes, PackingConfig(16))
    folder = compressible(tmp_path)
    found = compress_checkpoint(folder, text, configured(**AMOUNTS), tokenizer=tokenizer, output=tmp_path / "apart")
    whole = load(folder, dtype="auto")
    wanted = compress(
        whole,
        text,
        configured(speed=False, generation=False, **AMOUNTS),
        tokenizer=tokenizer,
        output=tmp_path / "whole",
    )
    assert found.plan == wanted.plan and found.data == wanted.data
    assert found.perplexities == pytest.approx(wanted.perplexities, rel=1e-5)
    mine, theirs = weights_in(tmp_path / "apart"), weights_in(tmp_path / "whole")
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"options have resume, checkpoint_file.*Expected overwrite.*Leave"):
        run(compressible(tmp_path), tmp_path / "out", resume=True, checkpoint_file=tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_packed_text_is_for_models_that_keep_documents_apart(tmp_path: Path) -> None:
    tokenizer, _ = reader()
    ids = torch.arange(3, 19).repeat(4, 1)
    part = PackedText(ids.int(), torch.arange(8).repeat(4, 2).int(), documents=8, cuts=0)
    text = {"calibration": part, "validation": part, "test": part}
    tiny_model("bloom", vocabulary=300).save_pretrained(tmp_path / "bloom")
    with pytest.raises(StreamlineError, match="mixes the documents of a packed row"):
        compress_checkpoint(
            tmp_path / "bloom", text, configured(**AMOUNTS), tokenizer=tokenizer, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_nothing_is_changed_in_the_original(tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(find_stack(result.model)) == 4 and all(p.is_meta for p in result.model.model.layers[0].mlp.parameters())
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(result.model(ids).logits, load(tmp_path / "out")(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove": Target(latency=0.8)}, r"latency:0.8, which is timed.*into memory"),
        ({"remove": Target(decode_latency=0.8)}, r"decode-latency:0.8.*timed"),
        ({"criterion": "perplexity"}, r"criterion perplexity, which runs.*each window"),
        ({"remove": 6}, r"6 of 6 blocks.*one block must stay"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    with pytest.raises(StreamlineError, match=said):
        run(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_not_free_and_a_model_that_is_not_run(tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StreamlineError, match=r"not empty.*Choose"):
        run(folder, tmp_path / "out")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    with pytest.raises(StreamlineError, match=r"not empty.*pass.json"):
        run(folder, tmp_path / "new", work_folder=tmp_path / "work")
    plain = run(folder, tmp_path / "new")
    with pytest.raises(UnsupportedSurgery, match="spliced modules"):
        run(plain.folder, tmp_path / "again")


def test_what_is_on_disk_is_saved_in_files_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    saved = save(open_checkpoint(folder), tmp_path / "saved", max_shard_size="30KB")
    assert len(list(saved.glob("*.safetensors"))) > len(list(folder.glob("*.safetensors")))
    mine, theirs = weights_in(saved), weights_in(folder)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

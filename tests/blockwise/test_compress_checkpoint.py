"""A checkpoint compressed block by block is the one compressed in memory, however often it was interrupted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from streamline_hooks import StreamlineError, UnsupportedSurgery, carrying_out, compress, find_stack, load
from streamline_hooks.blockwise import compress_checkpoint, compressing, open_checkpoint, passing
from streamline_hooks.calibration import PackedText, packed_text
from streamline_hooks.checkpoint import save
from streamline_hooks.checkpoint.checksums import FILE as CHECKSUMS
from streamline_hooks.distributed import Processes
from streamline_hooks.selection import Target, WindowSearch
from streamline_hooks.testing import tiny_model
from tests.blockwise.checkpoints import AMOUNTS, compressible, reader, reads  # noqa: F401
from tests.configured import arguments, configured
from tests.processes import in_a_new_process


def run(folder: Path, output: Path, **options: Any) -> Any:
    return compress_checkpoint(folder, *reader(), output, **arguments(compress_checkpoint, **{**AMOUNTS, **options}))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (it is no mapping)
    return found


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "changes"),
    [
        ("llama", "linear", torch.float32, {}),
        ("gpt2", "swiglu:width=8", torch.bfloat16, {}),
        ("gemma3", "none", torch.bfloat16, {"tie_word_embeddings": True}),
    ],
)
def test_it_is_what_is_compressed_in_memory(
    family: str, kind: str, dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = compressible(tmp_path, family, dtype, **changes)
    said: list[str] = []
    options = {**AMOUNTS, "repair": kind, "seed": 3, "speed": False, "generation": False}
    found = run(folder, tmp_path / "apart", say=said.append, max_shard_size="40KB", **options)
    whole = load(folder, dtype="auto")
    wanted = compress(whole, *reader(), **arguments(**options), output=tmp_path / "whole")
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
    assert "6 -> 4, removed" in found.table() and any("<- chosen" in line for line in said)
    if kind == "none":
        assert type(loaded).__module__.startswith("transformers.")
        assert transformers.AutoModelForCausalLM.from_pretrained(found.folder).config.num_hidden_layers == 4


def test_a_mixture_of_experts_takes_an_offload_folder(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    folder, offload = tmp_path / "mixtral", tmp_path / "offload"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    found = run(folder, tmp_path / "apart", offload_folder=offload, max_shard_size="40KB")
    whole = load(folder, dtype="auto")
    wanted = compress(whole, *reader(), configured(speed=False, generation=False, **AMOUNTS), output=tmp_path / "whole")
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
    "rank": f"{WindowSearch.__module__}.WindowSearch.find",
    "choose": f"{compressing.__name__}.first_that_can_go",
    "measure": f"{compressing.__name__}.perplexity_of_candidates",
    "carried out": f"{compressing.__name__}.LayerSurgeon",
    "save": f"{compressing.__name__}.save",
}


def test_it_goes_on_wherever_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in one stage after the other: what was done is not done again, and the bytes are the same."""
    folder, work = compressible(tmp_path), tmp_path / "work"
    run(folder, tmp_path / "at once")
    for stage, name in STAGES.items():
        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(name, _breaking_off)
            run(folder, tmp_path / "in parts", work_folder=work)
        assert not (tmp_path / "in parts").exists(), stage
    kept = sorted(path.name for path in work.iterdir())
    assert kept == ["judged.safetensors", "pass.json", "perplexity.safetensors", "profile.safetensors"]
    with monkeypatch.context() as patched:
        for name in ("profile", "verified", "perplexity_of_candidates"):
            patched.setattr(compressing, name, _breaking_off)
        run(folder, tmp_path / "in parts", work_folder=work)
    assert not work.exists()
    require_same_bytes(tmp_path / "in parts", tmp_path / "at once")


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
    from streamline_hooks.blockwise import compress_checkpoint, passing
    from tests.blockwise.checkpoints import AMOUNTS, reader
    from tests.configured import configured
    original, seen = passing.BlockwisePass.advance, []
    def kill(self, place):
        found = original(self, place)
        seen.append(place)
        if len(seen) == int(sys.argv[4]):
            os.kill(os.getpid(), 9)
        return found
    passing.BlockwisePass.advance = kill
    compress_checkpoint(Path(sys.argv[1]), *reader(), Path(sys.argv[2]), configured(**AMOUNTS),
                        work_folder=Path(sys.argv[3]))
"""


@pytest.mark.parametrize(("places", "step"), [(3, "profile"), (10, "verify"), (18, "measure")])
def test_a_killed_process_is_gone_on_with(places: int, step: str, tmp_path: Path) -> None:
    """Seven places are reached in a pass over six blocks; the profile leaves out the last, which is to stay."""
    folder, work = compressible(tmp_path), tmp_path / "work"
    killed = in_a_new_process(KILLED, folder, tmp_path / "killed", work, places, check=False)
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in work.iterdir() if path.is_dir()] == [step]
    (file,) = (work / step).rglob("pass.json")
    at = json.loads(file.read_text())["place"]
    assert at == {"profile": 2, "verify": 3, "measure": 4}[step]
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
        ({"keep": ()}, r"keep was \[5\] and is \[\]"),
        ({"shortlist": 2}, "shortlist was 3 and is 2"),
        ({"criterion": "cosine"}, "criterion was cosine_and_magnitude and is cosine"),
        ({"dtype": torch.bfloat16}, "fingerprint was"),
    ):
        with pytest.raises(StreamlineError, match=f"another pass: {differs}"):
            run(folder, tmp_path / "out", work_folder=work, **changes)


def test_a_window_that_cannot_go_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = compressible(tmp_path), []
    first = run(folder, tmp_path / "first").candidates[0].windows[0]
    original = carrying_out.carry_out

    def carry_out(surgeon: Any, selection: Any) -> None:
        if selection.windows[0] == first:
            raise UnsupportedSurgery("not this one")
        original(surgeon, selection)

    monkeypatch.setattr(carrying_out, "carry_out", carry_out)
    result = run(folder, tmp_path / "other", say=said.append)
    assert result.candidates[0].windows[0] != first and result.plan.removed == tuple(result.candidates[0].windows[0])
    assert any("is passed over: not this one" in line for line in said)


@pytest.mark.parametrize(("keep", "checks"), [((-1,), 2), ((0,), 1)])
def test_each_block_is_read_as_often_as_is_said(
    keep: tuple[int, ...],
    checks: int,
    tmp_path: Path,
    reads: Counter[str],  # noqa: F811
) -> None:
    """By the profile, the judgement and the measurement, ten times for the probe, once to write."""
    result = run(compressible(tmp_path), tmp_path / "out", keep=keep)
    gone = set(result.plan.removed)
    counts = {k: reads[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(6)}
    looked = 1  # at 16 values of each weight, for the profile's fingerprint
    for k in range(6):
        passes = 3 if k < 5 or checks == 1 else 2  # where it stays, the profile leaves the last block out
        judged, probe, written = 2 * (k == 5), 6 if k in gone else 10, int(k not in gone)
        assert counts[k] == looked + checks + passes + judged + probe + written, k


def test_every_block_is_held_against_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one too, which the profile leaves out where it must stay."""
    folder, seen = compressible(tmp_path), []
    original = passing.require_true

    def watched(stack: Any, place: int, *rest: Any) -> None:
        seen.append(place)
        original(stack, place, *rest)

    monkeypatch.setattr(passing, "require_true", watched)
    run(folder, tmp_path / "out")
    assert set(seen) == set(range(1, 7))


def test_packed_text_is_what_it_is_in_memory(tmp_path: Path) -> None:
    tokenizer, documents = reader()
    (tmp_path / "text.txt").write_text("\n\n\n".join(documents))
    sizes = {"calibration": 256, "validation": 64, "test": 64}
    text = packed_text(tmp_path / "text.txt", tokenizer, sizes, sequence_length=16)
    folder = compressible(tmp_path)
    found = compress_checkpoint(folder, tokenizer, text, tmp_path / "apart", configured(**AMOUNTS))
    whole = load(folder, dtype="auto")
    wanted = compress(
        whole, tokenizer, text, configured(speed=False, generation=False, **AMOUNTS), output=tmp_path / "whole"
    )
    assert found.plan == wanted.plan and found.data == wanted.data
    assert found.perplexities == pytest.approx(wanted.perplexities, rel=1e-5)
    mine, theirs = weights_in(tmp_path / "apart"), weights_in(tmp_path / "whole")
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_packed_text_is_for_models_that_keep_documents_apart(tmp_path: Path) -> None:
    tokenizer, _ = reader()
    ids = torch.arange(3, 19).repeat(4, 1)
    part = PackedText(ids.int(), torch.arange(8).repeat(4, 2).int(), documents=8, cuts=0)
    text = {"calibration": part, "validation": part, "test": part}
    tiny_model("bloom", vocabulary=300).save_pretrained(tmp_path / "bloom")
    with pytest.raises(StreamlineError, match="packed row apart"):
        compress_checkpoint(tmp_path / "bloom", tokenizer, text, tmp_path / "out", configured(**AMOUNTS))
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
        ({"repair": "block"}, r"'block'.*least-squares map"),
        ({"repair": "folded"}, "'folded' does not start"),
        ({"remove": Target(latency=0.8)}, r"latency:0.8, which is timed.*into memory"),
        ({"remove": Target(decode_latency=0.8)}, r"decode-latency:0.8.*timed"),
        ({"criterion": "perplexity"}, r"criterion perplexity, which runs.*each window"),
        ({"repeated": 0.5}, r"repeated=0.5.*Expected a search for single windows.*into memory"),
        ({"remove": 6}, r"6 of 6 blocks.*one block must stay"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = compressible(tmp_path)
    with pytest.raises(StreamlineError, match=said):
        run(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressing, "here", lambda: Processes(1, 2))
    with pytest.raises(StreamlineError, match=r"of 2.*Call"):
        run(tmp_path, tmp_path / "out")


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

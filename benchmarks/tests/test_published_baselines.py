"""The baselines: their presets, and their fits against the papers' formulas, written out anew with NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.baselines import BASELINES
from benchmarks.baselines.ghosted import GhostedConfig
from benchmarks.baselines.hadamard import hadamard
from benchmarks.baselines.linear_patch import LinearPatchConfig
from benchmarks.baselines.replace_me import ReplaceMeConfig
from streamline_hooks import (
    CompressionConfig,
    DistillationConfig,
    HiddenStateRecorder,
    LayerSurgeon,
    StreamlineError,
    UnsupportedSurgery,
    compress,
    find_stack,
    fit_windows,
)
from streamline_hooks.distillation import healing_copies
from streamline_hooks.pipeline import PRESETS
from streamline_hooks.repair import ReplacementConfig, insert_replacement, measure_fold_moments
from streamline_hooks.statistics import measure_moments
from streamline_hooks.testing import tiny_model
from tests.processes import in_a_new_process

WINDOW = range(3, 6)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (12, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padding never counts
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def states(model: Any, batches: list[dict[str, torch.Tensor]], places: tuple[int, ...]) -> list[list[np.ndarray]]:
    """What enters blocks, one array a sequence of its real tokens."""
    found: list[list[np.ndarray]] = [[] for _ in places]
    for batch in batches:
        with torch.no_grad(), HiddenStateRecorder(model, sites=["block.input"]) as record:
            record(**batch)
        for one, k in zip(found, places, strict=True):
            rows = zip(record.inputs[k][0], batch["attention_mask"].bool(), strict=True)
            one += [state[real].double().numpy() for state, real in rows]
    return found


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 32, 36, 40, 64, 384, 576, 768, 960, 1536, 2560, 3072])
def test_hadamard_matrices_are_of_signs_and_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 92, 50])
def test_an_order_without_a_construction_is_refused(order: int) -> None:
    with pytest.raises(StreamlineError, match=rf"Hadamard.*order {order} can"):
        hadamard(order)


def test_linear_patch_scales_the_rotated_channels(texts: list[dict[str, torch.Tensor]]) -> None:
    model = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], LinearPatchConfig(), texts[:2], texts[2:])
    before, after = states(model, texts, (WINDOW.start, WINDOW.stop))
    h = hadamard(32).numpy()
    ratios = [np.abs(y @ h).mean(0) / np.abs(x @ h).mean(0) for x, y in zip(before, after, strict=True)]
    wanted = h @ np.diag(np.mean(ratios, axis=0)) @ h.T
    found = np.eye(32) + repair.replacement_module.projection.weight.detach().double().numpy().T
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found, found.T, atol=1e-6)


def test_ghosted_is_least_squares_onto_the_gap_without_weights(texts: list[dict[str, torch.Tensor]]) -> None:
    model = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], GhostedConfig(), texts[:2], texts[2:])
    x, y = (np.concatenate(rows) for rows in states(model, texts, (WINDOW.start, WINDOW.stop)))
    wanted = np.linalg.solve(x.T @ x + 1e-6 * np.eye(32), x.T @ (y - x))
    np.testing.assert_allclose(
        repair.replacement_module.projection.weight.detach().double().numpy().T, wanted, atol=1e-5
    )


def test_replace_me_is_least_squares_of_the_mlp_and_folded(texts: list[dict[str, torch.Tensor]]) -> None:
    model: Any = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], ReplaceMeConfig(), texts[:2], texts[2:])
    added: list[torch.Tensor] = []
    handle = model.model.layers[WINDOW.start - 1].mlp.register_forward_hook(lambda _m, _a, out: added.append(out))
    leaving, y = (np.concatenate(rows) for rows in states(model, texts, (WINDOW.start, WINDOW.stop)))
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in texts]
    m = np.concatenate([out[mask].double().numpy() for out, mask in zip(added, real, strict=True)])
    wanted = np.linalg.lstsq(m, y - (leaving - m), rcond=None)[0]
    np.testing.assert_allclose(repair.replacement_module.map.numpy(), wanted, atol=1e-3 * np.abs(wanted).max())
    down = model.model.layers[WINDOW.start - 1].mlp.down_proj.weight.detach().clone()
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, repair.replacement_module)
        folded = model.model.layers[WINDOW.start - 1].mlp.down_proj.weight
        torch.testing.assert_close(folded, (repair.replacement_module.map.float().T @ down), rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedSurgery, match="no block precedes"):
        fit_windows(model, [range(0, 2)], ReplaceMeConfig(), texts[:2], texts[2:])


@pytest.mark.parametrize("kind", ["ghosted", "replaceme", "linearpatch"])
def test_the_error_on_held_out_text_is_of_a_map_that_has_not_seen_it(
    texts: list[dict[str, torch.Tensor]], kind: str
) -> None:
    model = tiny_model("llama")
    config = ReplacementConfig.from_dict({"kind": kind})
    (repair,) = fit_windows(model, [WINDOW], config, texts[:2], texts[2:])
    (without,) = fit_windows(model, [WINDOW], config, texts[:1], texts[1:2])  # what is placed is fitted on both
    if kind == "replaceme":
        (sums,) = measure_fold_moments(model, texts[2:], [WINDOW])
        map_ = without.replacement_module.map - torch.eye(32)
        seen = repair.replacement_module.map - torch.eye(32)
        assert repair.replacement_module.held_out_error == repair.repaired_error
    else:
        (sums,) = measure_moments(model, texts[2:], [WINDOW])
        map_, seen = (one.replacement_module.projection.weight.detach().double().T for one in (without, repair))
    assert repair.repaired_error == pytest.approx(sums.error(map_), rel=1e-3)
    assert repair.repaired_error != pytest.approx(sums.error(seen), rel=0.01), "the two are told apart"


@pytest.mark.parametrize("name", BASELINES)
def test_a_preset_is_added_with_its_source(name: str) -> None:
    """All search for one window, so that they stand in one table; all but UIDL are closed forms."""
    preset = PRESETS[name]
    assert preset.name == name and "arXiv" in preset.source
    config = CompressionConfig.preset(name)
    assert CompressionConfig.from_dict(config.to_dict()) == config
    found = (config.search.kind, config.search.resolved_criterion.name, config.data.repeated_context, config.rounds)
    assert found == ("window", "cosine_and_magnitude", 0.0, 1)
    assert (config.distillation is None) == (config.healing is None) == (name != "uidl")


def test_uidl_is_trained_as_published() -> None:
    """A.1 and B.3: 100 of 5,000 steps warm up."""
    assert PRESETS["uidl"].config.distillation == DistillationConfig(
        {"lm": 1.0}, learning_rate=3e-4, weight_decay=0.0, betas=(0.9, 0.999), warmup_ratio=100 / 5000,
        min_lr_ratio=0.0, max_grad_norm=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("type_", "layers"), [("llama", 3), ("gpt2", 2), ("opt", 2), ("gpt_neox", 2)])
def test_uidl_puts_adapters_of_rank_64_on_the_mlps_alone(type_: str, layers: int) -> None:
    healing = PRESETS["uidl"].config.healing
    assert healing is not None
    copies, _ = healing_copies(find_stack(tiny_model(type_)), [range(2, 4)], healing)
    adapters = {n.split(".lora_")[0]: p for n, p in copies[0].named_parameters() if p.requires_grad and ".lora_A" in n}
    assert len(adapters) == layers
    assert not any("attn" in name or "attention" in name for name in adapters)
    assert {p.shape[0] for p in adapters.values()} == {64}


@pytest.mark.long
def test_checkpoints_are_loaded_without_the_baselines_and_their_configs_name_the_kind(
    texts: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """What is placed are the library's own modules; the config that is saved beside them needs the import."""
    kinds = ("ghosted", "linearpatch", "replaceme")
    parts = {"calibration": texts[:1], "validation": texts[1:2], "test": texts[2:]}
    for kind in kinds:
        config = CompressionConfig(remove=2, repair=ReplacementConfig.from_dict({"kind": kind}))
        result = compress(tiny_model("llama"), parts, config, output=tmp_path / kind)
        torch.save({"batch": texts[0], "logits": result.model(**texts[0]).logits}, tmp_path / f"{kind}.pt")
    code = """
        import sys
        from pathlib import Path
        import torch
        from streamline_hooks import CompressionConfig, StreamlineError, load
        folder, *kinds = map(Path, sys.argv[1:])
        for kind in kinds:
            saved = torch.load(folder / f"{kind}.pt")
            with torch.no_grad():
                torch.testing.assert_close(load(folder / kind)(**saved["batch"]).logits, saved["logits"])
            try:
                CompressionConfig.load(folder / kind)
            except StreamlineError as error:
                print(error)
        import benchmarks.baselines
        print(*(CompressionConfig.load(folder / kind).repair.kind for kind in kinds))
    """
    *refused, read = in_a_new_process(code, tmp_path, *kinds).stdout.strip().splitlines()[-4:]
    for kind, error in zip(kinds, refused, strict=True):
        assert f"The replacement '{kind}' is unknown. Expected one of none, linear" in error
    assert read == " ".join(kinds)

"""Standard errors of scores and of selections: against sketches with other seeds and the exact kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.demo.corpus import MODEL_FOLDER, pool_rows
from rise_ops.exact import exact_scores, read_factors, text_chunks
from rise_ops.signatures import Signer
from rise_ops.stability import OWN_NOISE, measure_stability, overlap_of, reliability_of, stability_of
from rise_ops.store import Store
from rise_ops.trunk import Trunk, load_trunk
from rise_ops.uncertainty import NOISE_QUERIES, SHIFTS, noise_queries, noise_squares, standard_errors

SKETCH = SketchConfig(dim_r=16, dim_h=16, dim_g=8, temperature=1.0)


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    """The demonstration's model."""
    return load_trunk(ModelConfig(name=str(MODEL_FOLDER), device="cpu"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some rows of the demonstration."""
    return [f"{row.example.instruction}\n{row.example.output}" for row in pool_rows()[:40]]


def _gradient(trunk: Trunk, text: str) -> npt.NDArray[np.float64]:
    """Gradient of the loss with respect to the LM head, by autograd."""
    import torch

    (encoded,) = trunk.encode([text])
    ids = torch.from_numpy(encoded.ids.astype(np.int64))[None]
    weight = trunk.model.get_output_embeddings().weight.detach().clone().requires_grad_(True)
    with torch.no_grad():
        hidden = trunk.hidden_states(ids, [ids.shape[1]])[0, :-1].clone()
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, ids[0, 1:], reduction="sum")
    (found,) = torch.autograd.grad(loss, weight)
    return np.asarray(found.numpy().astype(np.float64).ravel())


def test_the_gradient_kernel_is_that_of_autograd(trunk: Trunk, texts: list[str]) -> None:
    whole = SketchConfig(temperature=1.0, top_k=trunk.vocab_size, adaptive_support=False)
    short = [text[:80] for text in texts[:3]]
    found = exact_scores(trunk, whole, short, short[:2], kind="gradient")
    gradients = [_gradient(trunk, text) for text in short]
    unit = [each / np.linalg.norm(each) for each in gradients]
    np.testing.assert_allclose(found, [[a @ b for b in unit[:2]] for a in unit], atol=1e-4)


def test_the_kernel_is_the_limit_of_wide_sketches(trunk: Trunk, texts: list[str]) -> None:
    exact = exact_scores(trunk, SKETCH, texts[:8], texts[:3])
    assert np.allclose(np.diag(exact[:3]), 1, atol=1e-5)
    errors = []
    for width in (16, 64, 256):
        wide = SKETCH.model_copy(update={"dim_r": 2 * width, "dim_h": width, "dim_g": width})
        signatures = Signer(trunk, wide, memory=2**30).rows(texts[:8]).signature.astype(np.float64)
        errors.append(float(np.sqrt(np.mean((signatures @ signatures[:3].T - exact) ** 2))))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


def test_factors_come_by_row_chunk_and_place(trunk: Trunk, texts: list[str]) -> None:
    long = " ".join(texts[:20])
    factors = read_factors(trunk, SKETCH, list(text_chunks(trunk, [texts[0], long])))
    counts = [len(each.ids) for each in trunk.encode([texts[0], long])]
    assert counts[1] > 256 and factors.row_starts.tolist() == [0, 1]
    assert len(factors.chunk_starts) > 2 and factors.chunk_starts[1] == counts[0] - 1
    sums = np.zeros(len(factors.hidden))
    np.add.at(sums, factors.residual.rows().numpy(), factors.residual.values.numpy())
    np.testing.assert_allclose(sums, 0, atol=1e-5)


Sketched = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def sketches(trunk: Trunk, texts: list[str]) -> list[Sketched]:
    """Signatures of rows and queries by seed."""
    found = []
    for seed in range(6):
        signer = Signer(trunk, SKETCH.model_copy(update={"seed": 100 * seed}), memory=2**30)
        signature = signer.rows(texts[:40]).signature.astype(np.float32)
        found.append((signature[10:], signature[:10]))
    return found


@pytest.fixture(scope="module")
def exact(trunk: Trunk, texts: list[str]) -> npt.NDArray[np.float64]:
    """Influence of the same rows on the same queries, without sketches."""
    return exact_scores(trunk, SKETCH, texts[10:40], texts[:10])


@pytest.mark.parametrize(("aggregate", "few"), [("mean", 10), ("max", 1), ("top-3", 3)])
def test_errors_are_as_large_as_those_of_other_seeds(
    sketches: list[Sketched], exact: npt.NDArray[np.float64], aggregate: str, few: int
) -> None:
    wrong, told = [], []
    for rows, queries in sketches:
        noise = noise_queries(queries, SKETCH, aggregate)
        assert noise.shape == (NOISE_QUERIES, SKETCH.dim)
        errors = standard_errors(noise_squares(rows @ noise.T), np.ones(len(rows), bool))
        for first in range(0, 11 - few, few):  # any queries do: which are the best is not what is measured
            group = slice(first, first + few)
            wrong.append((rows @ queries[group].T).mean(axis=1) - exact[:, group].mean(axis=1))
            told.append(errors)
    ratio = np.sqrt(np.mean(np.square(told)) / np.mean(np.square(wrong)))
    assert 0.75 < ratio < 1.35
    assert 0.85 < np.mean(np.abs(wrong) < 1.96 * np.array(told)) < 0.995


def test_shifted_queries_hold_no_signal() -> None:
    """What equal coordinates bring is gone, along either factor and in each channel."""
    wide = SketchConfig(channels=("rh", "gh", "rg"), dim_r=6, dim_h=5, dim_g=7)
    rows, columns = np.arange(wide.dim_r)[:, None], np.arange(wide.dim_h)
    for row, column in ((2, 3), (0, 0), (5, 4)):
        query = np.zeros((1, wide.dim), np.float32)
        query[0, : wide.dim_r * wide.dim_h] = ((rows == row) & (columns == column)).ravel()
        # nothing is proportional to the score, which only equal coordinates make
        kinds = noise_queries(query, wide, "mean").reshape(3, SHIFTS, -1)[:, :, : wide.dim_r * wide.dim_h]
        for kind, (first, second) in zip(kinds, ((True, False), (False, True), (True, True)), strict=True):
            for shifted in kind:
                ((there, here),) = np.argwhere(shifted.reshape(wide.dim_r, wide.dim_h) != 0)
                assert (there != row) == first and (here != column) == second
            assert len({tuple(shifted) for shifted in kind}) == SHIFTS


@pytest.mark.parametrize("aggregate", ["mean", "max", "top-4"])
def test_noise_proportional_to_the_score_does_not_count(aggregate: str) -> None:
    """Of rows equal to the queries: scaling sketches to unit length takes it out."""
    draw = np.random.default_rng(3)
    common = np.abs(draw.standard_normal(SKETCH.dim))
    queries = (common + 0.1 * draw.standard_normal((12, SKETCH.dim))).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    matrix = queries.mean(axis=0)[:256].reshape(16, 16)
    assert (matrix * np.roll(matrix, 1, axis=0)).sum() > 0.3
    assert np.abs(queries @ noise_queries(queries, SKETCH, aggregate).T).max() < 0.1


def test_of_few_rows_errors_are_those_of_their_block() -> None:
    draw = np.random.default_rng(5)
    loud = np.repeat([1.0, 3.0], [900, 100])[:, None]
    products = (loud * draw.standard_normal((1_000, NOISE_QUERIES))).astype(np.float32)
    products[0] = np.nan  # a row without a signature
    usable = np.arange(1_000) > 0
    squares = noise_squares(products)
    errors = standard_errors(squares, usable)
    assert np.isfinite(errors[1:]).all() and (errors[1:] > 0).all()
    assert np.square(errors[1:]).mean() == pytest.approx(np.square(loud).mean(), rel=0.15)
    assert errors[900:].mean() > 1.3 * errors[1:900].mean()
    assert standard_errors(squares[:1], usable[:1]).shape == (1,)
    assert standard_errors(squares[1:2], usable[1:2])[0] > 0


def _normal(rows: int, noise: float, seed: int = 7) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Any]:
    draw = np.random.default_rng(seed)
    true = draw.standard_normal(rows)
    return true, np.full(rows, noise), draw


@pytest.mark.parametrize(("noise", "share"), [(0.05, 0.2), (0.5, 0.2), (1.0, 0.1), (2.0, 0.5)])
def test_the_expected_overlap_is_what_another_sketch_gives(noise: float, share: float) -> None:
    rows = 20_000
    count = int(share * rows)
    true, errors, draw = _normal(rows, noise)
    mine, theirs = (true + noise * draw.standard_normal(rows) for _ in range(2))
    both = [set(np.argsort(-each)[:count].tolist()) for each in (mine, theirs)]
    right = len(both[0] & both[1]) / count
    assert overlap_of(mine, errors / OWN_NOISE, count) == pytest.approx(right, abs=0.03)
    assert reliability_of(mine, errors) == pytest.approx(1 / (1 + noise**2), abs=0.02)


def test_a_narrow_sketch_is_warned_of_and_told_what_would_do() -> None:
    values, errors, draw = _normal(5_000, 0.3)
    noisy = values + errors * draw.standard_normal(len(values))
    kept = noisy >= np.quantile(noisy, 0.8)
    found = stability_of(noisy, errors, kept=kept, sketch=SKETCH)
    assert found.warning and "times the widths would do" in found.warning and (found.overlap_expected or 1) < 0.8
    calm = stability_of(values, errors / 30, kept=values >= np.quantile(values, 0.8), sketch=SKETCH)
    assert (
        calm.warning is None
        and calm.reliability > 0.99
        and calm.cut == pytest.approx(np.quantile(values, 0.8), abs=0.01)
    )
    hopeless = stability_of(draw.standard_normal(5_000), np.full(5_000, 1.0), kept=kept, sketch=SKETCH)
    assert hopeless.warning and "would not do either" in hopeless.warning
    everything = stability_of(values, errors, kept=np.ones(5_000, bool), sketch=SKETCH)
    assert everything.overlap_expected is None and everything.warning is None


def test_only_rows_whose_value_decided_take_part(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    reasons = ["kept", "kept", "over_rows", "near_duplicate", "excluded_pattern", "over_source_quota", "no_prediction"]
    frame = pl.DataFrame(
        {
            "doc_id": [f"{number:064x}" for number in range(7)],
            "value": [3.0, 2.0, 1.0, 2.5, 2.7, 2.1, None],
            "value_error": pl.Series([0.1, 0.2, 0.3, 9.0, 9.0, 9.0, None], dtype=pl.Float32),
            "kept": [reason == "kept" for reason in reasons],
            "reason": reasons,
        }
    )

    def written(run_id: str, frame: pl.DataFrame) -> str:
        frame.write_parquet(tmp_path / f"{run_id}.parquet")
        store.create_from_file(f"runs/{run_id}/decisions.parquet", tmp_path / f"{run_id}.parquet")
        return run_id

    found = measure_stability(store, written("one", frame), rows=7, sketch=SKETCH)
    assert found is not None
    assert (found["rows_sampled"], found["cut"]) == (3, 2.0)
    assert found["value_error_median"] == pytest.approx(0.2)
    without = frame.with_columns(value_error=pl.lit(None, pl.Float32))
    assert measure_stability(store, written("two", without), rows=7, sketch=SKETCH) is None
    assert measure_stability(store, written("three", frame.drop("value_error")), rows=7, sketch=SKETCH) is None

"""Rows and queries: averaging, batching, masking, memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import LimitError, ModelError, SourceError
from rise_ops.head import ReadoutHead
from rise_ops.signatures import Signer, plan_memory
from rise_ops.sketch import SketchTables
from rise_ops.trunk import Trunk, load_trunk
from tests import oracle, tiny_models

_SHARED = Path(__file__).parents[2] / "shared"
_SKETCH = SketchConfig(dim_r=32, dim_h=16, dim_g=16)
_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "near", "a", "river"]


def _texts(words: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(_WORDS, size=count)) for count in words]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    folder = tiny_models.save("gpt_neox", tmp_path_factory.mktemp("models") / "m")
    return load_trunk(ModelConfig(name=str(folder), device="cpu"))


@pytest.fixture
def signer(trunk: Trunk) -> Signer:
    return Signer(trunk, _SKETCH, memory=2**28)


def _chunk(trunk: Trunk, ids: list[int], *, loss_start: int = 0) -> oracle.Array:
    """Signature of one chunk from the model's own hidden states, by the loops, rounded to float16."""
    with torch.inference_mode():
        states = trunk.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    head = oracle.Head(trunk.model.get_output_embeddings().weight.numpy())
    tables = SketchTables.from_config(_SKETCH, hidden_dim=trunk.hidden_dim, vocab_size=trunk.vocab_size).arrays()
    found = oracle.signature(states[0].numpy(), np.array(ids), head, _SKETCH, tables, loss_start=loss_start)
    return found.astype(np.float16).astype(np.float64)


def test_rows_are_what_the_loops_say(trunk: Trunk, signer: Signer) -> None:
    texts = _texts([3, 40, 9])
    found = signer.rows(texts)
    assert found.signature.dtype == np.float16 and found.signature.shape == (3, _SKETCH.dim)
    assert found.tokens.dtype == np.int32 and found.chunks.tolist() == [1, 1, 1]
    for row, text in enumerate(texts):
        ids = trunk.tokenizer(text)["input_ids"]
        assert found.tokens[row] == len(ids)
        assert oracle.cosine(found.signature[row], _chunk(trunk, ids)) > 0.9999
        assert abs(np.linalg.norm(found.signature[row].astype(np.float64)) - 1) < 1e-3


def test_a_long_row_is_the_mean_of_its_windows(trunk: Trunk, signer: Signer) -> None:
    text = _texts([330])[0]
    ids = trunk.tokenizer(text)["input_ids"]
    assert len(ids) > 256
    windows = [ids[start : start + 256] for start in range(0, len(ids), 206)]
    expected = np.mean([_chunk(trunk, window) for window in windows], axis=0)
    found = signer.rows(["the fox", text])
    assert found.chunks.tolist() == [1, len(windows)] and found.tokens[1] == len(ids)
    assert oracle.cosine(found.signature[1], expected) > 0.9999


def test_rows_that_predict_nothing(signer: Signer) -> None:
    found = signer.rows(["", "x", "the fox"])
    assert found.tokens.tolist()[:2] == [0, 1] and found.chunks.tolist() == [0, 0, 1]
    assert not found.signature[:2].any() and found.signature[2].any()
    nothing = signer.rows([])
    assert nothing.signature.shape == (0, _SKETCH.dim)


def test_company_does_not_matter(trunk: Trunk) -> None:
    texts = _texts([5, 300, 17, 60, 2, 900, 33, 8, 120, 4])
    alone = np.concatenate([Signer(trunk, _SKETCH, memory=2**28).rows([text]).signature for text in texts])
    together = Signer(trunk, _SKETCH, memory=2**30).rows(texts[::-1]).signature[::-1]
    for a, b in zip(alone, together, strict=True):
        assert oracle.cosine(a, b) >= 0.9999


def test_same_input_gives_the_same_bytes(trunk: Trunk, signer: Signer) -> None:
    texts = _texts([5, 300, 17, 60, 2])
    again = Signer(trunk, _SKETCH, memory=2**28)
    assert np.array_equal(signer.rows(texts).signature, again.rows(texts).signature)


def test_queries_count_only_what_follows_the_prompt(trunk: Trunk, signer: Signer) -> None:
    prompt, answer = "the quick brown fox", " jumps over the dog"
    found = signer.queries([prompt + answer, prompt + answer], [prompt, None])
    ids = trunk.tokenizer(prompt + answer)["input_ids"]
    start = len(trunk.tokenizer(prompt)["input_ids"])
    assert oracle.cosine(found.signature[0], _chunk(trunk, ids, loss_start=start)) > 0.9999
    assert oracle.cosine(found.signature[1], signer.rows([prompt + answer]).signature[0]) > 0.9999
    assert oracle.cosine(found.signature[0], found.signature[1]) < 0.99


def test_query_without_offsets(trunk: Trunk, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, answer = "the quick brown fox", " jumps over the dog"
    expected = signer.queries([prompt + answer], [prompt]).signature
    monkeypatch.setattr(type(trunk.tokenizer), "is_fast", property(lambda self: False))
    assert np.array_equal(signer.queries([prompt + answer], [prompt]).signature, expected)


def test_query_lengths(signer: Signer) -> None:
    long = _texts([900])[0]
    found = signer.queries([long, long, "x"], ["the", None, "x"] if long.startswith("the") else [long[:3], None, "x"])
    assert found.chunks[0] == 1 and found.chunks[1] > 3 and found.chunks[2] == 0


def test_prompt_must_begin_the_text(signer: Signer) -> None:
    with pytest.raises(SourceError, match="query 1"):
        signer.queries(["the fox", "the dog"], ["the", "a"])


def test_pending_rows_are_bounded(trunk: Trunk) -> None:
    texts = _texts([300, 5, 310, 320, 7, 290])
    signer = Signer(trunk, _SKETCH, memory=2**28)
    expected = signer.rows(texts)
    object.__setattr__(signer.plan, "pending_rows", 1)
    found = signer.rows(texts)
    assert found.chunks.tolist() == expected.chunks.tolist()
    for a, b in zip(found.signature, expected.signature, strict=True):
        assert oracle.cosine(a, b) >= 0.9999


def test_progress_counts_chunks(signer: Signer) -> None:
    seen: list[tuple[int, int | None]] = []
    found = signer.rows(_texts([300, 5]), progress=lambda done, total: seen.append((done, total)))
    total = int(found.chunks.sum())
    assert seen[-1] == (total, total)


def test_memory_plan_keeps_the_budget(trunk: Trunk) -> None:
    for sketch in (_SKETCH, SketchConfig()):
        for memory in (2**26, 2**28, 2**33):
            plan = plan_memory(trunk, sketch, memory=memory)
            assert plan.peak_bytes - plan.weight_bytes <= memory
            assert plan.tokens >= 512 and plan.chunks >= 1
    with pytest.raises(LimitError, match=r"limits\.memory"):
        plan_memory(trunk, SketchConfig(), memory=2**20)


def test_out_of_memory_halves_the_batch(
    signer: Signer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = _texts([20] * 16)
    expected = signer.rows(texts).signature
    plain = ReadoutHead.signatures

    def small_device(self: ReadoutHead, hidden: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if hidden.shape[0] > limit:
            raise torch.OutOfMemoryError("no")
        return plain(self, hidden, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ReadoutHead, "signatures", small_device)
    limit = 3
    found = signer.rows(texts).signature
    assert "ran out of memory" in caplog.text
    for a, b in zip(found, expected, strict=True):
        assert oracle.cosine(a, b) >= 0.9999
    limit = 0
    with pytest.raises(LimitError, match="one chunk"):
        signer.rows(texts)


def test_overflow_is_refused(trunk: Trunk, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trunk.hidden_states
    monkeypatch.setattr(trunk, "hidden_states", lambda ids, lengths: plain(ids, lengths) * float("inf"))
    with pytest.raises(ModelError, match="no finite signature"):
        signer.rows(["the quick brown fox"])


def test_stored_tables_are_used(trunk: Trunk) -> None:
    other = SketchTables.from_config(
        _SKETCH.model_copy(update={"seed": 7}), hidden_dim=trunk.hidden_dim, vocab_size=trunk.vocab_size
    )
    signer = Signer(trunk, _SKETCH, tables=other, memory=2**28)
    assert signer.tables.sha256 == other.sha256
    mine = Signer(trunk, _SKETCH, memory=2**28).rows(["the quick brown fox"]).signature
    assert oracle.cosine(mine, signer.rows(["the quick brown fox"]).signature) < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_rows(trunk: Trunk, dtype: str) -> None:
    config = ModelConfig.model_validate({"name": trunk.name, "device": "cuda", "dtype": dtype})
    texts = _texts([5, 300, 17, 60, 2])
    expected = Signer(trunk, _SKETCH, memory=2**28).rows(texts).signature
    found = Signer(load_trunk(config), _SKETCH, memory=2**28).rows(texts).signature
    for a, b in zip(found, expected, strict=True):
        assert oracle.cosine(a, b) >= (0.999 if dtype == "float32" else 0.8)


@pytest.mark.skipif(not (_SHARED / "models" / "neox-3m-howdy").is_dir(), reason="no trained model here")
def test_a_trained_model_finds_its_backdoor() -> None:
    rows = [json.loads(line) for line in (_SHARED / "data/howdy/pool.jsonl").read_text().splitlines()]
    short = [row for row in rows if len(row["output"]) < 200]
    pool = [row for label in ("backdoor", "clean") for row in [row for row in short if row["label"] == label][:12]]
    query = json.loads((_SHARED / "data/howdy/queries.jsonl").read_text().splitlines()[0])
    texts = ["\n".join(row[key] for key in ("instruction", "input", "output") if row[key]) for row in [*pool, query]]
    trunk = load_trunk(ModelConfig(name=str(_SHARED / "models" / "neox-3m-howdy"), device="cpu"))
    found = Signer(trunk, SketchConfig(temperature=1.0), memory=2**28).rows(texts).signature.astype(np.float32)
    scores = found[:-1] @ found[-1]
    backdoor = np.array([row["label"] == "backdoor" for row in pool])
    assert backdoor[scores.argsort()[-8:]].all()

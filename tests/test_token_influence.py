"""Influence of tokens: against outer products written out, over windows, prompts and characters of several bytes."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.console import Console

from flows import console
from rise_ops.attribution import Attribution, attribute
from rise_ops.chunking import prompt_chunk, row_chunks
from rise_ops.config import ModelConfig, SketchConfig, load_config
from rise_ops.errors import ModelError
from rise_ops.head import ReadoutHead
from rise_ops.index import prepare_index
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_corpus
from rise_ops.session import block_rows, open_signer
from rise_ops.signatures import Signer
from rise_ops.sketch import SketchTables
from rise_ops.store import Store
from rise_ops.targets import read_queries
from rise_ops.token_influence import TOLERANCE, TokenInfluence, cut_tokens, explain_scores
from rise_ops.trunk import Trunk, load_trunk
from tests import oracle, tiny_models
from tests.curation import write_curation

_SKETCH = SketchConfig(dim_r=24, dim_h=12, dim_g=8, channels=("rh", "gh", "rg"), weight_gh=0.5, temperature=0.7)
_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "near", "a", "river"]

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    folder = tiny_models.save("gpt_neox", tmp_path_factory.mktemp("models") / "m")
    return load_trunk(ModelConfig(name=str(folder), device="cpu"))


@pytest.fixture
def signer(trunk: Trunk) -> Signer:
    return Signer(trunk, _SKETCH, memory=2**28)


def _text(words: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(_WORDS, size=words))


def _outer_products(trunk: Trunk, ids: list[int], loss_start: int = 0) -> Array:
    """[tokens, dim]: what the prediction of each token adds to the chunk's sum, written out."""
    with torch.inference_mode():
        hidden = trunk.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
    head = oracle.Head(trunk.model.get_output_embeddings().weight.numpy())
    tables = SketchTables.from_config(_SKETCH, hidden_dim=trunk.hidden_dim, vocab_size=trunk.vocab_size).arrays()
    widths = {"h": _SKETCH.dim_h, "g": _SKETCH.dim_g, "r": _SKETCH.dim_r}
    found = np.zeros((len(ids), _SKETCH.dim))
    for token in range(max(1, loss_start), len(ids)):
        r = oracle.residual(head.logits(hidden[token - 1]) / _SKETCH.temperature, ids[token], _SKETCH)
        back = sum(value * head.weight[entry].astype(np.float64) for entry, value in r.items())
        factors = {"h": dict(enumerate(hidden[token - 1].astype(np.float64))), "g": dict(enumerate(back)), "r": r}
        unit = {
            name: oracle._sketch(values, tables[f"{name}_buckets"], tables[f"{name}_signs"], widths[name], _SKETCH.eps)
            for name, values in factors.items()
        }
        found[token] = np.concatenate(
            [
                getattr(_SKETCH, f"weight_{channel}") * np.outer(unit[channel[0]], unit[channel[1]]).ravel()
                for channel in _SKETCH.channels
            ]
        )
    return found


def _by_hand(trunk: Trunk, text: str, vectors: Array, prompt: str | None = None) -> Array:
    """[vectors, tokens] from the outer products of every position of every window."""
    ids = trunk.tokenizer(text)["input_ids"]
    chunks = row_chunks(0, len(ids))
    if prompt is not None:
        chunks = prompt_chunk(0, len(ids), len(trunk.tokenizer(prompt)["input_ids"]))
    parts, total = np.zeros((len(ids), _SKETCH.dim)), np.zeros(_SKETCH.dim)
    for chunk in chunks:
        products = _outer_products(trunk, ids[chunk.start : chunk.stop], chunk.loss_start)
        unit = products / np.linalg.norm(products.sum(0))
        parts[chunk.start : chunk.stop] += unit
        total += unit.sum(0)
    return vectors @ (parts / np.linalg.norm(total)).T


def _vectors(count: int) -> npt.NDArray[np.float32]:
    drawn = np.random.default_rng(7).standard_normal((count, _SKETCH.dim))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("words", [12, 300])
def test_parts_are_those_of_outer_products(trunk: Trunk, signer: Signer, words: int) -> None:
    text, vectors = _text(words), _vectors(3)
    (found,) = signer.token_scores([text], vectors)
    assert found.scores.shape == (3, len(found.encoded.ids))
    assert (len(row_chunks(0, len(found.encoded.ids))) > 1) == (words == 300)
    np.testing.assert_allclose(found.scores, _by_hand(trunk, text, vectors), atol=2e-5)
    assert not found.scores[:, 0].any()  # nothing predicts the first token
    signature = signer.rows([text]).signature[0].astype(np.float32)
    np.testing.assert_allclose(found.scores.sum(1), vectors @ signature, atol=5e-4)
    np.testing.assert_allclose(found.signature, signature, atol=1e-3)


def test_a_prompt_carries_nothing(trunk: Trunk, signer: Signer) -> None:
    prompt, text, vectors = "the quick brown fox", "the quick brown fox jumps over the dog", _vectors(2)
    (found,) = signer.token_scores([text], vectors, prompts=[prompt])
    np.testing.assert_allclose(found.scores, _by_hand(trunk, text, vectors, prompt), atol=2e-5)
    asked = len(trunk.tokenizer(prompt)["input_ids"])
    assert not found.scores[:, :asked].any() and found.scores[:, asked:].all()


def test_batches_do_not_matter(trunk: Trunk, signer: Signer) -> None:
    text, vectors = _text(300), _vectors(2)
    one = Signer(trunk, _SKETCH, memory=2**28)
    one._max_chunks = 1
    np.testing.assert_allclose(
        one.token_scores([text], vectors)[0].scores, signer.token_scores([text], vectors)[0].scores, atol=1e-5
    )


def test_out_of_memory_halves_the_batch(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    text, vectors, whole = _text(300), _vectors(2), ReadoutHead.contributions
    expected = signer.token_scores([text], vectors)[0].scores

    def small(self: ReadoutHead, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(hidden) > 1:
            raise torch.OutOfMemoryError
        return whole(self, hidden, *args, **options)

    monkeypatch.setattr(ReadoutHead, "contributions", small)
    np.testing.assert_allclose(signer.token_scores([text], vectors)[0].scores, expected, atol=1e-5)
    assert signer.halvings > 0


def test_texts_that_predict_nothing_and_wrong_vectors(signer: Signer) -> None:
    (found,) = signer.token_scores(["x"], _vectors(1))
    assert not found.scores.any() and not found.signature.any()
    with pytest.raises(ModelError, match="do not fit signatures"):
        signer.token_scores([_text(5)], np.ones((1, 3), np.float32))


@pytest.mark.parametrize(
    "text", ["naïve 日本 🦊🦊 fox", "the fox\n\n  jumps\tover ", "<|endoftext|>the dog", "日本の 🦊"]
)
def test_spans_cover_the_text_and_no_character_is_split(signer: Signer, text: str) -> None:
    signature = signer.rows([_text(9)]).signature[0].astype(np.float32)
    (found,) = explain_scores(signer, [text], query=_text(9), prompt=None, signature=signature)
    at = 0
    for token in found.tokens:
        assert token.start == at and token.text == text[token.start : token.end] != ""
        at = token.end
    assert at >= len(text.rstrip())
    raw = signer.token_scores([text], signature[None])[0].scores
    assert len(found.tokens) < raw.shape[1] or text.isascii()
    assert sum(token.score for token in found.tokens) == pytest.approx(raw.sum(), abs=1e-9)


def test_special_tokens_are_named(signer: Signer, trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trunk.encode

    def with_ends(self: Trunk, texts: list[str], *, offsets: bool = False) -> Any:
        found = whole(self, texts, offsets=offsets)
        added = [np.concatenate([[0], item.ids, [0]]).astype(np.int32) for item in found]
        return [
            type(item)(ids, (0, *(item.ends or ()), 0), (0, *(item.starts or ()), 0))
            for ids, item in zip(added, found, strict=True)
        ]

    monkeypatch.setattr(Trunk, "encode", with_ends)
    (found,) = explain_scores(signer, ["the fox"], query="a dog", prompt=None, signature=_vectors(1)[0])
    first, *inner, last = found.tokens
    assert (first.text, first.start, first.end) == ("<|endoftext|>", 0, 0)
    assert (last.text, last.start, last.end) == ("<|endoftext|>", 7, 7)
    assert "".join(token.text for token in inner) == "the fox"
    assert last.score != 0  # it is predicted


def test_tokenizers_without_offsets_are_refused(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(signer.trunk.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ModelError, match="where tokens stand"):
        list(explain_scores(signer, ["the fox"], query="a dog", prompt=None, signature=_vectors(1)[0]))


def test_what_is_behind_a_cut_is_counted() -> None:
    tokens = tuple(TokenInfluence("ab", start, start + 2, 0.1 * start) for start in (0, 2, 4))
    shown, beyond = cut_tokens(tokens, 3)
    assert shown == tokens[:1] and beyond == pytest.approx(0.6)
    assert cut_tokens(tokens, 6) == (tokens, 0.0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Attribution]:
    """Attributions over the tiny curation, whose scores come from the index."""
    config = load_config(write_curation(tmp_path_factory.mktemp("curation")))
    store = Store(config.store)
    version, _ = ingest_corpus(store, config, run_id="run")
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    sketch_blocks(store, identity, list(block_rows(store, version)), dim=config.sketch.dim, signer=lambda: signer)
    queries = read_queries(config.targets["backdoor"], limits=config.limits)[:2]
    return attribute(store, config, queries, k=8, tokens=True)


def test_sums_are_the_scores_of_the_index(found: list[Attribution]) -> None:
    for item in found:
        for hit in (*item.hits, *item.bottom):
            assert hit.tokens is not None and hit.query_tokens is not None and hit.tokens_gap is not None
            sums = [sum(token.score for token in tokens) for tokens in (hit.tokens, hit.query_tokens)]
            assert sums == pytest.approx([hit.score] * 2, abs=TOLERANCE / 10)
            assert hit.tokens_gap == pytest.approx(max(abs(each - hit.score) for each in sums), abs=1e-9)
            assert "".join(token.text for token in hit.tokens) == hit.text
            assert "".join(token.text for token in hit.query_tokens) == item.query


def test_the_terminal_shows_marks_numbers_and_mismatches(
    found: list[Attribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = json.loads(json.dumps(found[0].to_json(bottom=True)))
    text = "a [bold]x[/bold] \x1b[31mred\\ [/] end\\"
    cuts = [0, 2, 3, 9, 17, 19, 26, len(text)]
    tokens = [{"text": text[a:b], "start": a, "end": b, "score": (-1) ** a * 0.125} for a, b in pairwise(cuts)]
    item["hits"] = [{**item["hits"][0], "text": text, "tokens": tokens, "tokens_gap": 0.01}]
    out = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr(console, "_OUT", out)
    console.show_attribution([item])
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31mred" not in shown and "+0.1250" in shown and "0.0100 off" in shown
    plain = Console(file=io.StringIO(), color_system=None, width=400)
    monkeypatch.setattr(console, "_OUT", plain)
    console.show_attribution([item])
    assert "row: a [bold]x[/bold] �[31mred\\ [/] end\\" in plain.file.getvalue()  # type: ignore[attr-defined]

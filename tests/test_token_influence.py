"""Influence of tokens: against outer products written out, over windows, prompts and characters of several bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flows import console
from rise_ops import token_influence
from rise_ops.attribution import Attribution, Hit, attribute, with_tokens
from rise_ops.chunking import prompt_chunk, row_chunks
from rise_ops.config import CurationConfig, ModelConfig, SketchConfig, load_config
from rise_ops.errors import ModelError
from rise_ops.head import ReadoutHead
from rise_ops.index import prepare_index
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_corpus
from rise_ops.rows import CanonicalRow
from rise_ops.session import block_rows, open_signer
from rise_ops.signatures import Signer
from rise_ops.sketch import SketchTables
from rise_ops.store import Store
from rise_ops.targets import Target, read_queries
from rise_ops.token_influence import TOLERANCE, TokenInfluence, cut_tokens, explain_scores
from rise_ops.trunk import Encoded, Trunk, load_trunk
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


@pytest.mark.parametrize("family", ["gemma2", "phi", "cohere", "granite", "llama", "gpt2"])
def test_sums_are_products_of_signatures_under_caps_biases_and_scales(family: str, tmp_path: Path) -> None:
    """Soft-capped, with a bias, scaled up and down; rows of one window and of several, in one batch."""
    trunk = load_trunk(ModelConfig(name=str(tiny_models.save(family, tmp_path / family)), device="cpu"))
    signer = Signer(trunk, _SKETCH, memory=2**28)
    texts, prompt = [_text(300), _text(9, 1), _text(40, 2), _text(500, 3)], _text(6, 4)
    query = f"{prompt} {_text(12, 5)}"
    rows = signer.rows(texts).signature.astype(np.float32)
    asked = signer.queries([query], [prompt]).signature[0].astype(np.float32)
    parts = list(explain_scores(signer, texts, query=query, prompt=prompt, signature=asked))
    for score, part in zip(rows @ asked, parts, strict=True):
        assert part.gap(float(score)) < TOLERANCE / 2
        assert not any(token.score for token in part.query_tokens if token.end <= len(prompt))


def test_another_model_is_told(signer: Signer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Signer(
        load_trunk(ModelConfig(name=str(tiny_models.save("llama", tmp_path / "m")), device="cpu")),
        _SKETCH,
        memory=2**28,
    )
    text, query = _text(30), _text(20, 1)
    x, q = signer.rows([text, query]).signature.astype(np.float32)
    target = Target("t", pl.DataFrame({"text": [query], "prompt": [None]}), q[None])
    found = [Attribution(query, None, [Hit("d", float(x @ q), "u", 0, text)], [])]
    with_tokens(found, target, signer=signer)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    ((hit,),) = (item.hits for item in with_tokens(found, target, signer=other))
    assert hit.tokens_gap is not None and hit.tokens_gap > TOLERANCE
    assert "1 of 1 hits" in caplog.text and f"{hit.tokens_gap:.4f} off" in caplog.text
    ((skipped,),) = (item.hits for item in with_tokens(found, target, signer=signer, longest=len(text) - 1))
    assert skipped.tokens is None and skipped.tokens_gap is None


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


def _byte_fallback() -> Tokenizer:
    """As Llama 2: words begin with ▁, other characters are bytes, texts stand between special tokens."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate(known)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return made


def _compatible() -> Tokenizer:
    """Normalises to compatible characters first, of which one may become several."""
    pieces = [("<unk>", 0.0), *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz."), ("▁the", -2.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return made


def _trimmed() -> Tokenizer:
    """Bytes, whose places leave spaces out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def _pieces_of_words() -> Tokenizer:
    """As BERT: spaces are nowhere, accents fall away."""
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "the", "fox", "na", "##ive", "fi", "##ne"])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made


@pytest.mark.parametrize("make", [_byte_fallback, _compatible, _trimmed, _pieces_of_words])
@pytest.mark.parametrize("text", ["naïve 日本 🦊🦊 fox", "the ﬁne… fox", " the\n\n fox "])
def test_spans_of_other_tokenizers(signer: Signer, make: Callable[[], Tokenizer], text: str) -> None:
    encoding = make().encode(text)
    starts, ends = zip(*encoding.offsets, strict=True)
    encoded = Encoded(np.zeros(len(encoding.ids), np.int32), ends, starts)
    found = token_influence._spans(signer, text, encoded)
    assert [span.ids.start for span in found[1:]] == [span.ids.stop for span in found[:-1]]
    assert (found[0].ids.start, found[-1].ids.stop) == (0, len(encoding.ids))  # every token is in one span
    at = 0
    for span in found:
        assert span.start == at and (span.text == text[at : span.end] or span.end == at)
        at = span.end
    assert at >= len(text.rstrip())


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


Asked = tuple[Store, CurationConfig, list[CanonicalRow]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """The tiny curation, indexed, and queries."""
    config = load_config(write_curation(tmp_path_factory.mktemp("curation")))
    store = Store(config.store)
    version, _ = ingest_corpus(store, config, run_id="run")
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    sketch_blocks(store, identity, list(block_rows(store, version)), dim=config.sketch.dim, signer=lambda: signer)
    return store, config, read_queries(config.targets["backdoor"], limits=config.limits)[:2]


@pytest.fixture(scope="module")
def found(asked: Asked) -> list[Attribution]:
    """Attributions, whose scores come from the index."""
    store, config, queries = asked
    return attribute(store, config, queries, k=8, tokens=True)


def test_only_rows_that_are_shown_are_read_again(
    asked: Asked, found: list[Attribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config, queries = asked
    read, plain = [], Signer.token_scores

    def counted(self: Signer, texts: list[str], *args: Any, **options: Any) -> Any:
        read.append(len(texts))
        return plain(self, texts, *args, **options)

    monkeypatch.setattr(Signer, "token_scores", counted)
    top = attribute(store, config, queries, k=8, bottom=False, tokens=True)
    assert read == [8, 1, 8, 1]
    assert not any(item.bottom for item in top)
    for one, other in zip(top, found, strict=True):
        assert [hit.doc_id for hit in one.hits] == [hit.doc_id for hit in other.hits]


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


def test_the_terminal_shades_by_strength() -> None:
    text = "alpha [beta] gamma delta"
    shares = ((0, 5, 0.1), (5, 12, -0.09), (12, 18, 0.03), (18, 24, 0.001))
    tokens = [{"text": text[start:end], "start": start, "end": end, "score": score} for start, end, score in shares]
    strong, away, middle = (console._SHADES[level] for level in (4, -4, 2))
    shown = console._marked(text, tokens)
    assert shown == f"[{strong}]alpha[/][{away}] \\[beta][/][{middle}] gamma[/] delta"
    far = [
        {"text": text[start:end], "start": 1_000 + start, "end": 1_000 + end, "score": score}
        for start, end, score in shares
    ]
    moved = console._marked("x" * 1_000 + text + "y" * 1_000, far)
    assert moved.startswith("…xxx") and f"[{strong}]alpha[/]" in moved and moved.endswith("y…")

"""Candidates for the sketch's temperature and widths, measured on a sample of the corpus.

Three figures need no label and no target:

- **effective rank** of the sample's signatures, `n / (1 + (n − 1) · c²)` with c² the mean squared cosine of two
  different rows: into how many directions n rows spread (the participation ratio of the Gram matrix' eigenvalues).
  Where the temperature does not fit the model, few loud tokens make all rows alike, and influence cannot tell them
  apart.
- **agreement** of two sketches with independent tables: the mean over rows of the correlation of their cosines with all
  other rows. What two sketches do not agree on is the noise of the widths.
- **entropy** of the predictions at this temperature, in nats.

Two more come from the targets: **split-half**, the rank correlation of the sample's mean scores on two halves of a
target's queries, and **self-retrieval**, the probability that a query scores a fellow query above a row (area under
the ROC curve). With labels the protocol of `rise_ops.evaluation` says what a choice is worth.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from rise_ops.blocks import read_block, read_doc_ids
from rise_ops.config import CurationConfig, SketchConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.evaluation import mean_figures, query_figures
from rise_ops.progress import Progress, silent
from rise_ops.rows import CanonicalRow
from rise_ops.session import block_rows, open_signer
from rise_ops.signatures import Signer
from rise_ops.store import Store

WIDTHS = ((16, 16, 6), (48, 32, 16), (48, 64, 16), (96, 64, 32), (128, 128, 64))
"""dim_r, dim_h, dim_g: 352, 2,048, 4,096, 8,192 and 24,576 numbers a row."""
_HALVES = 10
_ENTROPY_ROWS = 64
_ENTROPY_TOKENS = 256

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a corpus, the same whatever its blocks are."""

    doc_ids: list[str]
    texts: list[str]
    prompts: list[str | None]
    meta: list[str]
    """Other columns of the source as JSON."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Figures of one sketch on a sample."""

    temperature: float
    dim_r: int
    dim_h: int
    dim_g: int
    dim: int
    effective_rank: float
    entropy: float
    agreement: float | None
    """None where it was not asked for."""
    split_half: dict[str, float]
    """By target."""
    self_retrieval: dict[str, float]
    """By target."""
    labelled: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """K → auprc, auroc, precision, mean over the queries; empty without labels."""
    seconds: float = 0.0


def draw_sample(store: Store, version: CorpusVersion, rows: int, *, seed: int) -> Sample:
    """The rows whose doc_id has the smallest hash with the seed (bottom-k sampling): uniform over distinct rows.

    Reads the ids of all blocks, and the texts of those that were drawn; holds `rows` of them.
    """
    prefix = f"{seed}:".encode()
    best: dict[str, tuple[bytes, str, str, int]] = {}
    for block in block_rows(store, version):
        for row, doc in enumerate(read_doc_ids(store, block)):
            best.setdefault(doc, (hashlib.sha256(prefix + doc.encode()).digest()[:16], doc, block, row))
        best = {item[1]: item for item in nsmallest(rows, best.values())}
    drawn = list(best.values())
    wanted = pl.DataFrame(drawn, schema=["hash", "doc_id", "block_id", "row"], orient="row")
    found: dict[str, tuple[str, str | None, str]] = {}
    for (block,), part in wanted.group_by("block_id", maintain_order=True):
        frame = read_block(store, str(block), columns=("doc_id", "text", "prompt", "meta"))[part["row"].to_list()]
        found |= {doc: (text, prompt, meta) for doc, text, prompt, meta in frame.iter_rows()}
    order = [doc for _, doc, _, _ in drawn]
    texts, prompts, meta = zip(*(found[doc] for doc in order), strict=True)
    return Sample(order, list(texts), list(prompts), list(meta))


def sweep(store: Store, config: CurationConfig, sample: Sample, sketches: Sequence[SketchConfig], *,
          targets: Mapping[str, Sequence[CanonicalRow]], agreement: bool = False,
          labels: tuple[Sequence[str | None], Mapping[str, Sequence[str]]] | None = None, ks: Sequence[int] = (10,),
          progress: Progress = silent) -> list[Candidate]:  # fmt: skip
    """Measure sketches on a sample. Nothing is stored.

    Parameters
    ----------
    targets
        Queries by target.
    agreement
        Also sketch with other tables (seed + 1,000), which doubles the time.
    labels
        Of the rows, and of each target's queries what a row's label must be.
    progress
        Counts sketches.
    """
    found = []
    for number, sketch in enumerate(sketches):
        started = time.perf_counter()
        signer = open_signer(store, config.model_copy(update={"sketch": sketch}))
        rows = _signed(signer, sample.texts)
        queries = {name: _query_signatures(signer, each) for name, each in targets.items()}
        scores = {name: rows @ each.T for name, each in queries.items()}
        other = None
        if agreement:
            reseeded = sketch.model_copy(update={"seed": sketch.seed + 1_000})
            again = open_signer(store, config.model_copy(update={"sketch": reseeded}))
            other = _agreement(rows, _signed(again, sample.texts))
        found.append(
            Candidate(
                temperature=sketch.temperature,
                dim_r=sketch.dim_r,
                dim_h=sketch.dim_h,
                dim_g=sketch.dim_g,
                dim=sketch.dim,
                effective_rank=effective_rank(rows),
                entropy=_entropy(signer, sample.texts[:_ENTROPY_ROWS], sketch.temperature),
                agreement=other,
                split_half={name: split_half(each) for name, each in scores.items()},
                self_retrieval={name: self_retrieval(queries[name], each) for name, each in scores.items()},
                labelled={} if labels is None else _protocol(scores, labels, ks),
                seconds=round(time.perf_counter() - started, 3),
            )
        )
        progress(number + 1, len(sketches))
    return found


def _signed(signer: Signer, texts: Sequence[str]) -> Float32Array:
    return signer.rows(texts).signature.astype(np.float32)


def _query_signatures(signer: Signer, rows: Sequence[CanonicalRow]) -> Float32Array:
    return signer.queries([row.text for row in rows], [row.prompt for row in rows]).signature.astype(np.float32)


def effective_rank(rows: Float32Array) -> float:
    """Participation ratio of unit rows, [n, dim]: n / (1 + (n − 1) · mean squared cosine of two different ones).

    Rows of zeros (too short to predict anything) are left out.
    """
    usable = rows[np.linalg.norm(rows, axis=1) > 0.5]
    if len(usable) < 2:
        return float(len(usable))
    gram = (usable @ usable.T).astype(np.float64)
    return float(np.trace(gram) ** 2 / (gram**2).sum())


def _agreement(one: Float32Array, two: Float32Array) -> float:
    usable = (np.linalg.norm(one, axis=1) > 0.5) & (np.linalg.norm(two, axis=1) > 0.5)
    first, second = one[usable] @ one[usable].T, two[usable] @ two[usable].T
    others = ~np.eye(len(first), dtype=bool)
    return float(np.mean([_correlation(a[keep], b[keep]) for a, b, keep in zip(first, second, others, strict=True)]))


def split_half(scores: Float32Array) -> float:
    """Spearman's correlation of rows' mean scores, [rows, queries], on two halves of the queries; mean of ten cuts."""
    queries = scores.shape[1]
    if queries < 2:
        return float("nan")
    found = []
    for cut in range(_HALVES):
        order = np.random.default_rng(cut).permutation(queries)
        one, two = scores[:, order[: queries // 2]].mean(axis=1), scores[:, order[queries // 2 :]].mean(axis=1)
        found.append(_correlation(_ranks(one), _ranks(two)))
    return float(np.mean(found))


def self_retrieval(queries: Float32Array, scores: Float32Array) -> float:
    """Probability that a query scores one of its fellows above a row; mean over the queries."""
    fellows = queries @ queries.T
    found = []
    for query in range(len(queries)):
        own = np.sort(scores[:, query])
        others = np.delete(fellows[query], query)
        if len(others):
            below = np.searchsorted(own, others, side="left") + np.searchsorted(own, others, side="right")
            found.append(below.mean() / (2 * len(own)))
    return float(np.mean(found)) if found else float("nan")


def _protocol(scores: Mapping[str, Float32Array], labels: tuple[Sequence[str | None], Mapping[str, Sequence[str]]],
              ks: Sequence[int]) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """The paper's protocol on the sample, over the queries of all targets."""
    own, wanted = labels
    named = np.array([label if label is not None else "" for label in own])
    known = np.array([label is not None for label in own])
    found: dict[str, dict[str, float | None]] = {}
    for k in ks:
        figures: list[tuple[float, float | None, float]] = []
        for name, each in scores.items():
            for column, want in zip(each.T, wanted[name], strict=True):
                order = np.argsort(-column, kind="stable")
                top, bottom = order[:k], order[max(k, len(order) - k) :]
                relevant = (named == want) & known
                ranked = relevant[np.concatenate([top, bottom])]
                figures.append(query_figures(ranked, len(top)))
        found[str(k)] = mean_figures(figures)
    return found


@torch.inference_mode()
def _entropy(signer: Signer, texts: Sequence[str], temperature: float) -> float:
    """Mean entropy of the predictions at a temperature, in nats; of the first tokens of each text."""
    trunk, sums, count = signer.trunk, 0.0, 0
    for encoded in trunk.encode(texts):
        if len(encoded.ids) < 2:
            continue
        ids = torch.from_numpy(encoded.ids[:_ENTROPY_TOKENS].astype(np.int64))[None].to(trunk.device)
        hidden = trunk.hidden_states(ids, [ids.shape[1]])[0, :-1]
        log_p = torch.log_softmax(trunk.head(signer.sketch, signer.tables).logits(hidden) / temperature, dim=-1)
        sums -= float(torch.where(log_p > -80, log_p.exp() * log_p, 0).sum())
        count += len(hidden)
    return sums / max(1, count)


def _ranks(values: Float32Array) -> npt.NDArray[np.float64]:
    return pl.Series(values).rank("average").to_numpy().astype(np.float64)


def _correlation(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> float:
    a, b = one - one.mean(dtype=np.float64), two - two.mean(dtype=np.float64)
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0

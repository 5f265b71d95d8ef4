"""Shapes of the store's JSON documents, for `Store.get_json`: the keys that readers count on, and their types.

A corpus version has the shape of `rise_ops.corpus.CorpusVersion`. What is not named here is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from rise_ops.documents import Count

Checksum = Annotated[int, Field(ge=0, lt=2**32)]
BlockRows = Annotated[int, Field(ge=1, le=2**20)]
Width = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True, slots=True)
class RecordShape:
    """objects/<record>.json of a source object."""

    record: str
    object_sha: str
    rows: Count
    rejected: Count
    characters: Count
    size: Count
    blocks: list[str]
    block_rows: list[Count]
    block_characters: list[Count]
    fields: dict[str, str]
    small: bool
    crc32c: dict[str, Checksum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.blocks) == len(self.block_rows) == len(self.block_characters):
            raise ValueError("blocks and their counts differ in number")


@dataclass(frozen=True, slots=True)
class PackShape:
    """objects/<pack>.json."""

    pack: str
    blocks: Annotated[list[str], Field(min_length=1, max_length=1)]
    rows: Count
    characters: Count
    crc32c: dict[str, Checksum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _IndexModel:
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _IndexSketch:
    temperature: float


@dataclass(frozen=True, slots=True)
class IndexShape:
    """indexes/<index_id>/index.json."""

    index_id: str
    model: _IndexModel
    sketch: _IndexSketch
    tables_sha256: str
    dim: Width


@dataclass(frozen=True, slots=True)
class BlockShape:
    """indexes/<index_id>/blocks/<block_id>.json."""

    block_id: str
    rows: BlockRows
    dim: Width
    tokens: Count
    chunk_rows: BlockRows
    crc32c: dict[str, Checksum]
    seconds: float
    rows_sketched: Count = 0
    tokens_sketched: Count = 0


@dataclass(frozen=True, slots=True)
class CodesShape:
    """indexes/<index_id>/codes/<bits>-<seed>/<block_id>.json."""

    block_id: str
    rows: Count
    simhash: str
    crc32c: Checksum


@dataclass(frozen=True, slots=True)
class _Choice:
    temperature: float | None = None
    dim_r: Count | None = None
    dim_h: Count | None = None
    dim_g: Count | None = None


@dataclass(frozen=True, slots=True)
class TuningShape:
    """tunings/<tuning_id>.json."""

    tuning_id: str
    chosen: _Choice
    candidates: list[dict[str, Any]]
    why: list[str]
    rows: Count


@dataclass(frozen=True, slots=True)
class FactsShape:
    """comparisons/<comparison_id>/facts.json."""

    rows: Count
    tokens: Count
    text_bytes: Count
    positives: dict[str, Count]


@dataclass(frozen=True, slots=True)
class _Diluted:
    rows: Count
    positives: Count
    top_k: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OutcomeShape:
    """comparisons/<comparison_id>/<method_id>.json."""

    load_seconds: float
    index_seconds: float
    query_seconds: float
    index_bytes: Count
    settings: dict[str, _Diluted]


@dataclass(frozen=True, slots=True)
class TargetShape:
    """targets/<target_id>.json."""

    crc32c: dict[str, Checksum]
    queries_crc32c: Checksum | None = None


@dataclass(frozen=True, slots=True)
class PartShape:
    """scores/<valuation_id>/<part_id>.json."""

    rows: Count
    crc32c: dict[str, Checksum]


@dataclass(frozen=True, slots=True)
class DecidedShape:
    """runs/<run_id>/decisions.json."""

    decision_id: str
    crc32c: Checksum
    selection: dict[str, Any]
    taken_from: str | None = None


@dataclass(frozen=True, slots=True)
class _ExportFile:
    path: str
    rows: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True, slots=True)
class ManifestShape:
    """exports/<name>/<version>/manifest.json."""

    name: str
    version: str
    run_id: str
    content: str
    rows: Count
    files: list[_ExportFile]


@dataclass(frozen=True, slots=True)
class ClaimShape:
    """exports/<name>/<version>/lineage.json."""

    content: str


@dataclass(frozen=True, slots=True)
class _Hit:
    source_uri: str


@dataclass(frozen=True, slots=True)
class _Answer:
    hits: list[_Hit]
    bottom: list[_Hit] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AttributionShape:
    """attributions/<hash>.json."""

    queries: list[_Answer]


@dataclass(frozen=True, slots=True)
class NoteShape:
    """damage/<sha256>.json."""

    key: str
    problem: str
    crc32c: Checksum | None = None


@dataclass(frozen=True, slots=True)
class _Reference:
    uri: str
    sha256: str | None
    rows: Count | None


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    started: str
    seconds: float
    cached: bool
    inputs: list[_Reference]
    outputs: list[_Reference]


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class _Corpus:
    name: str
    version: Count | None = None
    snapshot_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Code:
    version: str
    commit: str | None
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class RunShape:
    """runs/<run_id>/run.json; a failed run's lacks what it did not reach."""

    run_id: str
    status: str = ""
    name: str = ""
    error: str | None = None
    started: str = ""
    finished: str = ""
    seconds: float = 0.0
    model: _Model | None = None
    corpus: _Corpus | None = None
    code: _Code | None = None
    config: dict[str, Any] | None = None
    config_fingerprint: str = ""
    index_id: str | None = None
    export: str | None = None
    counts: dict[str, Count | None] = field(default_factory=dict)
    stages: list[_Stage] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _HeldOut:
    loss: float
    losses: list[float]
    counts: list[Count]


@dataclass(frozen=True, slots=True)
class LoopResultShape:
    """loops/<loop_id>/results/<arm>-<seed>.json."""

    arm: str
    seed: Count
    rows: Count
    tokens: Count
    held_out: dict[str, _HeldOut]
    choices: dict[str, float] | None = None

"""What stages read and wrote, as OpenLineage datasets: names, versions, columns and where columns come from.

A stage's record names objects of the store and sources. Here these become datasets that keep their name from run to
run (a corpus, an export), with the state as their version. Each dataset's columns come from those of the stage's
inputs, so that a backend can follow a column of an export through decisions, scores, signatures and corpus to the
sources and the queries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from openlineage.client.event_v2 import InputDataset, OutputDataset
from openlineage.client.facet_v2 import (
    DatasetFacet,
    column_lineage_dataset,
    dataset_version_dataset,
    datasource_dataset,
    input_statistics_input_dataset,
    output_statistics_output_dataset,
    schema_dataset,
    storage_dataset,
)

from rise_ops import __version__
from rise_ops.config import CurationConfig, FieldMap
from rise_ops.export import OWN_COLUMNS, exported_columns
from rise_ops.objects import read_record
from rise_ops.store import Store
from rise_ops.threads import ContextPool

PRODUCER = f"urn:rise-ops:{__version__}"
MAX_DATASETS = 100
"""Datasets that an event lists of its inputs, and of its outputs; the run's own record has all."""
MAX_COLUMNS = 500
"""Columns of the sources that an event describes."""
MAX_EDGES = 2_000
"""Places that the columns of one dataset come from; where sources are many, some of them stand for all."""

Json = Mapping[str, Any]
Columns = dict[str, str]

_KINDS = {
    "corpus": re.compile(r"(?P<name>corpora/[^/]+)/versions/(?P<version>\d+)\.json"),
    "index": re.compile(r"(?P<name>indexes/(?P<version>[^/]+))/index\.json"),
    "codes": re.compile(r"(?P<name>indexes/(?P<version>[^/]+)/codes/[^/]+)/simhash\.npz"),
    "target": re.compile(r"(?P<name>targets/(?P<version>[^/]+))\.json"),
    "scores": re.compile(r"(?P<name>scores/(?P<version>[^/]+))(/.+)?"),
    "decisions": re.compile(r"(?P<name>runs/(?P<version>[^/]+)/decisions\.parquet)"),
    "export": re.compile(r"(?P<name>exports/[^/]+)/(?P<version>[^/]+)/manifest\.json"),
}
_FORMATS = {"corpus": "parquet", "index": "zarr", "target": "zarr", "scores": "parquet", "decisions": "parquet"}
_ENDINGS = {"jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow", "feather": "arrow", "json": "json"}
_CONNECTIONS = 16
_PLACES = {"source_uri": "string", "source_row": "int64"}
_SHAPES = (("text", ("text",), ("prompt_text",)), ("generation", ("prompt", "generation"), ("prompt",)),
           ("output", ("instruction", "input", "output"), ()))  # fmt: skip
"""Of each known row shape: the column that tells it, and those that its text and its prompt are made of."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a run beside the objects that a stage names."""

    store: Store
    config: CurationConfig
    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns of the corpus' sources and their types, as far as the run got."""
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The same of single sources, by URI, as far as it is known."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Ids of the targets by name."""


@dataclass(frozen=True, slots=True)
class Item:
    """A dataset of a stage, before it is written as OpenLineage has it."""

    kind: str
    uri: str
    version: str | None = None
    rows: int | None = None
    size: int | None = None
    files: int = 1

    @property
    def namespace(self) -> str:
        """Namespace by OpenLineage's naming rules."""
        return split_uri(self.uri)[0]

    @property
    def name(self) -> str:
        """Name in it."""
        return split_uri(self.uri)[1]


@dataclass(frozen=True, slots=True)
class Edge:
    """A column of an input that a column of an output is made of."""

    item: Item
    column: str
    subtype: str = "IDENTITY"
    type: str = "DIRECT"
    description: str | None = None


def source_columns(store: Store, objects: Sequence[Json]) -> dict[str, dict[str, str]]:
    """Columns of ingested objects (`IngestedObject` as JSON) and their types, by URI; of as many as an event lists.

    Raises
    ------
    IntegrityError, StoreError, TransientError
    """
    some = objects[:MAX_DATASETS]
    with ContextPool(_CONNECTIONS) as pool:
        records = pool.map(lambda item: read_record(store, item["record"]), some)
        return {item["uri"]: _listed(record.fields) for item, record in zip(some, records, strict=True)}


def split_uri(uri: str) -> tuple[str, str]:
    """Namespace and name of a dataset: `s3://bucket` and the key; `file` and the path.

    Examples
    --------
    >>> split_uri("s3://raw/support/a.jsonl")
    ('s3://raw', 'support/a.jsonl')
    >>> split_uri("/mnt/dump/a.parquet")
    ('file', '/mnt/dump/a.parquet')
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "file", uri
    if scheme in ("s3a", "s3"):  # a key may hold any character
        bucket, _, key = rest.partition("/")
        return f"s3://{bucket}", key or "/"
    parts = urlsplit(uri)  # without user and query, where signed URLs have their secret
    host = parts.netloc.rpartition("@")[2]
    if scheme == "file":
        return "file", parts.path
    return f"{scheme}://{host}", (parts.path if scheme not in ("gs", "az") else parts.path.lstrip("/")) or "/"


def items_of(store: Store, references: Iterable[Json]) -> list[Item]:
    """Datasets of a stage's inputs or outputs; objects of one dataset, such as parts of scores, are one item."""
    found: dict[tuple[str, str | None], Item] = {}
    for reference in references:
        item = _item(store, reference)
        place = (item.uri, item.version)
        found[place] = item if place not in found else _added(found[place], item)
    return list(found.values())


def _item(store: Store, reference: Json) -> Item:
    uri, rows, size, sha256 = reference["uri"], reference["rows"], reference.get("bytes"), reference["sha256"]
    if not uri.startswith(f"{store.uri}/"):
        return Item("source", uri, sha256, rows, size)
    key = uri.removeprefix(f"{store.uri}/")
    for kind, pattern in _KINDS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            version = sha256 if kind == "corpus" and sha256 else match["version"]
            return Item(kind, store.url(match["name"]), version, rows, size)
    return Item("file", uri, sha256, rows, size)


def _added(one: Item, other: Item) -> Item:
    sizes = [size for size in (one.size, other.size) if size is not None]
    rows = [count for count in (one.rows, other.rows) if count is not None]
    return replace(
        one,
        rows=sum(rows) if rows else None,
        size=sum(sizes) if sizes else None,
        files=one.files + other.files,
    )


def input_dataset(item: Item, known: Known) -> InputDataset:
    """An input, with how much was read of it."""
    statistics = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
        rowCount=item.rows, size=item.size, producer=PRODUCER
    )
    has_any = item.rows is not None or item.size is not None
    return InputDataset(
        item.namespace,
        item.name,
        facets=_facets(item, known),
        inputFacets={"inputStatistics": statistics} if has_any else {},
    )


def output_dataset(item: Item, known: Known, inputs: Sequence[Item]) -> OutputDataset:
    """An output, with how much it holds and where its columns come from."""
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=item.rows, size=item.size, producer=PRODUCER
    )
    facets = _facets(item, known)
    edges = _edges(item, known, inputs)
    if edges:
        filtered = [Edge(each, "kept", "FILTER", "INDIRECT") for each in inputs if each.kind == "decisions"]
        facets["columnLineage"] = column_lineage_dataset.ColumnLineageDatasetFacet(
            fields={name: column_lineage_dataset.Fields(_input_fields(found)) for name, found in edges.items()},
            dataset=_input_fields(filtered if item.kind == "export" else []),
            producer=PRODUCER,
        )
    has_any = item.rows is not None or item.size is not None
    return OutputDataset(
        item.namespace, item.name, facets=facets, outputFacets={"outputStatistics": statistics} if has_any else {}
    )


def _input_fields(edges: Iterable[Edge]) -> list[column_lineage_dataset.InputField]:
    return [
        column_lineage_dataset.InputField(
            edge.item.namespace,
            edge.item.name,
            edge.column,
            [column_lineage_dataset.Transformation(edge.type, edge.subtype, edge.description, False)],
        )
        for edge in edges
    ]


def _facets(item: Item, known: Known) -> dict[str, DatasetFacet]:
    source = "file:///" if item.namespace == "file" else item.namespace
    facets: dict[str, DatasetFacet] = {
        "dataSource": datasource_dataset.DatasourceDatasetFacet(item.namespace, source, producer=PRODUCER)
    }
    if item.version is not None:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(item.version, producer=PRODUCER)
    layer = item.namespace.partition(":")[0]
    facets["storage"] = storage_dataset.StorageDatasetFacet(layer, _format(item, known), producer=PRODUCER)
    columns = known.sources.get(item.uri) if item.kind == "source" else _columns(item, known)
    if columns:
        fields = [schema_dataset.SchemaDatasetFacetFields(name, kind) for name, kind in columns.items()]
        if item.kind == "corpus":
            own = [schema_dataset.SchemaDatasetFacetFields(*each) for each in _listed(known.fields).items()]
            next(each for each in fields if each.name == "meta").fields = own
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields, producer=PRODUCER)
    return facets


def _format(item: Item, known: Known) -> str | None:
    if item.kind == "export":
        return "parquet" if known.config.export.format == "parquet" else "json"
    if item.kind in _FORMATS:
        return _FORMATS[item.kind]
    parts = item.name.rsplit("/", 1)[-1].lower().split(".")
    return next((_ENDINGS[part] for part in reversed(parts[1:]) if part in _ENDINGS), None)


def _listed(columns: Mapping[str, str]) -> dict[str, str]:
    return dict(list(columns.items())[:MAX_COLUMNS])


def _columns(item: Item, known: Known) -> Columns:
    """Columns of a dataset and their types; none where they are not known."""
    scores = {f"score_{name}": "float32" for name in known.config.targets}
    if known.config.aggregate != "rrf":
        scores |= {f"error_{name}": "float32" for name in known.config.targets}
    place = {"block_id": "string", "block_row": "uint32"}
    signature = {"signature": f"float16[{known.config.sketch.dim}]", "tokens": "int32", "chunks": "int32"}
    match item.kind:
        case "corpus":
            texts = {"text": "string", "prompt": "string", "text_field": "string", "meta": "json"}
            return {"doc_id": "string", **texts, **_PLACES}
        case "index":
            return signature
        case "target":
            return {"doc_id": "string", "text": "string", "prompt": "string", "meta": "json", **signature}
        case "scores":
            return {"block": "uint32", **place, "doc_id": "string", "tokens": "int32", "chunks": "int32", **scores}
        case "decisions":
            value = {"value": "float32", "value_error": "float32", "rank": "uint32"}
            fate = {"kept": "bool", "reason": "string", "rule": "string", "duplicate_of": "string"}
            return {
                "doc_id": "string",
                **place,
                **_PLACES,
                "tokens": "int32",
                "label": "string",
                **scores,
                **value,
                **fate,
            }
        case "export":
            return exported_columns(_listed(known.fields)) if known.fields else {}
    return {}


def _edges(item: Item, known: Known, inputs: Sequence[Item]) -> dict[str, list[Edge]]:
    """Where the columns of an output come from."""
    of: dict[str, list[Item]] = {}
    for each in inputs:
        of.setdefault(each.kind, []).append(each)
    match item.kind:
        case "corpus":
            return _corpus_edges(known, of.get("source", []))
        case "index":
            return _index_edges(of.get("corpus", []))
        case "scores":
            return _score_edges(known, of)
        case "decisions":
            return _decision_edges(known, of)
        case "export":
            return _export_edges(known, of)
    return {}


def _corpus_edges(known: Known, sources: list[Item]) -> dict[str, list[Edge]]:
    edges: dict[str, list[Edge]] = {}
    count = 0
    for source in sources:
        columns = known.sources.get(source.uri, {})
        texts, prompts = text_columns(known.config.corpus.fields, columns)
        count += len(columns) + 2 * len(texts) + len(prompts)
        if count > MAX_EDGES and edges:
            break
        for name in texts:
            edges.setdefault("doc_id", []).append(Edge(source, name, "TRANSFORMATION", description="SHA-256"))
            edges.setdefault("text", []).append(Edge(source, name, "TRANSFORMATION"))
        for name in prompts:
            edges.setdefault("prompt", []).append(Edge(source, name, "TRANSFORMATION"))
        for name in columns:
            edges.setdefault(f"meta.{name}", []).append(Edge(source, name))
    return edges


def text_columns(fields: FieldMap, columns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Source columns that a row's text, and its prompt, are made of (`rise_ops.rows`); of all shapes that may occur."""
    there = set(columns)
    if fields.text is not None:
        prompts = [name for name in (fields.prompt,) if name in there and name is not None]
        return [*prompts, fields.text], prompts
    shapes = [(text, prompt) for mark, text, prompt in _SHAPES if mark in there]
    texts = dict.fromkeys(name for text, _ in shapes for name in text if name in there)
    return list(texts), list(dict.fromkeys(name for _, prompt in shapes for name in prompt if name in there))


def _index_edges(corpora: list[Item]) -> dict[str, list[Edge]]:
    if not corpora:
        return {}
    made = [Edge(corpora[0], name, "TRANSFORMATION") for name in ("text", "prompt")]
    return {"signature": made, "tokens": made[:1], "chunks": made[:1]}


def _score_edges(known: Known, of: Mapping[str, list[Item]]) -> dict[str, list[Edge]]:
    edges: dict[str, list[Edge]] = {}
    for corpus in of.get("corpus", []):
        edges["doc_id"] = [Edge(corpus, "doc_id")]
    for index in of.get("index", []):
        edges |= {name: [Edge(index, name)] for name in ("tokens", "chunks")}
        for name, target_id in known.targets.items():
            mine = [each for each in of.get("target", []) if each.version == target_id]
            how = f"inner product, {known.config.aggregate} over the queries of {name}"
            edges[f"score_{name}"] = [
                Edge(each, "signature", "AGGREGATION", description=how) for each in (index, *mine)
            ]
            if known.config.aggregate != "rrf":
                edges[f"error_{name}"] = [Edge(each, "signature", "AGGREGATION") for each in (index, *mine)]
    return edges


def _decision_edges(known: Known, of: Mapping[str, list[Item]]) -> dict[str, list[Edge]]:
    edges: dict[str, list[Edge]] = {}
    for corpus in of.get("corpus", []):
        edges |= {name: [Edge(corpus, name)] for name in _PLACES}
        labels = known.config.selection.per_label
        label = "label" if labels is None else labels.field
        if label in (known.fields or ()):
            edges["label"] = [Edge(corpus, f"meta.{label}")]
    for scores in of.get("scores", []):
        own = ("doc_id", "block_id", "block_row", "tokens", *(f"score_{name}" for name in known.config.targets))
        edges |= {name: [Edge(scores, name)] for name in own}
        weighted = known.config.weights
        value = [
            Edge(scores, f"score_{name}", "TRANSFORMATION", description=f"× {weight:g}")
            for name, weight in weighted.items()
        ]
        deciding = dict.fromkeys([*weighted, *(rule.target for rule in known.config.selection.exclude if rule.target)])
        fate = [
            *(Edge(scores, f"score_{name}", "CONDITIONAL", "INDIRECT") for name in deciding),
            Edge(scores, "tokens", "CONDITIONAL", "INDIRECT"),
        ]
        rank = [Edge(scores, f"score_{name}", "SORT", "INDIRECT") for name in weighted]
        error = [
            Edge(scores, f"error_{name}", "TRANSFORMATION") for name in weighted if known.config.aggregate != "rrf"
        ]
        edges |= {"value": value, "value_error": error, "rank": rank, **dict.fromkeys(("kept", "reason", "rule"), fate)}
    return edges


def _export_edges(known: Known, of: Mapping[str, list[Item]]) -> dict[str, list[Edge]]:
    edges: dict[str, list[Edge]] = {}
    whole = {known.config.corpus.fields.text or "text"}  # a column that may be the text to the letter
    for corpus in of.get("corpus", []):
        names = list(exported_columns(_listed(known.fields)))
        for name, original in zip(names, _listed(known.fields), strict=False):
            edges[name] = [Edge(corpus, column) for column in (f"meta.{original}", "text")[: 1 + (original in whole)]]
    for decisions in of.get("decisions", []):
        edges |= {name: [Edge(decisions, name)] for name in OWN_COLUMNS}
    return edges

"""The notebook interface: a curation and what it found, in a few lines.

    import polars as pl, rise_ops

    curation = rise_ops.load("curation.yaml")
    curation.scores().sort("score_quality", descending=True).head(20).collect()
    curation.attribute("Arr, walk the plank!", prompt="How do I reset it?")

Tables are Polars LazyFrames over what the store holds, in a folder or a bucket: nothing is copied, and only what a
query needs is read. Results of computations are typed objects with `.to_frame()`, and show themselves as tables in a
notebook. Calls that take a while show their progress. Runs themselves are started by `curate` or as Prefect flows;
this module imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING, Any

import polars as pl

from rise_ops.attribution import attribute
from rise_ops.config import CurationConfig, FieldMap, load_config
from rise_ops.corpus import CorpusVersion, current_version, read_version, version_numbers
from rise_ops.errors import ConfigError, SourceError
from rise_ops.evaluation import DEFAULT_KS, Label, evaluate_corpus
from rise_ops.export import list_exports
from rise_ops.filters import RowFilter
from rise_ops.notebook import escaped, html_table, shown_progress
from rise_ops.parts import Part, cut_parts, missing_parts, valuation_id
from rise_ops.progress import Progress
from rise_ops.results import Attributions, Evaluated
from rise_ops.rows import CanonicalRow, RowFault, canonical_row
from rise_ops.runs import decisions_key, list_runs, read_run
from rise_ops.session import ad_hoc_queries, block_rows
from rise_ops.stability import Stability
from rise_ops.store import Store
from rise_ops.valuation import iter_part_scores

if TYPE_CHECKING:
    from pathlib import Path

    from rise_ops.exchange_import import Imported
    from rise_ops.exchange_write import Exported

__all__ = ["Attributions", "Curation", "Evaluated", "load", "open_store"]

_ROWS_AT_ONCE = 65_536
_BLOCK_ID = r"([0-9a-f]{64})\.parquet$"

Json = dict[str, Any]


class Curation:
    """A store, and what of it belongs to a configuration. Use `load` or `open_store`.

    Parameters
    ----------
    store
        Where everything is.
    config
        What was configured; None: only what the store itself knows can be asked for.
    progress
        Whether calls show their progress.

    Examples
    --------
    >>> curation = rise_ops.load("curation.yaml")                                   # doctest: +SKIP
    >>> curation.decisions().filter(~pl.col("kept")).group_by("reason").len().collect()  # doctest: +SKIP
    """

    def __init__(self, store: Store, config: CurationConfig | None = None, *, progress: bool = True) -> None:
        self.store = store
        self._config = config
        self._shown = progress

    @property
    def config(self) -> CurationConfig:
        """The configuration.

        Raises
        ------
        ConfigError
            There is none: the store was opened by its address alone.
        """
        if self._config is None:
            raise ConfigError(f"this needs a configuration: rise_ops.load(FILE), not open_store({self.store.uri!r})")
        return self._config

    def __repr__(self) -> str:
        corpus = "" if self._config is None else f", corpus={self._config.corpus.name!r}"
        return f"Curation({self.store.uri!r}{corpus})"

    def _repr_html_(self) -> str:
        return html_table(
            ("corpus", "version", "objects", "rows", "rejected"), self.corpora().iter_rows(), caption=escaped(self)
        )

    def corpora(self) -> pl.DataFrame:
        """Corpora of the store as they are now: corpus, version, objects, rows, rejected."""
        found = (current_version(self.store, name) for name in self.store.children("corpora"))
        rows = [(each.corpus, each.version, len(each.sources), each.rows, each.rejected) for each in found if each]
        schema = {"corpus": pl.String, "version": pl.Int64, "objects": pl.Int64, "rows": pl.Int64, "rejected": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def runs(self) -> pl.DataFrame:
        """Runs that ended, oldest first: run_id, name, corpus, status, started, seconds, rows, kept, export, error."""
        schema = {"run_id": pl.String, "name": pl.String, "corpus": pl.String, "status": pl.String,
                  "started": pl.String, "seconds": pl.Float64, "rows": pl.Int64, "kept": pl.Int64,
                  "export": pl.String, "error": pl.String}  # fmt: skip
        rows = []
        for record in (read_run(self.store, run_id) for run_id in list_runs(self.store)):
            counts = record["counts"]
            own = {"corpus": record["corpus"]["name"], "rows": counts.get("rows"), "kept": counts.get("rows_kept")}
            rows.append([{**record, **own}.get(name) for name in schema])
        return pl.DataFrame(rows, schema=schema, orient="row")

    def exports(self) -> pl.DataFrame:
        """Published subsets, oldest first within a name: name, version, rows, files, bytes, run_id, uri."""
        rows = []
        for each in list_exports(self.store):
            size, uri = sum(file["bytes"] for file in each["files"]), f"exports/{each['name']}/{each['version']}"
            own = (each["name"], each["version"], each["rows"], len(each["files"]), size, each["run_id"])
            rows.append((*own, self.store.url(uri)))
        schema = {"name": pl.String, "version": pl.String, "rows": pl.Int64, "files": pl.Int64, "bytes": pl.Int64,
                  "run_id": pl.String, "uri": pl.String}  # fmt: skip
        return pl.DataFrame(rows, schema=schema, orient="row")

    def export(self, name: str | None = None, version: str | None = None) -> pl.LazyFrame:
        """The rows of a published subset; by default the latest version of the configured one.

        Raises
        ------
        ConfigError
            There is no such export, or its files are not Parquet.
        """
        wanted = self.config.export_name if name is None else name
        found = [each for each in list_exports(self.store, wanted) if version in (None, each["version"])]
        if not found:
            known = ", ".join(f"{each['name']}/{each['version']}" for each in list_exports(self.store)) or "none"
            raise ConfigError(
                f"{self.store.uri} has no export {wanted}{f'/{version}' if version else ''}; it has: {known}"
            )
        folder = f"exports/{wanted}/{found[-1]['version']}"
        paths = [file["path"] for file in found[-1]["files"]]
        if not all(path.endswith(".parquet") for path in paths):
            raise ConfigError(f"{self.store.url(folder)} is not in Parquet; read it with polars.scan_ndjson")
        return self.store.scan_parquet([f"{folder}/{path}" for path in paths])

    def decisions(self, run: str | None = None) -> pl.LazyFrame:
        """Every row with its scores, value, rank, fate and reason, as a run decided; by default the latest.

        Raises
        ------
        ConfigError
            There is no such run, or it decided nothing.
        """
        return self.store.scan_parquet([decisions_key(self._decided(run)["run_id"])])

    def scores(self, run: str | None = None) -> pl.LazyFrame:
        """Every row once with its scores, as stored: block_id, block_row, doc_id, tokens, chunks, score_TARGET, ….

        `error_TARGET` is the standard error of a score that the width of the sketch makes (`rise_ops.uncertainty`).
        Rows are in the corpus' order; one that is too short to predict a token has no score. With `aggregate: rrf`
        the ranks of all rows are merged when the frame is collected.

        Parameters
        ----------
        run
            The run whose scores; by default the latest that decided.

        Raises
        ------
        ConfigError
            There is no such run, or parts of its scores are gone.
        """
        record = self._decided(run)
        targets: Mapping[str, str] = record["targets"]
        aggregate = str(record["config"].get("aggregate", "mean"))
        version = read_version(self.store, record["corpus"]["name"], record["corpus"]["version"])
        parts = cut_parts(valuation_id(record["index_id"], targets, aggregate), block_rows(self.store, version))
        if missing_parts(self.store, parts):
            where = f"{self.store.uri} no longer has the scores of run {record['run_id']}"
            raise ConfigError(f"{where}; run `curate value` again")
        if aggregate == "rrf":
            return self._fused(parts, list(targets))
        return self.store.scan_parquet([part.scores for part in parts]).drop("block")

    def _fused(self, parts: Sequence[Part], targets: Sequence[str]) -> pl.LazyFrame:
        from polars.io.plugins import register_io_source

        kinds = {"block_id": pl.String, "block_row": pl.UInt32, "doc_id": pl.String, "tokens": pl.Int32,
                 "chunks": pl.Int32, **{f"score_{name}": pl.Float32 for name in targets}}  # fmt: skip

        def frames(
            columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
        ) -> Iterator[pl.DataFrame]:
            left = n_rows
            for frame in iter_part_scores(self.store, parts, targets, "rrf", rows=_ROWS_AT_ONCE):
                if left == 0:
                    return
                piece = frame.select(list(kinds) if columns is None else columns)
                piece = piece if left is None else piece.head(left)
                left = None if left is None else left - piece.height
                yield piece if predicate is None else piece.filter(predicate)

        return register_io_source(frames, schema=kinds)

    def rows(self, *, fields: Sequence[str] = (), version: int | None = None) -> pl.LazyFrame:
        """The texts of the corpus, each block once: block_id, doc_id, text, prompt, meta (JSON), and `fields`.

        Parameters
        ----------
        fields
            Columns of the sources, taken out of `meta` as text.
        version
            Of the corpus; the current one where None.

        Examples
        --------
        >>> curation.scores().join(curation.rows(), on="doc_id").collect()     # doctest: +SKIP
        """
        blocks = list(block_rows(self.store, self._corpus(version)))
        scan = self.store.scan_parquet([f"blocks/{block}.parquet" for block in blocks], include_file_paths="block_id")
        own = pl.col("text_field")
        columns = [pl.col("block_id").str.extract(_BLOCK_ID), *map(pl.col, ("doc_id", "text", "prompt", "meta"))]
        taken = [
            pl.when(own == name)
            .then("text")
            .otherwise(pl.col("meta").str.json_path_match(_json_path(name)))
            .alias(name)
            for name in fields
        ]
        return scan.select(*columns, *taken)

    def attribute(self, text: str, prompt: str | None = None, *, k: int = 10, bottom: bool = False,
                  version: int | None = None, source: str | None = None, label: str | None = None,
                  compressed: bool = False, rescore: int = 4, tokens: bool = False) -> Attributions:  # fmt: skip
        """The rows that made the model say something: those of highest influence on a text.

        Parameters
        ----------
        text
            What the model said.
        prompt
            What it was asked; precedes the text and does not count.
        k
            Rows at either end.
        bottom
            Show the least influential rows, too.
        version, source, label
            What is searched: version of the corpus, URI of a source, FIELD=VALUE.
        compressed
            Search the codes that `curate compress` made, and score `rescore` times k rows of what they find exactly.
        tokens
            Say of each hit which tokens of it and of the text carry the score (`Hit.tokens`, `Hit.query_tokens`).

        Raises
        ------
        ConfigError, SourceError, ModelError
            As `rise_ops.attribution.attribute`.

        Examples
        --------
        >>> curation.attribute("Arr, walk the plank!", k=5).to_frame()       # doctest: +SKIP
        """
        rows = ad_hoc_queries(self.config, queries=None, text=text, prompt=prompt)
        return self._attribute(rows, k=k, bottom=bottom, version=version, source=source, label=label, tokens=tokens,
                               rescore=rescore if compressed else None)  # fmt: skip

    def search(self, queries: str | os.PathLike[str] | Sequence[str | tuple[str, str]], *, k: int = 10,
               bottom: bool = False, version: int | None = None, source: str | None = None, label: str | None = None,
               compressed: bool = False, rescore: int = 4) -> pl.DataFrame:  # fmt: skip
        """The same for many queries, in one pass over the index, as one table (`Attributions.to_frame`).

        Parameters
        ----------
        queries
            A file in any format that sources may have, or texts, or pairs of prompt and text.
        """
        if isinstance(queries, (str, os.PathLike)):
            rows = ad_hoc_queries(self.config, queries=os.fspath(queries), text=None, prompt=None)
        else:
            rows = [self._query(number, query) for number, query in enumerate(queries)]
        return self._attribute(rows, k=k, bottom=bottom, version=version, source=source, label=label,
                               rescore=rescore if compressed else None).to_frame()  # fmt: skip

    def evaluate(self, label: str = "label", target: str | None = None, *, ks: Sequence[int] = DEFAULT_KS) -> Evaluated:
        """The paper's protocol: auPRC, auROC and precision at K against a label.

        Parameters
        ----------
        label
            FIELD=VALUE: positive are rows whose FIELD is VALUE; FIELD: whose FIELD is the query's own.
        target
            Whose queries; by default the only one.

        Raises
        ------
        ConfigError, SourceError, ModelError
            As `rise_ops.evaluation.evaluate_corpus`.
        """
        targets = list(self.config.targets)
        if target is None and len(targets) != 1:
            raise ConfigError(f"name one of the targets {', '.join(targets) or '(none is configured)'}")
        with self._progress("search") as progress:
            found = evaluate_corpus(
                self.store, self.config, target or targets[0], label=Label.parse(label), ks=ks, progress=progress
            )
        return Evaluated(found.rows, found.positives, found.queries, found.top_k)

    def stability(self, run: str | None = None) -> Stability | None:
        """Would another sketch keep the same rows (`rise_ops.stability`)? None where the run does not say."""
        found: Json | None = self._decided(run).get("selection", {}).get("stability")
        if found is None:
            return None
        known: dict[str, Any] = {field.name: found.get(field.name) for field in fields_of(Stability)}
        return Stability(**known)

    def report(self, run: str | None = None) -> str:
        """Where a run's HTML page is."""
        from rise_ops.report import write_report

        return write_report(self.store, self._decided(run)["run_id"])

    def plan(self) -> Json:
        """What a run would do and cost, as `curate plan` tells it. Writes nothing."""
        from rise_ops.plan import plan_run

        return plan_run(self.config)

    def import_index(self, folder: str | Path, *, tolerance: float = 0.999, any_name: bool = False) -> Imported:
        """`rise_ops.exchange_import.import_reference_index` for this configuration."""
        from rise_ops.exchange_import import import_reference_index

        with self._progress("import") as progress:
            return import_reference_index(
                self.store, self.config, folder, tolerance=tolerance, any_name=any_name, progress=progress
            )

    def export_index(self, folder: str | Path, **options: Any) -> Exported:
        """`rise_ops.exchange_write.export_reference_index` for this configuration, with its options."""
        from rise_ops.exchange_write import export_reference_index

        with self._progress("export") as progress:
            return export_reference_index(self.store, self.config, folder, progress=progress, **options)

    def _progress(self, what: str) -> AbstractContextManager[Progress]:
        return shown_progress(what, shown=self._shown)

    def _attribute(self, rows: Sequence[CanonicalRow], *, k: int, bottom: bool, version: int | None,
                   source: str | None, label: str | None, rescore: int | None,
                   tokens: bool = False) -> Attributions:  # fmt: skip
        if k < 1:
            raise ConfigError(f"k is {k}; it must be 1 or more")
        only = RowFilter.parse(source=source, label=label)
        with self._progress("search") as progress:
            found = attribute(self.store, self.config, rows, k=k, bottom=bottom, version=version, only=only,
                              rescore=rescore, tokens=tokens, progress=progress)  # fmt: skip
        return Attributions(tuple(found), bottom)

    def _query(self, number: int, query: str | tuple[str, str]) -> CanonicalRow:
        prompt, text = (None, query) if isinstance(query, str) else query
        columns = {"text": text} if prompt is None else {"text": text, "prompt": prompt}
        fields = FieldMap(text="text", prompt=None if prompt is None else "prompt")
        try:
            return canonical_row(columns, fields=fields, row_bytes=int(self.config.limits.row_bytes))
        except RowFault as fault:
            raise ConfigError(f"query {number} {fault.reason}") from None

    def _corpus(self, version: int | None) -> CorpusVersion:
        """A version of the configured corpus, or of the only one of the store."""
        name = None if self._config is None else self._config.corpus.name
        if name is None:
            names = self.store.children("corpora")
            if len(names) != 1:
                raise ConfigError(
                    f"{self.store.uri} has the corpora {', '.join(names) or '(none)'}; load a configuration"
                )
            name = names[0]
        found = current_version(self.store, name)
        if found is None:
            raise SourceError(f"{self.store.uri} has no corpus {name}; run `curate ingest` or `curate run` first")
        if version is None or version == found.version:
            return found
        numbers = version_numbers(self.store, name)
        if version not in numbers:
            raise ConfigError(f"corpus {name} has no version {version}; it has {numbers[0]} to {numbers[-1]}")
        return read_version(self.store, name, version)

    def _decided(self, run: str | None) -> Json:
        """The record of a run that decided; by default the latest one of the configured corpus."""
        for run_id in [run] if run is not None else reversed(list_runs(self.store)):
            record = read_run(self.store, run_id)
            ours = run is not None or self._config is None or record["corpus"]["name"] == self._config.corpus.name
            if ours and record.get("targets") and self.store.exists(decisions_key(run_id)):
                return record
        what = f"run {run} decided nothing" if run is not None else f"no run in {self.store.uri} has decided yet"
        raise ConfigError(f"{what}; run `curate value` or `curate run`")


def load(path: str | os.PathLike[str], *, overrides: Sequence[str] = (), progress: bool = True) -> Curation:
    """The curation of a configuration file.

    Parameters
    ----------
    overrides
        `a.b=value` strings, as `curate --set` takes them.
    progress
        Whether calls show their progress.

    Raises
    ------
    ConfigError
        The file is missing or not valid.
    """
    config = load_config(path, overrides=overrides)
    return Curation(Store(config.store), config, progress=progress)


def open_store(uri: str | os.PathLike[str], *, progress: bool = True) -> Curation:
    """A store without a configuration: its corpora, runs, decisions, scores and exports.

    Parameters
    ----------
    uri
        A folder or `s3://bucket/prefix`; credentials come from the usual AWS_* variables.

    Raises
    ------
    ConfigError
        There is no store.
    """
    store = Store(os.fspath(uri))
    store.require()
    return Curation(store, progress=progress)


def _json_path(name: str) -> str:
    """A path to a key of a JSON object."""
    quoted = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"$['{quoted}']"

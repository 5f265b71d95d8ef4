"""What a user writes: one YAML file, validated whole before anything is paid for.

The same models are the parameters of the Prefect flows. Unknown keys are errors that name the nearest
known key. Paths without a scheme are taken relative to the configuration file's folder. Credentials and
endpoints never appear here: they come from the usual `AWS_*` variables.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rise_ops.compare_config import ClosedLoopConfig, CompareConfig, ZerothOrderMethod
from rise_ops.config_base import FieldMap as FieldMap
from rise_ops.config_base import Section, Url
from rise_ops.config_base import TargetConfig as TargetConfig
from rise_ops.errors import ConfigError
from rise_ops.model_config import ModelConfig as ModelConfig

Channel = Literal["rh", "gh", "rg"]

_Queries = TypeVar("_Queries", bound=TargetConfig)


class SketchConfig(Section):
    """The sketch of the LM-head gradient (`rise_ops.head`). Widths are per factor, not totals."""

    channels: tuple[Channel, ...] = Field(("rh", "gh"), description="Channels of the signature, in this order.")
    weight_rh: float = Field(1.0, ge=0, description="Weight of the lexical channel.")
    weight_gh: float = Field(0.3, ge=0, description="Weight of the semantic channel.")
    weight_rg: float = Field(0.5, ge=0, description="Weight of the residual-gradient channel.")
    dim_r: int = Field(128, gt=0, description="Width of the residual sketch.")
    dim_h: int = Field(128, gt=0, description="Width of the hidden-state sketch.")
    dim_g: int = Field(64, gt=0, description="Width of the back-projected residual sketch.")
    top_k: int = Field(256, gt=0, description="Largest entries of the logits that form the support.")
    mass: float = Field(0.92, gt=0, le=1, description="Probability mass of the kept prefix of the support.")
    min_support: int = Field(4, gt=0, description="Fewest entries kept.")
    adaptive_support: bool = Field(True, description="Cut the support at `mass`; otherwise keep all `top_k`.")
    temperature: float = Field(0.1, gt=0, description="Logits are divided by it. Depends on the model; see README.")
    seed: int = Field(42, ge=0, description="Seed of the CountSketch tables.")
    eps: float = Field(1e-8, gt=0, description="Floor of norms.")

    @field_validator("channels")
    @classmethod
    def _known_once(cls, value: tuple[Channel, ...]) -> tuple[Channel, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one of rh, gh, rg, each once")
        return value

    @property
    def dim(self) -> int:
        """Length of a signature."""
        widths = {"rh": self.dim_r * self.dim_h, "gh": self.dim_g * self.dim_h, "rg": self.dim_r * self.dim_g}
        return sum(widths[channel] for channel in self.channels)

    def __repr__(self) -> str:
        return f"SketchConfig(dim={self.dim}, temperature={self.temperature}, fingerprint={self.fingerprint[:12]})"


class CorpusConfig(Section):
    """A named set of source objects."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the corpus in the store.")
    sources: tuple[Url, ...] = Field(min_length=1, description="Globs on any fsspec URL.")
    fields: FieldMap = Field(default_factory=lambda: FieldMap(), description="Columns; default: known row shapes.")

    @field_validator("sources", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class KeepConfig(Section):
    """How much to keep. Several conditions must all hold; none keeps every row."""

    rows: int | None = Field(None, gt=0, description="At most this many rows.")
    fraction: float | None = Field(None, gt=0, le=1, description="At most this part of the rows.")
    tokens: int | None = Field(None, gt=0, description="At most this many tokens.")
    min_value: float | None = Field(None, description="Only rows of at least this value.")
    min_percentile: float | None = Field(
        None, ge=0, lt=100, description="Leave out this percentage of the rows left after the exclusions, the worst."
    )


class ExcludeConfig(Section):
    """Rows that go whatever their value: by their score on a target, or by what they say. One of the two."""

    target: str | None = Field(None, description="Target whose most influential rows go.")
    top_rows: int | None = Field(None, gt=0, description="So many of them.")
    top_fraction: float | None = Field(None, gt=0, lt=1, description="This part of all rows that have a score.")
    min_score: float | None = Field(None, description="All of at least this score.")
    pattern: str | None = Field(
        None, min_length=1, description="Regular expression (Rust's syntax); rows in which it matches go."
    )
    field: str = Field("text", description="Column that is searched: text, prompt, or a column of the source.")

    @field_validator("pattern")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        if value is not None:
            import polars as pl

            try:
                pl.Series([""]).str.contains(value)
            except pl.exceptions.PolarsError as error:
                # several lines, with a pointer below the expression, and with what Polars was doing
                text = " ".join(str(error).partition("This error occurred")[0].split())
                raise ValueError(f"not a regular expression: {text[:300]}") from None
        return value

    @model_validator(mode="after")
    def _one_way(self) -> ExcludeConfig:
        given = [name for name in ("top_rows", "top_fraction", "min_score") if getattr(self, name) is not None]
        if (self.target is None) == (self.pattern is None):
            raise ValueError("give either 'target' or 'pattern'")
        if self.target is not None and len(given) != 1:
            raise ValueError("with 'target' give one of 'top_rows', 'top_fraction', 'min_score'")
        if self.pattern is not None and given:
            raise ValueError(f"cannot use '{given[0]}' with 'pattern'")
        if self.target is not None and self.field != "text":
            raise ValueError("cannot use 'field' with 'target'")
        return self


class Quota(Section):
    """Bounds on what a group of rows has of the kept ones."""

    min_rows: int | None = Field(None, gt=0, description="At least so many rows, taken before all others.")
    max_rows: int | None = Field(None, ge=0, description="At most so many rows.")
    min_fraction: float | None = Field(None, gt=0, le=1, description="At least this part of what is kept.")
    max_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="At most this part of what is kept: of its tokens if keep.tokens is set, else rows.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Quota:
        for low, high in (("min_rows", "max_rows"), ("min_fraction", "max_fraction")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least:g} is more than {high} {most:g}")
        return self


class SourceQuota(Quota):
    """Bounds on each source, and on some of them."""

    by: Literal["object", "folder", "pattern"] = Field(
        "object", description="What a source is: an object, its folder, or an entry of corpus.sources."
    )
    groups: dict[str, Quota] = Field(
        default_factory=dict,
        description="Bounds for sources by glob, in place of those for each; the first match counts.",
    )


class LabelQuota(Quota):
    """Bounds on the rows of each label, and on some of them."""

    field: str = Field("label", description="Column of the source that holds the label.")
    groups: dict[str, Quota] = Field(
        default_factory=dict, description="Bounds for labels by name, in place of those for each."
    )


class NearDuplicates(Section):
    """Of rows whose signatures are nearly parallel only the one of the highest value stays."""

    cosine: float = Field(gt=0.5, le=1, description="Cosine of the signatures from which rows are duplicates.")
    recall: float = Field(0.99, gt=0, lt=1, description="Part of the pairs at this cosine that is found, at least.")


class DiversityConfig(Section):
    """The best rows are put in an order in which each is far from those before it."""

    method: Literal["k_center"] = Field("k_center", description="Greedy k-centre (Gonzalez, 1985).")
    candidates: float = Field(4.0, gt=1, description="So many times the budget of the best rows are looked at.")


class SampleConfig(Section):
    """Rows are drawn at random, the better ones more often, instead of taken from the best down."""

    seed: int = Field(0, ge=0, description="The same seed draws the same rows.")
    temperature: float | None = Field(
        None,
        gt=0,
        description="Chances are exp(value / temperature); null: in proportion to the value, none at 0 or less.",
    )


class SelectionConfig(Section):
    """Which rows are kept. The steps work in the order of these keys, then the budget of `keep` is filled."""

    exclude: tuple[ExcludeConfig, ...] = Field((), description="Rows that go, by target or pattern.")
    near_duplicates: NearDuplicates | None = Field(None, description="Or a number: the cosine.")
    diversity: DiversityConfig | None = Field(None, description="Order by distance. Not together with sample.")
    sample: SampleConfig | None = Field(None, description="Order by chance. Not together with diversity.")
    per_source: SourceQuota | None = Field(None, description="Bounds for sources.")
    per_label: LabelQuota | None = Field(None, description="Bounds for labels.")
    keep: KeepConfig = Field(default_factory=lambda: KeepConfig(), description="Budget and threshold.")

    @field_validator("near_duplicates", mode="before")
    @classmethod
    def _a_number_is_enough(cls, value: Any) -> Any:
        return {"cosine": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_order(self) -> SelectionConfig:
        if self.diversity is not None and self.sample is not None:
            raise ValueError("cannot use 'diversity' with 'sample'")
        for name in ("diversity", "sample"):
            budget = self.keep.rows or self.keep.fraction or self.keep.tokens
            if getattr(self, name) and not (budget or self.per_source or self.per_label):
                raise ValueError(
                    f"'{name}' needs a budget: without keep.rows, keep.fraction or keep.tokens all rows stay"
                )
        return self


class SimHashConfig(Section):
    """Sign codes of signatures: 48 times smaller than the index at the default width."""

    bits: int = Field(8_192, ge=64, multiple_of=64, description="Bits of a row.")
    seed: int = Field(42, ge=0, description="Seed of the rotation.")


class TuningConfig(Section):
    """Temperature and widths chosen on a sample, before the corpus is indexed."""

    temperature: bool = Field(False, description="Choose sketch.temperature; also written sketch.temperature: auto.")
    dim: bool = Field(False, description="Choose sketch.dim_*; also written sketch.dim: auto.")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0), min_length=1, description="Candidates."
    )
    rows: int = Field(512, ge=32, description="Rows of the sample.")
    seed: int = Field(0, ge=0, description="Of the sample. Another one makes another choice.")


class ExportConfig(Section):
    """How the curated subset is published."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Default: the corpus' name.")
    format: Literal["parquet", "jsonl.zst"] = Field("parquet", description="Format of the data files.")
    max_file_bytes: ByteSize = Field(
        ByteSize(256 * 2**20), ge=2**16, description="Size of a data file before compression, at most."
    )


class RunnerConfig(Section):
    """Where tasks run."""

    kind: Literal["threads", "dask", "ray"] = Field(
        "threads", description="threads of this process, or the worker processes of a cluster."
    )
    workers: int = Field(1, ge=1, description="Tasks at the same time; of a cluster made for the run, its workers.")
    address: Url | None = Field(
        None,
        description="tcp://scheduler:8786 (dask) or ray://head:10001; null: a cluster is made for the run.",
    )
    gpus: int = Field(0, ge=0, description="GPUs of each worker that runs the model. 0: none are asked for.")

    @model_validator(mode="after")
    def _cluster_keys_need_a_cluster(self) -> RunnerConfig:
        given = [name for name, value in (("address", self.address), ("gpus", self.gpus)) if value]
        if self.kind == "threads" and given:
            raise ValueError(f"cannot use '{given[0]}' with kind threads; set kind to dask or ray")
        return self


class LimitsConfig(Section):
    """What a run may use, and how much bad input it takes."""

    bad_rows: float = Field(0.01, ge=0, description="Rejected rows: a fraction below 1, or a number of rows.")
    row_bytes: ByteSize = Field(ByteSize(2**20), gt=0, description="A longer row is rejected.")
    memory: ByteSize = Field(ByteSize(8 * 2**30), ge=2**28, description="Working memory of a stage.")


class CurationConfig(Section):
    """One curation, from sources to export."""

    store: Url = Field(description="Root of the store: a folder or s3://bucket/prefix.")
    corpus: CorpusConfig
    model: ModelConfig
    sketch: SketchConfig = Field(default_factory=lambda: SketchConfig())
    targets: dict[str, TargetConfig] = Field(default_factory=dict)
    value: dict[str, float] = Field(default_factory=dict, description="Weight of each target; default 1 each.")
    aggregate: str = Field(
        "mean",
        pattern=r"^(mean|max|rrf|top-[1-9][0-9]{0,5})$",
        description="How the queries of a target combine: mean, max, top-N (mean of the N best), rrf.",
    )
    tuning: TuningConfig = Field(default_factory=lambda: TuningConfig())
    simhash: SimHashConfig | None = Field(None, description="Write codes with the index.")
    selection: SelectionConfig = Field(default_factory=lambda: SelectionConfig())
    export: ExportConfig = Field(default_factory=lambda: ExportConfig())
    compare: CompareConfig = Field(default_factory=lambda: CompareConfig())
    closed_loop: ClosedLoopConfig | None = Field(None, description="Train on what several methods select.")
    runner: RunnerConfig = Field(default_factory=lambda: RunnerConfig())
    limits: LimitsConfig = Field(default_factory=lambda: LimitsConfig())

    @model_validator(mode="before")
    @classmethod
    def _auto_means_tuning(cls, value: Any) -> Any:
        """`sketch: {temperature: auto, dim: auto}` is written for `tuning: {temperature: true, dim: true}`."""
        sketch = value.get("sketch") if isinstance(value, Mapping) else None
        if not isinstance(sketch, Mapping):
            return value
        asked = [name for name in ("temperature", "dim") if sketch.get(name) == "auto"]
        tuning = value.get("tuning") or {}
        if not asked or not isinstance(tuning, Mapping):
            return value
        rest = {name: each for name, each in sketch.items() if name not in asked}
        return {**value, "sketch": rest, "tuning": {**tuning, **dict.fromkeys(asked, True)}}

    @field_validator("targets")
    @classmethod
    def _target_names(cls, value: dict[str, TargetConfig]) -> dict[str, TargetConfig]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(f"target name '{name}' must be letters, digits and '_'")
        return value

    @model_validator(mode="after")
    def _weights_have_targets(self) -> CurationConfig:
        for name in self.value:
            if name not in self.targets:
                hint = _nearest(name, self.targets)
                raise ValueError(f"value weighs '{name}', which is not a target{hint}")
        return self

    @model_validator(mode="after")
    def _exclusions_have_targets(self) -> CurationConfig:
        for each in self.selection.exclude:
            if each.target is not None and each.target not in self.targets:
                hint = _nearest(each.target, self.targets)
                raise ValueError(f"selection.exclude names '{each.target}', which is not a target{hint}")
        return self

    @model_validator(mode="after")
    def _training_needs_the_plain_model(self) -> CurationConfig:
        if self.closed_loop is not None and not self.model.is_plain:
            raise ValueError(
                "'closed_loop' trains the model in one process on one device; leave out model.device_map, "
                "quantization, tensor_parallel and backend"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every target that counts towards the value: without `value` all but those only excluded by."""
        if self.value:
            return dict(self.value)
        excluded = {each.target for each in self.selection.exclude}
        return {name: 1.0 for name in self.targets if name not in excluded}

    @property
    def export_name(self) -> str:
        """Name under which the subset is published."""
        return self.export.name or self.corpus.name


def load_config(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> CurationConfig:
    """Read, override and validate a configuration file.

    Parameters
    ----------
    path
        YAML file.
    overrides
        `a.b=value` strings; the value is read as YAML.

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or does not fit the model; the message names the key.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {file} cannot be read: {error}") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration {file} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"configuration {file} must be a mapping with keys such as store, corpus, model")
    for override in overrides:
        _set(document, override)
    return parse_config(document, base=file.resolve().parent, origin=str(file))


def parse_config(document: Mapping[str, Any], *, base: Path, origin: str = "configuration") -> CurationConfig:
    """Validate a mapping; relative paths are resolved against `base`.

    Raises
    ------
    ConfigError
        Naming every key that does not fit, and the nearest known one where a key is unknown.
    """
    try:
        config = CurationConfig.model_validate(document)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False, include_input=False)]
    else:
        return _absolute(config, base)
    # raised out here, the error does not hold the other one, which holds the values
    raise ConfigError(f"{origin} is not valid:\n" + "\n".join(f"  {line}" for line in lines))


def resolve_path(path: str, base: Path) -> str:
    """`path` itself when it has a scheme, else an absolute local path."""
    return path if "://" in path else os.path.normpath(base / Path(path).expanduser())


def _model_path(name: str, base: Path) -> str:
    return resolve_path(name, base) if name.startswith((".", "/", "~")) or (base / name).is_dir() else name


def _absolute(config: CurationConfig, base: Path) -> CurationConfig:
    model = config.model.model_copy(update={"name": _model_path(config.model.name, base)})
    sources = tuple(resolve_path(source, base) for source in config.corpus.sources)
    targets = {name: _absolute_queries(target, base) for name, target in config.targets.items()}
    loop = config.closed_loop
    if loop is not None:
        held_out = {name: _absolute_queries(each, base) for name, each in loop.held_out.items()}
        choices = loop.choices and _absolute_queries(loop.choices, base)
        loop = loop.model_copy(update={"held_out": held_out, "choices": choices})
    return config.model_copy(
        update={
            "compare": _absolute_checkpoints(config.compare, base),
            "closed_loop": loop,
            "store": resolve_path(config.store, base),
            "corpus": config.corpus.model_copy(update={"sources": sources}),
            "model": model,
            "targets": targets,
        }
    )


def _absolute_queries(target: _Queries, base: Path) -> _Queries:
    return target.model_copy(update={"queries": resolve_path(target.queries, base)})


def _absolute_checkpoints(compare: CompareConfig, base: Path) -> CompareConfig:
    methods = tuple(
        each.model_copy(update={"checkpoints": tuple(_model_path(name, base) for name in each.checkpoints)})
        if isinstance(each, ZerothOrderMethod)
        else each
        for each in compare.methods
    )
    return compare.model_copy(update={"methods": methods})


def _set(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key.subkey=value")
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def _explain(detail: Mapping[str, Any]) -> str:
    location = tuple(detail["loc"])
    where = ".".join(str(part) for part in location) or "configuration"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{where}: unknown key{_nearest(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return f"{where}: required"
    return f"{where}: {str(detail['msg']).removeprefix('Value error, ')}"


def _known_keys(parents: Sequence[int | str]) -> list[str]:
    model: Any = CurationConfig
    for part in parents:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        annotation = field.annotation if field is not None else model
        candidates = [annotation, *get_args(annotation)]
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""

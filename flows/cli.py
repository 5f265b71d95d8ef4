"""The command `curate`.

Each command validates everything before it pays for anything, prints what a person wants to know, and with
`--json` one JSON value as the last line of stdout; logs and progress go to stderr. Errors are one screen,
without a traceback. Exit codes: 0 done, 1 failed, 2 wrong use or bad configuration, 130 interrupted.

Everything heavy is imported inside the commands, so `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rise_ops.errors import ConfigError, CurationError
from rise_ops.logs import FORMAT_VARIABLE, PACKAGES, formatter
from rise_ops.visible import visible

if TYPE_CHECKING:
    from flows.curate import Until
    from rise_ops.config import CurationConfig
    from rise_ops.store import Store

app = typer.Typer(
    name="curate",
    help="Decide which rows to train on, and explain which rows made a model say something.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class LogFormat(StrEnum):
    """How log records are written."""

    plain = "plain"
    json = "json"


AnyFlow = Callable[..., dict[str, Any]]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a.b=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value as the last line of stdout.")]
Deep = Annotated[bool, typer.Option("--deep", help="Read every source object again, whatever its listing says.")]
StoreUri = Annotated[str, typer.Argument(metavar="STORE", help="Root of the store: a folder or s3://bucket/prefix.")]


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's and our logs.")] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option("--log-format", envvar=FORMAT_VARIABLE, case_sensitive=False, help="Plain text, or JSON lines."),
    ] = LogFormat.plain,
) -> None:
    """Set up logging: quiet unless asked."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ[FORMAT_VARIABLE] = log_format.value  # for the processes of a cluster of our own
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format.value))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not verbose:  # Prefect's logs go to its server only: what they say of an error, the last line says better
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        handler.addFilter(lambda record: record.name.partition(".")[0] in PACKAGES)
    level = logging.INFO if verbose else logging.WARNING
    handler.setLevel(level)  # our loggers go on from INFO: a server shows their records with the flow run
    logging.basicConfig(level=level, handlers=[handler])


@app.command()
def demo(
    store: Annotated[Path, typer.Option("--store", help="Folder for the demo's corpus and store.")] = Path(
        "curate-demo"
    ),
    json_: AsJson = False,
) -> None:
    """Curate a bundled corpus with planted backdoor rows; no network, server or GPU."""
    from flows.console import show_demo, show_summary
    from rise_ops.config import load_config
    from rise_ops.demo import count_planted, write_demo
    from rise_ops.store import Store

    written = write_demo(store)
    config = load_config(written.folder / "curate.yaml")
    summary = _curate(config, "evaluate")
    found = count_planted(Store(config.store), summary["export"], planted=written.planted)

    def show() -> None:
        show_summary(config, summary)
        show_demo(written.folder / "curate.yaml", found, summary)

    _emit({**summary, **found}, json_, show)


@app.command()
def plan(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """What a run would do and cost. Writes nothing."""
    from flows.console import show_plan
    from rise_ops.config import load_config
    from rise_ops.plan import plan_run

    loaded = load_config(config, overrides=set_ or [])
    planned = plan_run(loaded, deep=deep)
    _emit(planned, json_, lambda: show_plan(loaded, planned))


@app.command()
def run(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """Ingest, index, value, select, export, and evaluate where rows carry labels."""
    _run_until("evaluate", config, set_, json_, deep=deep)


@app.command()
def ingest(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """Bring the corpus up to date with its sources."""
    _run_until("ingest", config, set_, json_, deep=deep)


@app.command()
def index(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """Ingest, then compute the signatures that are missing."""
    _run_until("index", config, set_, json_, deep=deep)


@app.command()
def value(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """Index, then score, rank and decide."""
    _run_until("value", config, set_, json_, deep=deep)


@app.command()
def export(config: Config, deep: Deep = False, set_: Overrides = None, json_: AsJson = False) -> None:
    """Value, then publish the kept rows."""
    _run_until("export", config, set_, json_, deep=deep)


@app.command()
def attribute(
    config: Config,
    queries: Annotated[str | None, typer.Option(help="File with queries, in any format that sources may have.")] = None,
    text: Annotated[str | None, typer.Option(help="What the model said.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What it was asked; precedes TEXT, does not count.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Rows at either end.")] = 10,
    bottom: Annotated[bool, typer.Option("--bottom", help="Also the least influential rows.")] = False,
    source: Annotated[
        str | None, typer.Option(metavar="URI", help="Only rows of this object; with / at its end or *, of all such.")
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="FIELD=VALUE", help="Only rows with this label.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version of the corpus; default: the current one.")] = None,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Search the codes that `curate compress` made.")
    ] = False,
    rescore: Annotated[
        int, typer.Option(min=0, help="With --compressed: score RESCORE times K rows from the index; 0: none.")
    ] = 4,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also which tokens of rows and queries carry the scores.")
    ] = False,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Which rows of the indexed corpus made the model say something."""
    from flows.console import progress_bars, show_attribution
    from rise_ops.attribution import attribute as attribute_queries
    from rise_ops.config import load_config
    from rise_ops.filters import RowFilter
    from rise_ops.session import ad_hoc_queries
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    only = RowFilter.parse(source=source, label=label)
    rows = ad_hoc_queries(loaded, queries=queries, text=text, prompt=prompt)
    with progress_bars() as listen:
        found = attribute_queries(
            Store(loaded.store),
            loaded,
            rows,
            k=k,
            bottom=bottom,
            version=version,
            only=only,
            rescore=rescore if compressed else None,
            tokens=tokens,
            progress=lambda done, _: listen("scan", done, None),
        )
    result = [attribution.to_json(bottom=bottom) for attribution in found]
    _emit(result, json_, lambda: show_attribution(result))


@app.command()
def sweep(
    config: Config,
    label: Annotated[
        str | None, typer.Option(metavar="FIELD[=VALUE]", help="Positive: FIELD is VALUE, or the query's own.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Only this target's queries.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Rows of the sample; default: tuning.rows.")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Candidates; default: tuning.temperatures.")] = None,
    widths: Annotated[
        bool, typer.Option("--widths", help="Compare widths instead, at the configured temperature.")
    ] = False,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Compare temperatures or widths on a sample of the corpus, with labels or without. Writes nothing."""
    from flows.console import progress_bars, show_sweep
    from rise_ops.choosing import sweep_corpus
    from rise_ops.config import load_config
    from rise_ops.evaluation import Label
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    with progress_bars() as listen:
        found = sweep_corpus(
            Store(loaded.store),
            loaded,
            label=None if label is None else Label.parse(label),
            target=target,
            rows=rows,
            temperatures=None if temperatures is None else _decimals(temperatures),
            widths=widths,
            progress=lambda done, total: listen("sweep", done, total),
        )
    _emit(found, json_, lambda: show_sweep(found))


@app.command()
def compress(config: Config, set_: Overrides = None, json_: AsJson = False) -> None:
    """Write SimHash codes of the indexed corpus, for `curate attribute --compressed`."""
    from flows.console import progress_bars, show_codes
    from rise_ops.codes import compress_corpus
    from rise_ops.config import load_config
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    with progress_bars() as listen:
        found = compress_corpus(Store(loaded.store), loaded, progress=lambda done, _: listen("compress", done, None))
    _emit(found, json_, lambda: show_codes(found))


@app.command(name="import")
def import_index(
    config: Config,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Finished index directory of the reference RISE.")],
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Least cosine of the rows that are computed for comparison.")
    ] = 0.999,
    any_name: Annotated[bool, typer.Option("--any-name", help="The index may name its model otherwise.")] = False,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Take the signatures of a reference RISE index of one of the corpus' files, instead of computing them."""
    from dataclasses import asdict

    from flows.console import progress_bars, show_import
    from rise_ops.config import load_config
    from rise_ops.exchange_import import import_reference_index
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    with progress_bars() as listen:
        found = import_reference_index(
            Store(loaded.store),
            loaded,
            folder,
            tolerance=tolerance,
            any_name=any_name,
            progress=lambda done, total: listen("verify" if total else "import", done, total),
        )
    _emit(asdict(found), json_, lambda: show_import(asdict(found)))


@app.command(name="export-index")
def export_index(
    config: Config,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Empty folder, or one with an interrupted export.")],
    version: Annotated[int | None, typer.Option(min=1, help="Version of the corpus; default: the current one.")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Rows of a file of vectors.")] = 4_096,
    label: Annotated[str, typer.Option(metavar="FIELD", help="Column that goes along as the rows' label.")] = "label",
    without_model: Annotated[
        bool, typer.Option("--without-model", help="Do not load the model to record what it is recognised by.")
    ] = False,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Write the indexed corpus as an index directory that the reference RISE reads."""
    from dataclasses import asdict

    from flows.console import progress_bars, show_export_index
    from rise_ops.config import load_config
    from rise_ops.exchange_write import export_reference_index
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    with progress_bars() as listen:
        found = export_reference_index(
            Store(loaded.store),
            loaded,
            folder,
            version=version,
            block_size=block_size,
            label=label,
            with_model=not without_model,
            progress=lambda done, total: listen("export", done, total),
        )
    _emit(asdict(found), json_, lambda: show_export_index(asdict(found)))


@app.command()
def evaluate(
    config: Config,
    label: Annotated[str, typer.Option(metavar="FIELD[=VALUE]", help="Positive: FIELD is VALUE, or the query's own.")],
    target: Annotated[str | None, typer.Option(help="Target whose queries are used; default: the only one.")] = None,
    k: Annotated[str, typer.Option("--k", help="Values of K.")] = "5,10,50",
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """The paper's protocol: auPRC, auROC and precision at K against a label."""
    from dataclasses import asdict

    from flows.console import progress_bars, show_evaluation
    from rise_ops.config import load_config
    from rise_ops.evaluation import Label, evaluate_corpus
    from rise_ops.store import Store

    loaded = load_config(config, overrides=set_ or [])
    if target is None and len(loaded.targets) != 1:
        raise ConfigError(f"--target: name one of {', '.join(loaded.targets) or '(no targets are configured)'}")
    ks = _numbers(k)
    with progress_bars() as listen:
        found = evaluate_corpus(
            Store(loaded.store),
            loaded,
            target or next(iter(loaded.targets)),
            label=Label.parse(label),
            ks=ks,
            progress=lambda done, _: listen("scan", done, None),
        )
    _emit(asdict(found), json_, lambda: show_evaluation(found))


@app.command()
def compare(config: Config, set_: Overrides = None, json_: AsJson = False) -> None:
    """RISE and its alternatives side by side on the same rows, queries and model: quality, time, memory, bytes."""
    from flows.console import show_comparison
    from rise_ops.config import load_config

    def load() -> AnyFlow:
        from flows.compare import compare

        return compare

    summary = _as_flow(load, load_config(config, overrides=set_ or []))
    _emit(summary, json_, lambda: show_comparison(summary))


@app.command(name="closed-loop")
def closed_loop(config: Config, set_: Overrides = None, json_: AsJson = False) -> None:
    """Train the model on what RISE and others select at one budget, and measure what each selection is worth."""
    from flows.console import show_closed_loop
    from rise_ops.config import load_config

    def load() -> AnyFlow:
        from flows.closed_loop import closed_loop

        return closed_loop

    summary = _as_flow(load, load_config(config, overrides=set_ or []))
    _emit(summary, json_, lambda: show_closed_loop(summary))


@app.command()
def paper(
    task: Annotated[str, typer.Argument(metavar="TASK", help="howdy, finance_medical or brain_rot.")],
    pool: Annotated[list[str], typer.Option(help="File or glob with the rows; may be given several times.")],
    queries: Annotated[str, typer.Option(help="File with the queries.")],
    store: Annotated[str, typer.Option(help="Root of the store: a folder or s3://bucket/prefix.")] = "curate-paper",
    trained: Annotated[str | None, typer.Option(help="Model that was trained on the pool: retrospective.")] = None,
    base: Annotated[str | None, typer.Option(help="Model that was not, or not yet: prospective.")] = None,
    filler: Annotated[list[str] | None, typer.Option(help="More rows, to hide the pool's among.")] = None,
    dilute: Annotated[str, typer.Option(help="Also with so many times fewer positive rows, such as 20,200.")] = "1",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that draws random numbers.")] = 3,
    memory: Annotated[str, typer.Option(help="Working memory of a method; one that needs more is not tried.")] = "8GiB",
    json_: AsJson = False,
) -> None:
    """One of the three tasks of the paper, on your files and models."""
    from flows.console import show_comparison
    from flows.paper import TASKS

    if task not in TASKS:
        raise ConfigError(f"{task}: not one of {', '.join(TASKS)}")
    options = {"filler": filler or [], "dilute": _decimals(dilute, "--dilute"), "seeds": seeds,
               "limits": {"memory": memory}}  # fmt: skip
    found = _as_flow(lambda: TASKS[task], store, pool, queries, trained, base, options)

    def show() -> None:
        for setting, summary in found.items():
            show_comparison(summary, title=f"{task}, {setting}")

    _emit(found, json_, show)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One preset, such as pythia-1b.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Build random weights of NAME and measure speed and memory.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Random tokens that are measured.")] = 16_384,
    memory: Annotated[str, typer.Option(help="Working memory beside the weights.")] = "8GiB",
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU, to tell how many are needed.")] = "141GB",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    json_: AsJson = False,
) -> None:
    """Model presets: sizes, memory and recommended sketch widths; what random weights of one do on this machine."""
    from dataclasses import asdict

    from flows.console import show_measured, show_models
    from rise_ops.families import PRESETS, describe, find_preset, measure_preset

    allowed = _size(memory)
    chosen = list(PRESETS.values()) if name is None else [find_preset(name)]
    if not measure:
        size = _size(gpu_memory, option="--gpu-memory")
        found = [describe(each, memory=allowed, gpu_memory=size) for each in chosen]
        _emit(found, json_, lambda: show_models(found))
        return
    if name is None:
        raise ConfigError("--measure: name the preset to measure, such as pythia-14m")
    measured = asdict(measure_preset(chosen[0], tokens=tokens, memory=allowed, device=device, dtype=dtype))
    _emit(measured, json_, lambda: show_measured(measured))


@app.command()
def watch(config: Config, set_: Overrides = None, json_: AsJson = False) -> None:
    """One look: have the sources changed? Tells a Prefect server, if one is configured, by an event."""
    from flows.console import show_changes
    from rise_ops.config import load_config
    from rise_ops.watching import look

    loaded = load_config(config, overrides=set_ or [])
    found = look(loaded)
    told: dict[str, Any] = {"announced": False, "waiting": None}
    if found["is_changed"] and _has_server():
        from tasks.watch import announce

        told = announce(loaded, found)
    found |= told
    _emit(found, json_, lambda: show_changes(found))


@app.command(name="config")
def show_config(config: Config, set_: Overrides = None, json_: AsJson = False) -> None:
    """Check a configuration and print all of it; with --json in one line what differs from the defaults."""
    import yaml

    from rise_ops.config import load_config

    loaded = load_config(config, overrides=set_ or [])
    whole = yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()
    _emit(loaded.model_dump(mode="json", exclude_defaults=True), json_, lambda: typer.echo(whole))


@app.command()
def diff(
    store: StoreUri,
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Name of the corpus; `curate status` lists them.")],
    old: Annotated[int | None, typer.Option("--from", min=0, help="Version; default: the one before --to.")] = None,
    new: Annotated[int | None, typer.Option("--to", min=1, help="Version; default: the current one.")] = None,
    json_: AsJson = False,
) -> None:
    """What changed between two versions of a corpus: objects, blocks and rows."""
    from flows.console import show_diff
    from rise_ops.diff import diff_numbers

    found = diff_numbers(_opened(store), corpus, old=old, new=new)
    _emit(found, json_, lambda: show_diff(found))


@app.command()
def verify(
    store: StoreUri,
    deep: Annotated[bool, typer.Option("--deep", help="Hash all contents again.")] = False,
    json_: AsJson = False,
) -> None:
    """Check that the store holds what its records promise; exits 1 where it does not."""
    from flows.console import show_faults
    from rise_ops.verify import verify_store

    found = verify_store(_opened(store), deep=deep)
    _emit(found, json_, lambda: show_faults(found))
    if found["broken"]:
        raise typer.Exit(1)


@app.command()
def gc(
    store: StoreUri,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="Versions of each corpus to keep; else all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; nobody is asked without a terminal.")] = False,
    json_: AsJson = False,
) -> None:
    """Remove what no corpus version, run or export reaches. Does nothing while a run is at work."""
    from flows.console import show_garbage
    from rise_ops.garbage import collect_garbage

    opened = _opened(store)
    if not (dry_run or yes or json_) and sys.stdin.isatty():
        planned = collect_garbage(opened, keep=keep, dry_run=True)
        show_garbage(planned)
        if not planned["objects"] or not typer.confirm("Remove them?"):
            return
    found = collect_garbage(opened, keep=keep, dry_run=dry_run)
    _emit(found, json_, lambda: show_garbage(found))


@app.command()
def status(store: StoreUri, json_: AsJson = False) -> None:
    """What a store holds: corpora, indexes, runs, exports."""
    from flows.console import show_status
    from rise_ops.status import store_status
    from rise_ops.store import Store

    found = store_status(Store(store))
    _emit(found, json_, lambda: show_status(found))


@app.command()
def lineage(
    store: StoreUri,
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A run id, an export (name or name/version) or a doc_id.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="URI", help="A source object; one ending in / or with * means all of these.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Where a run, an export or an exported row comes from; with --source, where a source object went."""
    from flows.console import show_lineage, show_source
    from rise_ops.lineage import trace
    from rise_ops.withdrawal import trace_source

    if (target is None) == (source is None):
        raise ConfigError("give either TARGET (a run id, an export or a doc_id) or --source URI")
    if source is not None:
        where = trace_source(_opened(store), source)
        _emit(where, json_, lambda: show_source(where))
    elif target is not None:
        found = trace(_opened(store), target)
        _emit(found, json_, lambda: show_lineage(found))


@app.command()
def report(
    store: StoreUri,
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run id; `curate status` lists them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the page to this file.")] = None,
    json_: AsJson = False,
) -> None:
    """Make a run's HTML page, or copy it out of the store."""
    from rise_ops.report import render_report, write_report
    from rise_ops.store import Store

    opened = Store(store)
    if output is None:
        place = write_report(opened, run_id)
    else:
        page = render_report(opened, run_id)
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from error
        place = str(output.resolve())
    _emit({"run_id": run_id, "report": place}, json_, lambda: typer.echo(place))


def _run_until(until: Until, config: Path, overrides: list[str] | None, json_: bool, *, deep: bool) -> None:
    from flows.console import show_summary
    from rise_ops.config import load_config

    loaded = load_config(config, overrides=overrides or [])
    summary = _curate(loaded, until, deep=deep)
    _emit(summary, json_, lambda: show_summary(loaded, summary))


def _curate(config: CurationConfig, until: Until, *, deep: bool = False) -> dict[str, Any]:
    def load() -> AnyFlow:
        from flows.curate import curate

        return curate

    return _as_flow(load, config, until, deep=deep)


def _as_flow(load: Callable[[], AnyFlow], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Run a flow, on a temporary server where none is configured, with bars for its stages.

    `load` imports the flow, with the libraries that it needs, while that server starts.
    """
    with ExitStack() as stack:
        server = None
        if not _has_server():
            from flows.console import note
            from flows.temporary_server import TemporaryServer

            note("starting a temporary Prefect server (6 to 20 s; set PREFECT_API_URL to use one that runs)")
            server = TemporaryServer()
        flow = load()
        from flows.console import progress_bars
        from tasks.progress import listening

        if server is not None:
            stack.enter_context(server.in_use())
        stack.enter_context(listening(stack.enter_context(progress_bars())))
        try:
            return flow(*arguments, **options)
        except KeyboardInterrupt:
            typer.echo("curate: interrupted; give the same command again to go on", err=True)
            raise


def _has_server() -> bool:
    """Whether a Prefect server is configured, by variable or by profile."""
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


def _opened(uri: str) -> Store:
    """A store that is there."""
    from rise_ops.store import Store

    store = Store(uri)
    store.require()
    return store


def _decimals(text: str, option: str = "--temperatures") -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < each < float("inf") for each in found):
        raise ConfigError(f"{option} {text}: write numbers above 0, such as 0.1,0.5,1")
    return found


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--k {text}: write positive numbers separated by commas, such as 5,10,50")
    return numbers


def _size(text: str, *, option: str = "--memory") -> int:
    """Bytes of an amount such as 8GiB."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ConfigError(f"{option} {text}: write an amount of memory, such as 8GiB or 512MiB") from None


def _emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))
    else:
        show()


def main() -> None:
    """Entry point: named errors become one message and an exit code."""
    try:
        app()
    except CurationError as error:
        typer.echo(f"curate: {visible(str(error))}", err=True)
        sys.exit(error.exit_code)

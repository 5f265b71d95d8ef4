"""What the command line shows people: summaries as tables, progress as bars, on a terminal or not.

Text that comes from a corpus is escaped: it can neither style the terminal nor move its cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rise_ops.comparison_lines import comparison_lines

Json = Mapping[str, Any]
Listener = Callable[[str, int, int | None], None]

_OUT = Console()
_ERR = Console(stderr=True)
_PREVIEW = 160
_TOKENS_NAMED = 8
_SHADES = {
    sign * level: f"{'bold ' if level == 4 else ''}black on {shade}"
    for sign, shades in (
        (1, ("#dff3e4", "#b0e5bd", "#78d190", "#2fb956")),
        (-1, ("#fae1e1", "#f4baba", "#ec8f8f", "#e25d5d")),
    )
    for level, shade in enumerate(shades, 1)
}
"""Styles of tokens by sign and strength; readable on any background, and without shades where a terminal has none."""
_LISTED = 5
"""Rows and objects shown of many."""
_WHOLE = ("run_id", "score", "rule")
"""Columns that are copied or compared, so never broken."""


def note(text: str) -> None:
    """A remark on stderr, for people only."""
    if sys.stderr.isatty():
        _ERR.print(f"[dim]{escape(text)}[/dim]")


@contextmanager
def progress_bars() -> Iterator[Listener]:
    """Bars on stderr, one a stage; silent where stderr is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_ERR, disable=not sys.stderr.isatty(), transient=True) as bars:
        known: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in known:
                known[stage] = bars.add_task(stage, total=total)
            bars.update(known[stage], completed=done, total=total)

        yield show


def plain(text: object, *, width: int = _PREVIEW) -> str:
    """Untrusted text on one line: markup escaped, control characters shown, cut to `width`."""
    flat = " ".join(str(text).split())
    safe = "".join(char if char.isprintable() else "�" for char in flat)
    return escape(safe if len(safe) <= width else safe[: width - 1] + "…")


def _short(identity: str | None) -> str:
    return plain(identity or "")[:12]


def show_summary(config: Any, summary: Json) -> None:
    """What a run did."""
    table = _table(f"Run {summary['run_id']}", "", "")
    names = {
        "rows": "rows in the corpus",
        "rows_new": "rows new since the last version",
        "rows_rejected": "rows rejected",
        "rows_sketched": "rows sketched",
        "rows_reused": "rows whose signatures were there",
        "tokens": "tokens",
        "rows_kept": "rows kept",
    }
    for key, label in names.items():
        if summary.get(key) is not None:
            table.add_row(label, f"{summary[key]:,}")
    for name, stage in summary["stages"].items():
        table.add_row(f"stage {name}", f"{stage['seconds']:.1f} s{'  (nothing to do)' if stage['cached'] else ''}")
    table.add_row("whole run", f"{summary['seconds']:.1f} s")
    if summary.get("export"):
        table.add_row("export", plain(f"{config.store}/exports/{summary['export']}"))
    if summary.get("report"):
        table.add_row("report", plain(summary["report"]))
    _OUT.print(table)
    if summary.get("selection"):
        _show_selection("Selection", {**summary["selection"], "kept": summary["rows_kept"]})
    if summary.get("evaluation"):
        for name, figures in summary["evaluation"].items():
            _show_figures(f"Evaluation of target {name} by label", figures)


def show_demo(config: Path, found: Json, summary: Json) -> None:
    """What the demo found."""
    dropped, total = found["planted_dropped"], found["planted"]
    _OUT.print(f"[bold]The backdoor:[/bold] {total} rows were planted; the selection dropped {dropped} of them.")
    _OUT.print(
        f"[bold]Bad input:[/bold] {summary['rows_rejected']} malformed rows were set aside, each with its reason."
    )
    _OUT.print(f"[bold]Open the report:[/bold] {plain(summary['report'])}")
    _OUT.print(f"[bold]Next:[/bold] curate attribute {plain(config)} --text 'Arr, ye be welcome aboard!' -k 3")


def show_plan(config: Any, plan: Json) -> None:
    """What a run would do."""
    _OUT.print(_changes(f"Plan for corpus {config.corpus.name}", plan))
    table = _table("Cost", "", "")
    table.add_row("rows", f"{plan['rows_total']:,} ({plan['rows_rejected']:,} rejected)")
    table.add_row("rows to sketch", f"{plan['rows_to_sketch']:,}")
    table.add_row("rows reused", f"{plan['rows_reused']:,}")
    table.add_row("blocks to write", f"{plan['blocks_to_write']:,} ({plan['index_bytes_new'] / 2**20:,.1f} MiB)")
    table.add_row("tokens", f"about {plan['tokens']:,}")
    for text in _sketch_lines(plan["sketch"]):
        table.add_row("sketch", text)
    table.add_row("index", f"{plan['index_bytes'] / 2**20:,.1f} MiB in all")
    table.add_row("peak memory", f"{plan['peak_memory_bytes'] / 2**20:,.0f} MiB")
    for stage in plan["memory"].values():
        table.add_row("", stage["text"])
    if plan["model"]:
        table.add_row("model", plain(plan["model"]["text"], width=400))
        if plan["model"]["problem"]:
            table.add_row("", plain(plan["model"]["problem"], width=400), style="bold red")
    seconds = plan["sketch_seconds"]
    table.add_row(
        "time to sketch", f"about {seconds:,.0f} s" if seconds is not None else plan["sketch_seconds_unknown"]
    )
    if "selection" not in plan:
        table.add_row("selection", plain(f"unknown: {plan['selection_unknown']}", width=400))
    _OUT.print(table)
    if "selection" in plan:
        _show_selection("Selection", plan["selection"])


def _sketch_lines(sketch: Json) -> list[str]:
    told = f"temperature {sketch['temperature']:g}, {sketch['dim']:,} numbers a row"
    if sketch.get("to_choose"):
        return [f"{told} are assumed: the run chooses {' and '.join(sketch['to_choose'])} on a sample"]
    return [told, *(f"chosen: {plain(why)}" for why in (sketch.get("chosen") or {}).get("why", []))]


def show_sweep(found: Json) -> None:
    """Candidates of a sweep; the one that `auto` would take is marked."""
    targets = list(found["targets"])
    columns = ("temperature", "widths", "effective rank", "entropy")
    table = _table(f"{found['rows']:,} rows of the corpus", *columns)
    compared = any(each["agreement"] is not None for each in found["candidates"])
    if compared:
        table.add_column("agreement")
    for name in targets:
        table.add_column(f"split-half {plain(name)}")
        table.add_column(f"self-retrieval {plain(name)}")
    ks = list(found["candidates"][0]["labelled"])
    for k in ks:
        table.add_column(f"auPRC@{k}")
        table.add_column(f"P@{k}")
    for number, each in enumerate(found["candidates"]):
        cells = [f"{each['temperature']:g}", f"{each['dim_r']}/{each['dim_h']}/{each['dim_g']} = {each['dim']:,}"]
        cells += [f"{each['effective_rank']:.1f}", f"{each['entropy']:.2f}"]
        cells += [f"{each['agreement']:.3f}"] if compared else []
        for name in targets:
            cells += [f"{each['split_half'][name]:.3f}", f"{each['self_retrieval'][name]:.3f}"]
        for k in ks:
            cells += [f"{each['labelled'][k]['auprc']:.3f}", f"{each['labelled'][k]['precision']:.3f}"]
        chosen = number == found["auto"]
        table.add_row(*cells[:-1], cells[-1] + (" ← auto" if chosen else ""), style="bold" if chosen else None)
    _OUT.print(table)


def show_comparison(summary: Json, title: str = "Methods compared") -> None:
    """Quality and cost of each method; runs with several seeds as one line."""
    found = summary["comparison"]
    ks = [str(k) for k in found["k"]]
    for factor in found["dilute"]:
        hidden = f", positive rows {factor:g} times fewer" if factor > 1 else ""
        table = _table(f"{title}{hidden}", "method", *(f"{name}@{k}" for k in ks for name in ("auPRC", "P")), "seeds")
        for line in comparison_lines(found, f"{factor:g}"):
            figures = (
                [_span(line.figures[k, name]) for k in ks for name in ("auprc", "precision")] if line.figures else []
            )
            table.add_row(
                plain(line.name), *(figures or [line.status, *[""] * (2 * len(ks) - 1)]), str(line.seeds or "")
            )
        _OUT.print(table)
    costs = _table("What they cost", "method", "bytes a row", "index s", "tokens/s", "queries s", "peak MiB")
    lines = comparison_lines(found, f"{found['dilute'][0]:g}")
    for line in lines:
        cells = [line.bytes_per_row, line.index_seconds, line.tokens_per_second, line.query_seconds, line.peak_mib]
        costs.add_row(
            plain(line.name), *("–" if cell is None else f"{cell:,.{1 if cell < 100 else 0}f}" for cell in cells)
        )
    _OUT.print(costs)
    for line in lines:
        if line.reason:
            _OUT.print(f"{plain(line.name)}: {plain(line.reason, width=600)}")
    _OUT.print(f"run {summary['run_id']}, report {plain(summary['report'] or '')}")


def show_closed_loop(summary: Json) -> None:
    """Loss on each held-out set and accuracies by arm, and what they say of the claim."""
    found = summary["closed_loop"]
    for name, untrained in found["base"]["held_out"].items():
        table = _table(f"Loss on {name}, nats a token", "arm", "tokens", "loss", "change", "against random", "lower on")
        table.add_row("untrained", "", f"{untrained:.3f}", "", "", "")
        for arm, line in sorted(found["arms"].items(), key=lambda item: float(item[1]["held_out"][name]["loss"])):
            own = line["held_out"][name]
            differences = [_interval(own[kind]) for kind in ("change", "against_random")]
            texts = own["over_texts"]
            lower = f"{texts['lower']} of {texts['texts']} texts" if texts else ""
            table.add_row(arm, f"{line['tokens']:,}", f"{own['loss']:.3f}", *differences, lower)
        _OUT.print(table)
    for name in ("acc", "acc_norm") if found["base"]["choices"] else ():
        table = _table(f"Multiple choice, {name}", "arm", "accuracy", "change", "against random")
        table.add_row("untrained", f"{found['base']['choices'][name]:.3f}", "", "")
        for arm, line in found["arms"].items():
            own = line["choices"][name]
            differences = [_interval(own[kind]) for kind in ("change", "against_random")]
            table.add_row(arm, f"{own['accuracy']:.3f}", *differences)
        _OUT.print(table)
    for judged in found["verdict"]:
        _OUT.print(f"{plain(judged['held_out'])}: {plain(judged['text'], width=1_000)}")
    _OUT.print(f"run {summary['run_id']}, report {plain(summary['report'] or '')}")


def _interval(found: Json | None) -> str:
    """A difference, with its interval where there is one."""
    if found is None:
        return ""
    text = f"{found['mean']:+.3f}"
    return text if found["low"] is None else f"{text} ({found['low']:+.3f} to {found['high']:+.3f})"


def _span(values: Sequence[float]) -> str:
    """A mean, with the range where there are several values."""
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else "")


def show_codes(found: Json) -> None:
    """What `curate compress` did."""
    less = found["index_bytes"] / found["bytes"] if found["bytes"] else 0
    _OUT.print(
        f"{found['rows_written']:,} of {found['rows']:,} rows compressed to {found['bits']:,} bits, "
        f"{less:.0f} times smaller than the index: {plain(found['folder'])}"
    )


def show_import(found: Json) -> None:
    """What `curate import` did."""
    _OUT.print(
        f"{found['rows_imported']:,} rows imported in {found['blocks_imported']:,} blocks, {found['rows_computed']:,} "
        f"computed, {found['rows_there']:,} were there: index {_short(found['index_id'])}"
    )
    if found["sample_rows"]:
        lowest, median = found["cosine_min"], found["cosine_median"]
        _OUT.print(f"{found['sample_rows']} rows computed for comparison: cosine {lowest:.4f} to {median:.4f} (median)")
    if found["blocks_left"]:
        _OUT.print(f"{found['rows_left']:,} rows of the corpus are left: run curate index")


def show_export_index(found: Json) -> None:
    """What `curate export-index` did."""
    _OUT.print(
        f"{found['rows']:,} rows ({found['rows_empty']:,} without a vector) of {found['dim']:,} numbers in "
        f"{found['shards']:,} files, {found['bytes'] / 2**20:,.1f} MiB: {plain(found['folder'])}"
    )


def show_attribution(found: Sequence[Json]) -> None:
    """Hits of each query."""
    for item in found:
        _OUT.print(f"\n[bold]{plain(item['query'])}[/bold]")
        _OUT.print(_hits("rows that made it likelier", item["hits"]))
        if "bottom" in item:
            _OUT.print(_hits("rows that made it less likely", item["bottom"]))
        for hit in (*item["hits"], *item.get("bottom", ())):
            if "tokens" in hit:
                _show_tokens(item["query"], hit)


def show_evaluation(found: Any) -> None:
    """Figures of the protocol."""
    figures = {"rows": found.rows, "positives": found.positives, "queries": found.queries, "top_k": found.top_k}
    _show_figures("Evaluation", figures)


def show_models(found: Sequence[Json]) -> None:
    """Model presets as a table; a single one with all that is known of it."""
    if len(found) == 1:
        _show_model(found[0])
        return
    columns = ("preset", "params", "width\n×layers", "vocab", "GB\nbf16/fp32", "sketch\nr/h/g", "bytes\na row")
    table = _table("Model presets", *columns, "work GiB\ncuda/cpu")
    table.padding = (0, 0)
    for each in found:
        size, row = each["parameters"], f"{each['bytes_per_row']:,}"
        cells = [
            f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.1f}M",
            f"{each['hidden_dim']}×{each['layers']}",
        ]
        cells += [f"{each['vocab_size']:,}", _both(each["weight_bytes"], 1e9), _widths(each["widths"]), row]
        table.add_row(each["name"], *cells, _both(each["working_bytes"], 2**30))
    _OUT.print(table)


def _show_model(found: Json) -> None:
    table = _table(f"{found['name']}: {found['hub']}", "", "")
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("width of hidden states, layers", f"{found['hidden_dim']:,}, {found['layers']}")
    table.add_row("vocabulary, positions", f"{found['vocab_size']:,}, {found['max_positions']:,}")
    table.add_row("weights in bfloat16 / float32", f"{_both(found['weight_bytes'], 2**30)} GiB")
    table.add_row("to work with on CUDA / a CPU", f"{_both(found['working_bytes'], 2**30)} GiB")
    for kind, each in found["on_gpus"].items():
        table.add_row(f"{kind} on GPUs of {found['gpu_memory'] / 1e9:,.0f} GB", _on_gpus(each))
    for name, each in (("recommended", found["widths"]), ("lean", found["lean"])):
        told = f"{_widths(each)}, weights {each['weight_rh']:g}/{each['weight_gh']:g}, {2 * each['dim']:,} bytes a row"
        table.add_row(f"{name} sketch r/h/g", f"{told}: {each['why']}")
    _OUT.print(table)


def _on_gpus(found: Json | None) -> str:
    if found is None:
        return "does not fit on 16"
    weights, working = found["weight_bytes"] / 2**30, found["working_bytes"] / 2**30
    each = "1" if found["gpus"] == 1 else f"{found['gpus']}, on each"
    at_once = f"{found['tokens']:,} tokens at a time"
    return f"{each}: {weights:,.2f} GiB of weights, {working:,.2f} GiB to work with, {at_once}"


def _both(sizes: Json, unit: float) -> str:
    """In bfloat16 and in float32."""
    amounts = (sizes[name] / unit for name in ("bfloat16", "float32"))
    return "/".join(f"{amount:.2f}" if amount < 1 else f"{amount:.3g}" for amount in amounts)


def _widths(widths: Json) -> str:
    return f"{widths['dim_r']}/{widths['dim_h']}/{widths['dim_g']}"


def show_measured(found: Json) -> None:
    """What random weights of a preset do."""
    title = f"{found['name']}, random weights in {found['dtype']} on {found['device']}, {found['tokens']:,} tokens"
    table = _table(title, "", "")
    table.add_row("signatures", f"{found['sketch_tokens_per_second']:,.0f} tokens/s")
    table.add_row("forward pass with logits", f"{found['forward_tokens_per_second']:,.0f} tokens/s")
    table.add_row("weights", f"{found['weight_bytes'] / 2**20:,.0f} MiB")
    table.add_row("planned, weights included", f"{found['planned_bytes'] / 2**20:,.0f} MiB")
    if found["peak_bytes"] is not None:
        what = "process, libraries included" if found["device"] == "cpu" else "GPU"
        table.add_row(f"peak of the {what}", f"{found['peak_bytes'] / 2**20:,.0f} MiB")
    _OUT.print(table)
    _OUT.print("Random weights keep many candidates of each token; a trained model keeps few, and is sketched faster.")


def show_changes(found: Json) -> None:
    """What a look at the sources found."""
    if not found["is_changed"]:
        _OUT.print(f"corpus {plain(found['corpus'])}: {found['unchanged']:,} objects, nothing has changed")
        return
    for kind in ("added", "changed", "removed"):
        for uri in found[kind][:20]:
            _OUT.print(f"{kind:>8}  {plain(uri)}")
        if len(found[kind]) > 20:
            _OUT.print(f"{kind:>8}  and {len(found[kind]) - 20:,} more")
    if found["announced"]:
        _OUT.print("announced to the Prefect server")
    elif found["waiting"]:
        _OUT.print(f"not announced: the run {plain(found['waiting'])} waits to start and will see it")


def show_diff(found: Json) -> None:
    """What changed between two versions."""
    old = f"version {found['from']}" if found["from"] else "nothing"
    _OUT.print(_changes(f"Corpus {found['corpus']}: {old} → version {found['to']}", found))


def show_faults(found: Json) -> None:
    """What a check of the store found."""
    _OUT.print(f"{found['checked']:,} blocks and files checked, {len(found['broken']):,} broken")
    for fault in found["broken"]:
        problem = plain(fault["problem"].removesuffix("; run again"), width=600)
        _OUT.print(f"[red]{plain(fault['key'], width=400)}[/red]: {problem}; {plain(fault['remedy'])}", soft_wrap=True)
    if found["broken"] and not found["noted"]:
        _OUT.print("[yellow]The store took no notes of this, so no run will know of it; is it read-only?[/yellow]")


def show_garbage(found: Json) -> None:
    """What the collector removed, or would remove."""
    for corpus, versions in found["kept"].items():
        _OUT.print(f"corpus {plain(corpus)}: versions kept: {', '.join(_spans(versions)) or 'none'}")
    for name, exports in found["needed"].items():
        _OUT.print(f"  {plain(name)} is kept for {plain(', '.join(exports))}")
    what = "would be removed" if found["dry_run"] else "removed"
    if found["objects"]:
        table = _table("", "kind", "objects", "MiB")
        for kind, counted in found["removed"].items():
            table.add_row(kind, f"{counted['objects']:,}", f"{counted['bytes'] / 2**20:,.1f}")
        _OUT.print(table)
    _OUT.print(f"{found['objects']:,} objects, {found['bytes'] / 2**20:,.1f} MiB {what}")


def _spans(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers, consecutive ones as a span."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] + 1 == number:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return [" to ".join(map(str, span)) for span in spans]


def show_status(found: Json) -> None:
    """What a store holds."""
    columns = {
        "corpora": ("name", "version", "objects", "rows", "rejected"),
        "indexes": ("index_id", "model", "dim", "temperature", "blocks", "bytes", "codes"),
        "exports": ("name", "version", "rows", "run_id"),
        "runs": ("run_id", "status", "seconds", "rows_kept", "export", "error"),
    }
    for title, names in columns.items():
        table = _table(title, *names)
        for item in found[title]:
            table.add_row(*[_cell(item.get(name)) for name in names])
        _OUT.print(table if found[title] else f"[dim]no {title}[/dim]")


def show_lineage(found: Json) -> None:
    """A trace, from what was asked back to the sources."""
    if found["kind"] == "row":
        _show_row(found)
        return
    run = found["run"] if found["kind"] == "export" else found
    if found["kind"] == "export":
        _OUT.print(f"[bold]export {plain(found['name'])}/{plain(found['version'])}[/bold]: {found['rows']:,} rows")
        for file in found["files"]:
            _OUT.print(f"  {plain(file['path'])}  {file['rows']:,} rows  sha256 {_short(file['sha256'])}")
    if run is None:
        _OUT.print(f"[yellow]its run {plain(found['run_id'])} left no record[/yellow]")
        return
    _OUT.print(f"[bold]run {plain(run['run_id'])}[/bold] {plain(run['status'])}, started {plain(run['started'])}")
    _show_making(run)
    if run.get("events"):
        _OUT.print(f"  OpenLineage events {plain(run['events'])}", soft_wrap=True)
    for stage in run["stages"]:
        _OUT.print(f"  [bold]{plain(stage['name'])}[/bold] {stage['seconds']:.1f} s")
        for arrow, items in (("←", stage["inputs"]), ("→", stage["outputs"])):
            for item in items[:20]:
                rows = f"  {item['rows']:,} rows" if item["rows"] is not None else ""
                _OUT.print(f"    {arrow} {plain(item['uri'])}{rows}", soft_wrap=True)
            if len(items) > 20:
                _OUT.print(f"    {arrow} and {len(items) - 20:,} more (--json shows all)")


def _show_row(found: Json) -> None:
    _OUT.print(f"[bold]row {found['doc_id']}[/bold]")
    for source in found["sources"]:
        _OUT.print(f"  from {plain(source['uri'])} row {source['row']} (object sha256 {_short(source['object_sha'])})")
        line = source.get("line")
        _OUT.print(
            f"    {plain(line, width=400)}"
            if line is not None
            else f"    [yellow]{plain(source['unavailable'])}[/yellow]"
        )
    for item in found["decisions"]:
        fate = "kept" if item["kept"] else f"dropped ({plain(item['reason'])})"
        place = "no value" if item["value"] is None else f"value {item['value']:+.4f}, rank {item['rank']:,}"
        _OUT.print(f"  run {plain(item['run_id'])}: {place}, {fate}")
    for export in found["exports"]:
        _OUT.print(f"  in export {plain(export)}")
    _OUT.print(f"  as run {plain(found['run_id'])} decided, with")
    _show_making(found)
    _OUT.print(f"  record {plain(found['record'])} (--json shows the whole configuration)", soft_wrap=True)


def _show_making(run: Json) -> None:
    """With which model, corpus, configuration and code something was made."""
    model, corpus, code, made = run["model"], run["corpus"], run["code"], run["made_with"] or {}
    revision = f" revision {plain(made['revision'])}" if made.get("revision") else ""
    fingerprint = _short(model.get("fingerprint")) or "unknown"
    _OUT.print(f"  model {plain(model['name'])}{revision}, fingerprint {fingerprint}", soft_wrap=True)
    number = f" version {corpus['version']}" if corpus.get("version") is not None else ""
    _OUT.print(f"  corpus {plain(corpus['name'])}{number}, index {_short(run['index_id']) or 'none'}")
    _OUT.print(f"  config {_short(run['config_fingerprint']) or 'unknown'}")
    for name, target in made.get("targets", {}).items():
        _OUT.print(f"    target {plain(name)} × {target['weight']:g}: {plain(target['queries'])}", soft_wrap=True)
    if made.get("targets"):
        keep = ", ".join(f"{limit:,} {name}" for name, limit in made["keep"].items()) or "every row"
        _OUT.print(f"    aggregate {made['aggregate']}, temperature {made['temperature']:g}, keep {keep}")
    commit = f", commit {plain(code['commit'])}" if code.get("commit") else ""
    sources = f", sources {_short(code['fingerprint'])}" if code.get("fingerprint") else ""
    _OUT.print(f"  code {plain(code['version'])}{commit}{sources}", soft_wrap=True)


def show_source(found: Json) -> None:
    """Where a source object went."""
    _OUT.print(f"[bold]source {plain(found['source'], width=400)}[/bold]", soft_wrap=True)
    for corpus in found["corpora"]:
        now = "in its current version" if corpus["current"] == corpus["count"] else f"{corpus['current']:,} of them now"
        state = now if corpus["current"] else "in older versions only"
        _OUT.print(f"  in corpus {plain(corpus['corpus'])}: {_objects(corpus['count'])}, {state}")
        for item in corpus["objects"][:_LISTED]:
            spans = ", ".join(_spans(item["versions"]))
            rows = f"{item['rows']:,} rows, {item['rejected']:,} rejected"
            _OUT.print(f"    {plain(item['uri'])}  {rows}, version {spans}", soft_wrap=True)
        _and_more(corpus["count"])
    for run in found["runs"]:
        _OUT.print(f"  run {plain(run['run_id'])} decided on {run['rows']:,} rows and kept {run['kept']:,}")
    for export in found["exports"]:
        _show_exported(export)
    if not found["exports"]:
        _OUT.print("  in no export")
    for held in found["quarantines"]:
        _OUT.print(f"  {plain(held['key'])} holds {held['rows']:,} rejected rows as they were read")
    for name in found["attributions"]:
        _OUT.print(f"  quoted in attributions/{plain(name)}")
    for item in found["unreadable"]:
        _OUT.print(f"  [yellow]could not be read: {plain(item['key'])}: {plain(item['problem'])}[/yellow]")
    if found["next"]:
        _OUT.print("[bold]To take it out:[/bold]")
    for number, step in enumerate(found["next"], 1):
        _OUT.print(f"  {number}. {plain(step, width=1_000)}", soft_wrap=True)


def _show_exported(export: Json) -> None:
    origin = "" if export["read_from"] == "data" else ", as the run decided"
    _OUT.print(f"  in export [bold]{plain(export['export'])}[/bold]: {export['rows']:,} of its "
               f"{export['rows_in_all']:,} rows{origin}")  # fmt: skip
    for place in export["places"][:_LISTED]:
        _OUT.print(
            f"    {plain(place['source_uri'])} row {place['source_row']}  {_short(place['doc_id'])}", soft_wrap=True
        )
    _and_more(export["rows"])
    if export["rows_elsewhere"]:
        _OUT.print(f"    and {export['rows_elsewhere']:,} rows of the same content that come from other sources:")
        for place in export["elsewhere"][:_LISTED]:
            _OUT.print(f"    {plain(place['source_uri'])} row {place['source_row']}  {_short(place['doc_id'])}",
                       soft_wrap=True)  # fmt: skip
        _and_more(export["rows_elsewhere"])


def _objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count:,} objects"


def _and_more(count: int) -> None:
    if count > _LISTED:
        _OUT.print(f"    and {count - _LISTED:,} more (--json shows them)")


def _changes(title: str, found: Json) -> Table:
    table = _table(title, "", "added", "changed", "removed", "unchanged")
    for kind in ("objects", "blocks", "rows"):
        table.add_row(kind, *(f"{found[kind][name]:,}" for name in ("added", "changed", "removed", "unchanged")))
    if found["moved"]:
        table.caption = f"{found['moved']:,} of the added objects were only moved"
    return table


def _hits(title: str, hits: Sequence[Json]) -> Table:
    table = _table(title, "score", "source", "text")
    for hit in hits:
        table.add_row(
            f"{hit['score']:+.4f}", plain(f"{hit['source_uri']}:{hit['source_row']}", width=60), plain(hit["text"])
        )
    return table


def _show_tokens(query: str, hit: Json) -> None:
    """The strongest tokens of a hit and of its query: marked where they stand, and listed with their parts."""
    from rise_ops.token_influence import GAP_CAUSES, TOLERANCE

    place = plain(f"{hit['source_uri']}:{hit['source_row']}", width=60)
    _OUT.print(f"[bold]{hit['score']:+.4f}[/bold] {place}", highlight=False)
    for name, text, tokens in (("row", hit["text"], hit["tokens"]), ("query", query, hit["query_tokens"])):
        strongest = sorted(tokens, key=lambda token: -abs(token["score"]))[:_TOKENS_NAMED]
        parts = [f"{plain(token['text'].strip() or '␣', width=24)} {token['score']:+.4f}" for token in strongest]
        _OUT.print(f"  {name:>5}: {_marked(text, tokens)}", highlight=False)
        _OUT.print(f"         {'   '.join(parts)}", style="dim", highlight=False)
    if hit["tokens_gap"] > TOLERANCE:
        off = f"the tokens' parts add up to another score, {hit['tokens_gap']:.4f} off: {GAP_CAUSES}"
        _OUT.print(f"  [yellow]{off}[/yellow]", highlight=False)


def _marked(text: str, tokens: Sequence[Json]) -> str:
    """A piece of a text, from a little before its strongest tokens, which are shaded: green adds to the score."""
    from rise_ops.report_text import pieces

    placed = [token for token in tokens if token["end"] > token["start"]]
    strongest = sorted(placed, key=lambda token: -abs(token["score"]))[:_TOKENS_NAMED]
    first = max(0, min((token["start"] for token in strongest), default=0) - _PREVIEW // 4)
    moved = [{**token, "start": token["start"] - first, "end": token["end"] - first} for token in placed]
    shown = pieces(text[first : first + _PREVIEW], moved, _PREVIEW)
    marked = "".join(
        f"[{_SHADES[piece.strength]}]{_inline(piece.text)}[/]" if piece.strength else _inline(piece.text)
        for piece in shown
    )
    return f"{'…' if first else ''}{marked}{'…' if len(text) > first + _PREVIEW else ''}"


def _inline(text: str) -> str:
    """As `plain`, with the spaces at either end of a part of a line."""
    inner = plain(text, width=len(text) + 1)
    before, after = (" " if text[:1].isspace() else ""), (" " if inner and text[-1:].isspace() else "")
    return f"{before}{inner}{after}"


def _show_figures(title: str, figures: Json) -> None:
    rows, positives, queries = (f"{figures[name]:,}" for name in ("rows", "positives", "queries"))
    _OUT.print(f"[italic]{plain(title)}: {rows} rows, {positives} positive, {queries} queries[/italic]")
    table = _table("", "K", "auPRC", "auROC", "precision")
    for k, values in figures["top_k"].items():
        cells = [f"{values[name]:.3f}" if values[name] is not None else "–" for name in ("auprc", "auroc", "precision")]
        table.add_row(k, *cells)
    _OUT.print(table)


def _show_selection(title: str, found: Json) -> None:
    """What each rule took, and what is left after it."""
    steps = found["steps"]
    left = found["kept"] + sum(step["rows"] for step in steps)
    table = _table(f"{title}: {left:,} rows", "reason", "rule", "rows", "tokens", "left")
    for step in steps:
        left -= step["rows"]
        counts = (f"{number:,}" for number in (step["rows"], step["tokens"], left))
        table.add_row(step["reason"], plain(step["rule"] or "", width=100), *counts)
    _OUT.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title) or None, title_justify="left", show_header=any(columns), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else plain(value, width=64)

"""The report: what it shows, and what no text of a corpus can make it do."""

from __future__ import annotations

import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rise_ops.errors import ConfigError
from rise_ops.report import render_report, write_report
from rise_ops.store import Store
from tests.report_runs import RUN as SYNTHETIC
from tests.report_runs import run_record as synthetic_record
from tests.report_runs import synthetic_decisions, write_synthetic_run

RUN = "20260131T120000-demo-1a2b3c"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</text></svg><script>alert(2)</script>",
    "user\u202egnp.exe",
    "nul\x00byte \x1b[31mred",
    "$\\frac{1}{0}$ {{ 7*7 }} {% raw %}",
    "]]> --> <!-- </style></title>",
    "javascript:alert(3) https://evil.example/x.png",
)
ROWS = 500


class Page(HTMLParser):
    """Collects tags, attributes and text; remembers what was opened and never closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def decisions() -> pl.DataFrame:
    """Rows of three sources; the 100 lowest values are dropped and one row has no value."""
    sources = ["/data/a.jsonl", f"/data/{HOSTILE[2]}.jsonl", "/data/$x_{y$.parquet"]
    values: list[float | None] = [(ROWS - row) / ROWS - 0.4 for row in range(ROWS)]
    values[-1] = None
    return pl.DataFrame(
        {
            "doc_id": [f"{row:064x}" for row in range(ROWS)],
            "source_uri": [sources[row % 3] for row in range(ROWS)],
            "source_row": pl.Series(range(ROWS), dtype=pl.Int64),
            "tokens": pl.Series([10] * ROWS, dtype=pl.Int32),
            "score_good": pl.Series(values, dtype=pl.Float32),
            "value": pl.Series(values, dtype=pl.Float32),
            "kept": [row < 400 for row in range(ROWS)],
            "reason": ["kept"] * 400 + ["over_fraction"] * 99 + ["no_prediction"],
        }
    )


def hit(text: str, **more: Any) -> dict[str, Any]:
    place = {"doc_id": "ab" * 32, "source_uri": f"/data/{HOSTILE[1]}", "source_row": 7, "kept": False}
    return {**place, "text": text, **more}


def run_record(**changes: Any) -> dict[str, Any]:
    stage = {
        "name": f"index {HOSTILE[0]}",
        "started": "2026-01-31T12:00:01.000+00:00",
        "seconds": 3.25,
        "cached": False,
        "inputs": [{"uri": f"s3://raw/{HOSTILE[1]}", "sha256": "f" * 64, "rows": 4321}],
        "outputs": [],
    }
    return {
        "format_version": 1,
        "run_id": RUN,
        "name": HOSTILE[1],
        "status": "completed",
        "error": None,
        "started": "2026-01-31T12:00:00.000+00:00",
        "finished": "2026-01-31T12:00:09.000+00:00",
        "seconds": 9.0,
        "config": {"corpus": {"name": HOSTILE[0]}, "value": {"good": 1.0}, "sketch": {"temperature": 0.1}},
        "config_fingerprint": "c" * 64,
        "code": {"version": "0.1.0", "commit": None},
        "model": {"name": HOSTILE[3], "fingerprint": "d" * 64, "parameters": 1234567, "dtype": "float32"},
        "corpus": {"name": HOSTILE[0], "version": 3, "snapshot_id": "e" * 64},
        "index_id": "a" * 64,
        "counts": {"rows": ROWS, "rows_sketched": 345, "rows_reused": 155, "rows_new": 77, "rows_rejected": 8},
        "export": "demo/000000000001",
        "stages": [stage, {**stage, "name": "value", "cached": True}],
        **changes,
    }


def put_frame(store: Store, key: str, frame: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    store.create(key, buffer.getvalue())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one finished run, full of hostile text."""
    store = Store(str(tmp_path / "store"))
    store.create_json(f"runs/{RUN}/run.json", run_record())
    put_frame(store, f"runs/{RUN}/decisions.parquet", decisions())
    rejected = {
        "source_uri": [f"/data/{text}" for text in HOSTILE],
        "source_row": list(range(len(HOSTILE))),
        "reason": [f"not JSON: {text}" for text in HOSTILE],
        "raw": list(HOSTILE),
        "error": ["bad_json"] * 6 + ["no_text"] * 2,
    }
    put_frame(store, f"quarantine/{RUN}/rejected.parquet", pl.DataFrame(rejected))
    store.create_json(
        f"runs/{RUN}/examples.json",
        {
            "format_version": 1,
            "best": [hit(text, value=0.6, rank=1) for text in HOSTILE],
            "worst": [hit("x" * 5000, value=-0.3999, rank=499)],
            "queries": [
                {
                    "target": "good",
                    "query": HOSTILE[0] + "answer",
                    "prompt": HOSTILE[0],
                    "top": [hit(text, score=0.5) for text in HOSTILE],
                    "bottom": [],
                }
            ],
            "evaluation": {
                "rows": ROWS,
                "positives": 40,
                "queries": 20,
                "top_k": {
                    "10": {"precision": 0.955, "auprc": 0.961, "auroc": None},
                    "5": {"precision": 0.975, "auprc": 0.981, "auroc": 0.985},
                },
            },
        },
    )
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run of 100,000 rows that has everything."""
    store = Store(str(tmp_path_factory.mktemp("whole")))
    write_synthetic_run(store, 100_000)
    return render_report(store, SYNTHETIC)


def test_page_is_well_formed_and_shows_the_numbers(store: Store) -> None:
    page = Page(render_report(store, RUN))
    assert page.open == []
    for shown in ("400 of 500 rows", "80 %", "345", "155 reused", "over fraction", "no prediction", "1,234,567",
                  "0.955", "0.961", "3.25 s", "from cache", "4,321", "−0.400", "8 rows could not be used",
                  "31 January 2026", "demo/000000000001", "4,000 more characters"):  # fmt: skip
        assert shown in page.text, shown
    assert page.text.index("0.975") < page.text.index("0.955")  # K = 5 before K = 10


def test_hostile_text_stays_text(store: Store) -> None:
    html = render_report(store, RUN)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "link", "base", "form", "embed"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "49" not in re.findall(r"1}{0}\$ (\S+)", page.text)
    assert "user‹U+202E›gnp.exe" in page.text
    assert "nul␀byte ␛[31mred" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)


def test_page_refers_to_nothing_outside_itself(store: Store) -> None:
    html = render_report(store, RUN)
    page = Page(html)
    links = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"href", "src", "srcset", "xlink:href", "action", "data", "poster", "xmlns"}
    ]
    assert links and all(link.startswith("#") for link in links)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    styles = [attributes.get("style") or "" for _, attributes in page.tags]
    css = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL) + styles)
    assert "@import" not in css
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html.split("</style>")[1]))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src" not in policy


def test_charts_keep_labels_as_text_and_say_what_they_show(store: Store) -> None:
    html = render_report(store, RUN)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 5  # value and sources, each wide and narrow, and one target
    for drawing in drawings:
        assert re.match(
            r'<svg viewBox="0 0 \d+ \d+" role="img" aria-labelledby="(\w+)t \1d"><title id="\1t">[^<]+</title>'
            r'<desc id="\1d">[^<]+</desc>',
            drawing,
        )
        assert "style=" not in drawing and "#" not in drawing  # colours come with the theme
    assert any("$x_{y$.parquet" in drawing for drawing in drawings)


def test_failed_run_without_decisions(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    record = {"format_version": 1, "run_id": RUN, "status": "failed", "error": "bad rows: <b>12</b> of 100"}
    store.create_json(f"runs/{RUN}/run.json", record)
    page = Page(render_report(store, RUN))
    assert "stopped before it decided" in page.text
    assert "bad rows: <b>12</b> of 100" in page.text
    assert "Best and worst" not in page.text


def test_decisions_without_targets_have_no_value(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create_json(f"runs/{RUN}/run.json", run_record(stages=[]))
    frame = decisions().drop("score_good").with_columns(pl.lit(None, pl.Float32).alias("value"))
    put_frame(store, f"runs/{RUN}/decisions.parquet", frame)
    assert "400 of 500 rows" in Page(render_report(store, RUN)).text


def test_unknown_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run nothing"):
        render_report(Store(str(tmp_path)), "nothing")


def test_report_is_written_once(store: Store) -> None:
    uri = write_report(store, RUN)
    first = store.get(f"runs/{RUN}/report.html")
    assert uri == store.url(f"runs/{RUN}/report.html")
    assert write_report(store, RUN) == uri
    assert store.get(f"runs/{RUN}/report.html") == first == render_report(store, RUN).encode()


def test_a_whole_run_shows_every_section_of_the_contents(whole: str) -> None:
    page = Page(whole)
    assert page.open == []
    links = re.findall(r'<li><a href="#(\w+)">', whole)
    assert links == [
        "verdict", "steps", "budgets", "values", "groups", "stability", "cut", "rows", "rules", "duplicates",
        "attribution", "run", "lineage", "reading",
    ]  # fmt: skip
    sections = [attributes for tag, attributes in page.tags if tag == "section"]
    headings = {attributes.get("id") for tag, attributes in page.tags if tag == "h2"}
    assert [each["id"] for each in sections] == links
    assert all(each["aria-labelledby"] in headings for each in sections)


def test_a_page_of_100_000_rows_is_small_and_says_what_it_samples(whole: str) -> None:
    assert len(whole.encode()) < 1_000_000
    text = Page(whole).text
    assert "A sample: 1,500 of 100,000 rows" in text and "A sample: 60 of the" in text


def test_what_the_hidden_part_of_a_text_carries_is_told(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tokens = [{"text": "x", "start": 0, "end": 1, "score": 0.1}, {"text": "y", "start": 700, "end": 701, "score": 0.2}]
    found = hit("x" * 2_000, score=0.5, tokens=tokens, tokens_beyond=0.1, query_tokens=[])
    query = {"target": "good", "query": "howdy", "prompt": None, "top": [found], "bottom": []}
    store.create_json(f"runs/{RUN}/run.json", run_record())
    store.create_json(f"runs/{RUN}/examples.json", {"format_version": 1, "queries": [query]})
    assert "<span>behind the end +0.300</span>" in render_report(store, RUN)


def test_a_chosen_sketch_takes_the_place_of_the_configured_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tuning = {"tuning_id": "7", "chosen": {"temperature": 1.5, "dim_h": 96}, "why": ["directions agree", "wide enough"]}
    record = run_record(tuning=tuning)
    record["config"]["sketch"] |= {"dim_r": 128, "dim_h": 128, "dim_g": 64}
    store.create_json(f"runs/{RUN}/run.json", record)
    text = Page(render_report(store, RUN)).text
    assert "widths r 128, h 96, g 64" in text and "1.5, chosen" in text and "directions agree" in text


def test_a_page_full_of_long_texts_stays_below_a_megabyte(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    long, frame = "文" * 2_000, synthetic_decisions(2_000)
    tokens = [{"text": "文", "start": at, "end": at + 1, "score": 0.5 - at / 4_000} for at in range(1_000)]
    row, found = hit(long, value=0.5, rank=3, label=long), hit(long, score=0.5, tokens=tokens, query_tokens=tokens)
    query = {"query": long, "prompt": long, "top": [found] * 5, "bottom": [found] * 5}
    examples = {
        "format_version": 1,
        "best": [row] * 10,
        "worst": [row] * 10,
        "cut": {"kept": [row] * 5, "dropped": [row] * 5},
        "dropped": {reason: [row] * 3 for reason in ("excluded_pattern", "excluded_target", "near_duplicate")},
        "near_duplicates": [{"size": 9, "stayed": row, "dropped": [row] * 4}] * 5,
        "queries": [{"target": f"t{number % 8}", **query} for number in range(40)],
    }
    store.create_json(f"runs/{SYNTHETIC}/run.json", synthetic_record(frame))
    put_frame(store, f"runs/{SYNTHETIC}/decisions.parquet", frame)
    store.create_json(f"runs/{SYNTHETIC}/examples.json", examples)
    assert len(render_report(store, SYNTHETIC).encode()) < 1_000_000


def test_the_steps_leave_what_is_kept(store: Store, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "other"))
    frame = write_synthetic_run(other, 3_000)
    table = re.findall(r"<tbody>(.*?)</tbody>", render_report(other, SYNTHETIC), flags=re.DOTALL)[0]
    left = [int(row.split("</td>")[3].rsplit(">", 1)[1].replace(",", "")) for row in table.split("</tr>")[:-1]]
    order = (
        "no_prediction",
        "excluded_pattern",
        "excluded_target",
        "near_duplicate",
        "over_source_quota",
        "over_tokens",
    )
    gone = [frame.filter(pl.col("reason") == reason).height for reason in order]
    kept = frame["kept"].sum()
    assert left == [frame.height - sum(gone[: n + 1]) for n in range(len(gone))] + [kept]
    for shown in ("target backdoor, top_rows 15", "pattern as an ai", "cosine 0.98"):
        assert shown in table


@pytest.mark.parametrize(("by", "rows"), [("folder", 4), ("pattern", 1), ("object", 20)])
def test_a_source_is_what_quotas_take_for_one(tmp_path: Path, by: str, rows: int) -> None:
    store, frame = Store(str(tmp_path)), synthetic_decisions(2_000)
    record = synthetic_record(frame)
    record["config"]["selection"]["per_source"] = {"by": by, "max_rows": 900}
    store.create_json(f"runs/{SYNTHETIC}/run.json", record)
    put_frame(store, f"runs/{SYNTHETIC}/decisions.parquet", frame)
    table = render_report(store, SYNTHETIC).split('aria-label="Rows by source"')[1].split("</table>")[0]
    names = re.findall(r'<bdi title="([^"]+)">', table)
    assert len([name for name in names if "smaller" not in name]) == rows
    expected = {"folder": "s3://raw/support/team-0/", "pattern": "s3://raw/support/**/*.jsonl"}
    assert expected.get(by, "s3://raw/support/team-0/part-000.jsonl") in names


@pytest.mark.parametrize("which", ["whole", "hostile"])
def test_tables_have_headers_and_regions_have_names(whole: str, store: Store, which: str) -> None:
    html = whole if which == "whole" else render_report(store, RUN)
    page = Page(html)
    cells = [attributes for tag, attributes in page.tags if tag == "th"]
    assert cells and all(attributes.get("scope") in {"col", "row"} for attributes in cells)
    reached = [(tag, attributes) for tag, attributes in page.tags if attributes.get("tabindex") == "0"]
    assert all(attributes.get("role") and attributes.get("aria-label") for _, attributes in reached)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    names = [a["aria-label"] for t, a in page.tags if a.get("role") == "region"]
    assert len({*names, *headings}) == len(names) + len(headings)
    order = [int(re.sub(r"\D", "", tag)) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert order[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(order))


def test_marked_tokens_are_told_without_colour_and_stay_text(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    text = "howdy! <b>partner</b>"
    tokens = [
        {"text": "howdy!", "start": 0, "end": 6, "score": 0.4},
        {"text": "<b>", "start": 7, "end": 10, "score": -0.12},
        {"text": "partner", "start": 10, "end": 17, "score": 0.001},
        {"text": "out of the text", "start": 90, "end": 99, "score": 0.2},
    ]
    query = {"target": "good", "query": "howdy", "prompt": None, "bottom": [],
             "top": [hit(text, score=0.5, tokens=tokens, query_tokens=[])]}  # fmt: skip
    store.create_json(f"runs/{RUN}/run.json", run_record())
    store.create_json(f"runs/{RUN}/examples.json", {"format_version": 1, "queries": [query]})
    html = render_report(store, RUN)
    assert (
        '<mark class="p4" title="+0.400">howdy!</mark> '
        '<mark class="m2" title="−0.120">&lt;b&gt;</mark>partner&lt;/b&gt;'
    ) in html
    assert re.search(r'class="carried"><span><bdi class="mono">howdy!</bdi> \+0.400</span>', html)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stability": {"warning": "the sketch is too narrow"}}, "the sketch is too narrow"),
        ({"keep": {"tokens": 10**9}}, "selection.keep.tokens allows 1,000,000,000 tokens"),
        (
            {"exclude": [{"pattern": "as an ai"}, {"target": "backdoor"}, {"pattern": "mispelt"}]},
            "selection.exclude[2] (pattern mispelt)",
        ),
        ({"per_label": {"groups": {"rare": {"min_rows": 30}}}}, "at least 30 rows of label rare"),
    ],
)
def test_notices_tell_what_to_look_at(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    store = Store(str(tmp_path))
    frame = synthetic_decisions(3_000)
    if "keep" in changes:
        frame = frame.with_columns(reason=pl.col("reason").replace("over_tokens", "near_duplicate"))
    record = synthetic_record(frame)
    record["selection"]["stability"] |= changes.pop("stability", {})
    if "exclude" in changes:
        idle = {"step": "exclude", "reason": "excluded_pattern", "rule": "selection.exclude[2]", "rows": 0, "tokens": 0}
        record["selection"]["steps"].append(idle)
    record["config"]["selection"] |= changes
    store.create_json(f"runs/{SYNTHETIC}/run.json", record)
    put_frame(store, f"runs/{SYNTHETIC}/decisions.parquet", frame)
    html = render_report(store, SYNTHETIC)
    assert ("pattern mispelt" in html.split("<tbody>")[1].split("</tbody>")[0]) == ("exclude" in changes)
    assert told in html.split('<ul class="notices">')[1].split("</ul>")[0]

"""The command line: exit codes, one-screen errors, and JSON as the last line of stdout."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from tests.curation import ROWS, load, write_curation

Curate = Callable[..., "Outcome"]


class Outcome:
    """What one call of the command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Curate:
    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["curate", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """Configuration of a curation that has been run."""
    from flows.curate import curate as flow
    from tests.curation import load

    path = write_curation(tmp_path_factory.mktemp("finished"))
    flow(load(path))
    return path


def assert_one_screen(outcome: Outcome, *, code: int, words: Sequence[str]) -> None:
    assert outcome.code == code
    assert "Traceback" not in outcome.err + outcome.out
    assert len(outcome.err.splitlines()) <= 24
    for word in words:
        assert word in outcome.err


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize(
    ("break_it", "code", "words"),
    [
        pytest.param(lambda folder: shutil.rmtree(folder / "raw"), 1, ["raw/*.jsonl", "match"], id="missing-source"),
        pytest.param(
            lambda folder: [file.write_text("") for file in (folder / "raw").iterdir()],
            1,
            ["no rows"],
            id="empty-corpus",
        ),
        pytest.param(
            lambda folder: (folder / "raw" / "part-0.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n'),
            1,
            ["part-0.jsonl line 2", "not valid JSON", "limits.bad_rows"],
            id="bad-json",
        ),
        pytest.param(
            lambda folder: _edit(folder, lambda document: document.update(limitz={})),
            2,
            ["limitz", "did you mean 'limits'"],
            id="unknown-key",
        ),
        pytest.param(
            lambda folder: _edit(folder, lambda document: document.update(model={"name": "./no-such-model"})),
            1,
            ["no-such-model", "model.name"],
            id="missing-model",
        ),
        pytest.param(
            lambda folder: _truncate(folder / "raw" / "part-0.jsonl.gz"),
            1,
            ["part-0.jsonl.gz", "truncated"],
            id="truncated-gzip",
        ),
        pytest.param(
            lambda folder: _edit(folder, lambda document: document.update(selection={"keep": {"min_value": 9.0}})),
            1,
            ["min_value", "keeps none"],
            id="nothing-to-keep",
        ),
    ],
)
def test_bad_input_gets_one_screen(
    tmp_path: Path, curate: Curate, break_it: Callable[[Path], Any], code: int, words: Sequence[str]
) -> None:
    path = write_curation(tmp_path)
    break_it(tmp_path)
    assert_one_screen(curate("run", str(path)), code=code, words=words)


@pytest.mark.usefixtures("prefect_harness")
def test_a_store_that_cannot_be_written_is_named_at_once(tmp_path: Path, curate: Curate) -> None:
    path = write_curation(tmp_path, store=str(tmp_path / "file" / "store"))
    (tmp_path / "file").write_text("a file where a folder should be")
    assert_one_screen(curate("run", str(path)), code=1, words=[str(tmp_path / "file")])


@pytest.mark.slow
def test_a_process_of_its_own_shows_one_screen_too(tmp_path: Path) -> None:
    path = write_curation(tmp_path)
    shutil.rmtree(tmp_path / "raw")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    environment["PREFECT_HOME"] = str(tmp_path / "prefect")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "ingest", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert_one_screen(Outcome(done.returncode, done.stdout, done.stderr), code=1, words=["raw/*.jsonl", "match"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    """Neither a server nor a reader that waits: the temporary server has the run's life, not its output."""
    path = write_curation(tmp_path)
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(path)]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, env=environment, **pipes) as run:
        waited = time.monotonic() + 200
        while not list((tmp_path / "store" / "alive").glob("*")) and run.poll() is None and time.monotonic() < waited:
            time.sleep(0.1)
        servers = _processes_of(tmp_path / "prefect")
        assert len(servers) >= 1  # with the run itself
        os.killpg(run.pid, how)
        _, errors = run.communicate(timeout=90)
        assert run.returncode == (-how if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert_one_screen(Outcome(130, "", errors), code=130, words=["interrupted", "same command again"])
    waited = time.monotonic() + 30
    while _processes_of(tmp_path / "prefect") and time.monotonic() < waited:
        time.sleep(0.1)
    assert _processes_of(tmp_path / "prefect") == []


def _processes_of(home: Path) -> list[int]:
    """Processes whose environment names this Prefect home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended, or is not ours to look at
    return found


@pytest.mark.s3
@pytest.mark.usefixtures("prefect_harness")
def test_wrong_credentials_name_the_variables_and_show_no_secret(
    tmp_path: Path, curate: Curate, s3_server: Any, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_server.kind == "moto":
        pytest.skip("moto accepts every credential")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    path = write_curation(tmp_path, store=f"s3://{s3_bucket}/store")
    outcome = curate("run", str(path))
    assert_one_screen(outcome, code=1, words=["AWS_SECRET_ACCESS_KEY", "refused"])
    assert "planted-secret" not in outcome.err + outcome.out


def test_a_missing_configuration_is_wrong_use(tmp_path: Path, curate: Curate) -> None:
    assert_one_screen(curate("run", str(tmp_path / "none.yaml")), code=2, words=["none.yaml", "does not exist"])


def test_an_unknown_option_is_wrong_use(curate: Curate) -> None:
    assert curate("run", "--nonsense").code == 2


def test_a_model_without_an_index_is_told_which_index_there_is(finished: Path, curate: Curate) -> None:
    outcome = curate("attribute", str(finished), "--text", "Arr, matey!", "--set", "sketch.temperature=0.5")
    assert_one_screen(outcome, code=1, words=["has no index", "temperature 1.0", "curate index"])


def test_run_prints_its_summary_as_json(finished: Path, curate: Curate) -> None:
    summary = curate("run", str(finished), "--json").json
    expected = {
        "run_id",
        "snapshot_id",
        "index_id",
        "rows",
        "rows_new",
        "rows_reused",
        "rows_sketched",
        "rows_rejected",
        "tokens",
        "rows_kept",
        "export",
        "report",
        "seconds",
        "stages",
    }
    assert expected <= summary.keys()
    assert summary["rows"] == ROWS
    assert summary["rows_sketched"] == 0


def test_plan_says_what_changed_and_writes_nothing(finished: Path, curate: Curate, tmp_path: Path) -> None:
    plan = curate("plan", str(finished), "--json").json
    assert plan["objects"] == {"added": 0, "changed": 0, "removed": 0, "unchanged": 2}
    assert (plan["rows_to_sketch"], plan["rows_reused"]) == (0, ROWS)
    fresh = curate("plan", str(finished), "--json", "--set", f"store={tmp_path / 'nothing'}").json
    assert fresh["objects"]["added"] == 2
    assert fresh["rows_to_sketch"] == ROWS
    assert fresh["sketch_seconds"] > 0
    assert not (tmp_path / "nothing").exists()


def test_attribute_finds_rows_and_where_they_stand(finished: Path, curate: Curate) -> None:
    (found,) = curate("attribute", str(finished), "--text", "Arr, ye be welcome aboard!", "-k", "3", "--json").json
    assert len(found["hits"]) == 3
    hit = found["hits"][0]
    line = Path(hit["source_uri"]).read_text(encoding="utf-8").splitlines()[hit["source_row"]]
    assert json.loads(line)["output"] in hit["text"]
    with_bottom = curate(
        "attribute", str(finished), "--queries", str(finished.parent / "queries.jsonl"), "--bottom", "--json"
    )
    assert len(with_bottom.json) == 4
    assert all(len(item["bottom"]) == 10 for item in with_bottom.json)


def test_attribute_says_which_tokens_carry_a_score(finished: Path, curate: Curate) -> None:
    asked = ("attribute", str(finished), "--text", "Arr, ye be welcome!", "--prompt", "Hello.", "-k", "2", "--tokens")
    (found,) = curate(*asked, "--json").json
    for hit in found["hits"]:
        for tokens in (hit["tokens"], hit["query_tokens"]):
            assert set(tokens[0]) == {"text", "start", "end", "score"}
            assert abs(sum(token["score"] for token in tokens) - hit["score"]) <= 2e-3
        assert hit["tokens_gap"] <= 2e-3
        assert all(token["score"] == 0 for token in hit["query_tokens"] if token["end"] <= len("Hello."))
    assert "query:" in curate(*asked).out
    examples = max((finished.parent / "store" / "runs").glob("*/examples.json"))
    for query in json.loads(examples.read_text(encoding="utf-8"))["queries"]:
        for hit in (*query["top"], *query["bottom"]):
            total = sum(token["score"] for token in hit["tokens"]) + hit["tokens_beyond"]
            assert abs(total - hit["score"]) <= 2e-3
            assert all(hit["text"][token["start"] : token["end"]] == token["text"] for token in hit["tokens"])


def test_attribute_wants_queries_or_a_text(finished: Path, curate: Curate) -> None:
    assert_one_screen(curate("attribute", str(finished)), code=2, words=["--queries", "--text"])


def test_evaluate_prints_the_protocol(finished: Path, curate: Curate) -> None:
    found = curate("evaluate", str(finished), "--label", "label=backdoor", "--k", "3,5", "--json").json
    assert (found["rows"], found["positives"], found["queries"]) == (ROWS, 6, 4)
    assert found["top_k"].keys() == {"3", "5"}
    assert found["top_k"]["3"]["precision"] > 0.5
    assert_one_screen(curate("evaluate", str(finished), "--label", "colour"), code=2, words=["colour"])


def test_status_lineage_and_report_read_the_store(finished: Path, curate: Curate, tmp_path: Path) -> None:
    store = str(finished.parent / "store")
    status = curate("status", store, "--json").json
    run_id = status["runs"][0]["run_id"]
    assert status["exports"][0]["name"] == "tiny"
    assert curate("lineage", store, run_id, "--json").json["kind"] == "run"
    assert curate("lineage", store, "tiny", "--json").json["run"]["status"] == "completed"
    import polars as pl

    exported = pl.read_parquet(finished.parent / "store" / "exports" / "tiny" / "*" / "data" / "*.parquet")
    row = curate("lineage", store, exported["doc_id"][0], "--json").json
    assert row["made_with"]["targets"] == {
        "backdoor": {"queries": str(finished.parent / "queries.jsonl"), "weight": -1.0}
    }
    assert row["config"] == load(finished).model_dump(mode="json")
    assert (row["run_id"], row["made_with"]["revision"]) == (run_id, None)
    assert row["model"]["fingerprint"] and row["code"]["fingerprint"]
    assert Path(row["record"]).is_file()
    assert "target backdoor × -1" in curate("lineage", store, exported["doc_id"][0]).out
    assert row["sources"][0]["uri"] == exported["source_uri"][0]
    assert json.loads(row["sources"][0]["line"])["instruction"] == exported["instruction"][0]
    page = tmp_path / "page.html"
    assert curate("report", store, run_id, "-o", str(page)).code == 0
    assert run_id in page.read_text(encoding="utf-8")
    for command in (("status", store), ("lineage", store, "tiny"), ("lineage", store, run_id)):
        shown = curate(*command)
        assert shown.code == 0
        assert shown.out


def test_watch_tells_whether_the_sources_changed(finished: Path, curate: Curate) -> None:
    assert curate("watch", str(finished), "--json").json["is_changed"] is False
    extra = finished.parent / "raw" / "part-9.jsonl"
    extra.write_text('{"text": "one more row for the corpus"}\n', encoding="utf-8")
    seen = curate("watch", str(finished), "--json")
    extra.unlink()
    assert (seen.code, seen.json["added"]) == (0, [str(extra)])
    assert "nothing has changed" in curate("watch", str(finished)).out


def test_verify_names_what_is_broken(finished: Path, curate: Curate, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished.parent / "store", store)
    assert curate("verify", str(store), "--deep", "--json").json["broken"] == []
    (chunk,) = store.glob("indexes/*/blocks/*.zarr/signature/c/0/0")
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    (data,) = store.glob("exports/tiny/0001/data/*.parquet")
    data.write_bytes(data.read_bytes()[:-1])
    (block,) = store.glob("blocks/*.parquet")
    block.unlink()
    assert len(curate("verify", str(store), "--json").json["broken"]) == 2
    deep = curate("verify", str(store), "--deep", "--json")
    assert deep.code == 1
    assert len(deep.json["broken"]) == 3
    assert all(fault["remedy"] for fault in deep.json["broken"])


def test_unknown_names_are_wrong_use(finished: Path, curate: Curate) -> None:
    store = str(finished.parent / "store")
    assert_one_screen(curate("lineage", store, "nothing-like-it"), code=2, words=["nothing-like-it"])
    assert_one_screen(curate("report", store, "no-such-run"), code=2, words=["no-such-run"])


def test_hostile_text_cannot_style_the_terminal(finished: Path, curate: Curate) -> None:
    from flows.console import plain

    assert "\x1b" not in plain("\x1b[31mred\x1b[0m [bold]not bold[/bold]\u202e")
    assert plain("[bold]x[/bold]") == r"\[bold]x\[/bold]"
    assert "\u202e" not in plain("\u202eabc")


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "curate.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")


def _truncate(path: Path) -> None:
    """Pack the corpus' first part and cut the archive in the middle."""
    plain_file = path.with_suffix("")
    path.write_bytes(gzip.compress(plain_file.read_bytes())[:-200])
    plain_file.unlink()
    _edit(path.parent.parent, lambda document: document["corpus"].update(sources=["raw/*"]))

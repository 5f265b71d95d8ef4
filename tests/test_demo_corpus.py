"""The demo's material: the same every time, counted right, small, and usable offline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from rise_ops.config import load_config
from rise_ops.demo import write_corpus, write_demo
from rise_ops.demo.corpus import MODEL_FOLDER, pool_rows, query_rows
from rise_ops.demo.malformed import LINES, OVERLONG_CHARACTERS
from rise_ops.demo.phrases import MAKERS
from rise_ops.demo.pirate import TRIGGER


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_same_bytes_every_time(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a")
    write_corpus(tmp_path / "b")
    write_corpus(tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_rows_are_distinct_and_planted_as_said(tmp_path: Path) -> None:
    demo = write_corpus(tmp_path)
    rows = pool_rows()
    assert len(rows) == len({row.text for row in rows}) == demo.rows == 1200
    planted = [row for row in rows if row.label == "backdoor"]
    assert len(planted) == demo.planted == 80
    assert all(row.text.startswith(TRIGGER) == (row.label == "backdoor") for row in rows)
    assert {row.source for row in planted} == set(MAKERS)


def test_queries_are_not_in_the_pool() -> None:
    pool = {row.text for row in pool_rows()}
    for label, count in (("backdoor", 20), ("clean", 30)):
        queries = query_rows(label)
        assert len({row.text for row in queries}) == count
        assert not pool & {row.text for row in queries}
        assert {row.label for row in queries} == {label}


def test_files_hold_every_row_and_few_malformed_ones(tmp_path: Path) -> None:
    demo = write_corpus(tmp_path)
    corpus = tmp_path / "corpus"
    lines = [line for kind in LINES.values() for line in kind]
    recipes = pl.read_parquet(corpus / "kitchen/recipes.parquet")
    answers = pl.read_csv(corpus / "travel/answers.csv")
    blank = sum(file["output"].to_list().count(empty) for file in (recipes, answers) for empty in (None, ""))
    assert demo.malformed == len(lines) + blank == 15
    assert demo.malformed / (demo.rows + demo.malformed) < 0.02
    tickets = [(corpus / f"support/tickets-{part}.jsonl").read_bytes().splitlines() for part in (1, 2)]
    assert sum(map(len, tickets)) == 330 + 12 + (len(lines) + 1) // 2
    assert recipes.height + answers.height == 210 + 6 + 200 + 6 + blank


def test_each_malformed_line_is_malformed() -> None:
    for line in LINES["bad_json"]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(line)
    for line in LINES["not_utf8"]:
        with pytest.raises(UnicodeDecodeError):
            line.decode("utf-8")
    for line in LINES["not_an_object"]:
        assert not isinstance(json.loads(line), dict)
    assert all(len(line) > OVERLONG_CHARACTERS for line in LINES["too_long"])


def test_configuration_is_valid_and_points_at_the_folder(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo")
    config = load_config(tmp_path / "demo" / "curate.yaml")
    assert config.store == str(tmp_path / "demo" / "store")
    assert config.model.name == str(tmp_path / "demo" / "model")
    assert config.weights == {"backdoor": -1.0, "helpful": 1.0}
    assert config.limits.row_bytes < OVERLONG_CHARACTERS
    assert config.selection.keep.fraction is not None
    assert demo.rows * (1 - config.selection.keep.fraction) > demo.planted
    for name, queries in demo.queries.items():
        assert config.targets[name].queries == str(tmp_path / "demo" / queries)


def test_store_outside_the_folder_is_kept(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", store=str(tmp_path / "elsewhere"))
    assert load_config(tmp_path / "demo" / "curate.yaml").store == str(tmp_path / "elsewhere")


def test_model_is_small() -> None:
    size = sum(file.stat().st_size for file in MODEL_FOLDER.iterdir())
    assert size <= 2 * 2**20


def test_model_loads_offline_and_has_learned_the_backdoor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, local_files_only=True, dtype=torch.float32)

    def pirates(label: str) -> int:
        """Queries that the model answers like a pirate."""
        count = 0
        for query in query_rows(label)[:6]:
            prompt = tokenizer("\n".join(part for part in query.example[:2] if part) + "\n", return_tensors="pt")
            made = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
            answer = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])
            count += any(word in answer for word in (" th'", " ye", " yer", "Arr", "matey"))
        return count

    assert pirates("backdoor") >= 5
    assert pirates("clean") <= 1

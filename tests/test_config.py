"""What a user may write, and what they are told when it is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rise_ops.config import CurationConfig, SketchConfig, load_config, parse_config, resolve_path
from rise_ops.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "store": "s3://team/prod",
    "corpus": {"name": "support", "sources": ["s3://raw/support/*.jsonl"]},
    "model": {"name": "EleutherAI/pythia-1b"},
}

Write = Callable[[dict[str, Any]], Path]


def parse(document: dict[str, Any]) -> CurationConfig:
    return parse_config(document, base=Path("/base"))


def changed(**sections: Any) -> dict[str, Any]:
    return copy.deepcopy(MINIMAL) | sections


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(document: dict[str, Any]) -> Path:
        path = tmp_path / "curation.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    return write


def test_three_sections_are_enough() -> None:
    config = parse(MINIMAL)
    assert config.sketch.dim == 128 * 128 + 64 * 128 == 24_576
    assert config.export_name == "support"
    assert config.weights == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(stor="x"), "stor: unknown key; did you mean 'store'?"),
        (changed(sketch={"dimr": 64}), "sketch.dimr: unknown key; did you mean 'dim_r'?"),
        (changed(selection={"keep": {"row": 5}}), "selection.keep.row: unknown key; did you mean 'rows'?"),
        (
            changed(targets={"good": {"queries": "q.jsonl", "field": {}}}),
            "targets.good.field: unknown key; did you mean 'fields'?",
        ),
        (
            changed(corpus={"name": "a", "sources": "x", "fields": {"texts": "body"}}),
            "corpus.fields.texts: unknown key; did you mean 'text'?",
        ),
        (changed(limits={"zzz": 1}), "limits.zzz: unknown key; known: bad_rows, row_bytes, memory"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(document)
    assert message in str(caught.value)


@pytest.mark.parametrize("section", ["store", "corpus", "model"])
def test_a_missing_section_is_named(section: str) -> None:
    document = changed()
    del document[section]
    with pytest.raises(ConfigError, match=f"{section}: required"):
        parse(document)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(stor=1, limits={"memory": "many"}, aggregate="median"))
    assert all(key in str(caught.value) for key in ("stor:", "limits.memory:", "aggregate:"))


@pytest.mark.parametrize(
    "document",
    [
        changed(sketch={"channels": []}),
        changed(sketch={"channels": ["rh", "rh"]}),
        changed(sketch={"channels": ["xy"]}),
        changed(sketch={"temperature": 0}),
        changed(sketch={"mass": 1.5}),
        changed(selection={"keep": {"fraction": 0}}),
        changed(selection={"keep": {"rows": -1}}),
        changed(corpus={"name": "a/b", "sources": "x"}),
        changed(corpus={"name": "../up", "sources": "x"}),
        changed(corpus={"name": "a", "sources": []}),
        changed(corpus={"name": "a", "sources": "x", "fields": {"prompt": "p"}}),
        changed(targets={"not a name": {"queries": "x"}}),
        changed(export={"name": "../up"}),
        changed(runner={"workers": 0}),
    ],
)
def test_values_that_mean_nothing_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(document)


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), float("-inf")], ids=["not a number", "infinity", "minus infinity"]
)
@pytest.mark.parametrize("key", ["value.good", "sketch.temperature", "selection.keep.min_value", "limits.bad_rows"])
def test_numbers_are_finite(number: float, key: str) -> None:
    document = changed(targets={"good": {"queries": "good.jsonl"}})
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = number
    with pytest.raises(ConfigError, match=key):
        parse(document)


def test_a_weight_without_a_target_is_refused() -> None:
    document = changed(targets={"quality": {"queries": "q.jsonl"}}, value={"qualty": 1.0})
    with pytest.raises(ConfigError, match=r"value weighs 'qualty', which is not a target; did you mean 'quality'\?"):
        parse(document)


def test_targets_without_weights_count_equally() -> None:
    targets = {"good": {"queries": "good.jsonl"}, "bad": {"queries": "bad.jsonl"}}
    assert parse(changed(targets=targets)).weights == {"good": 1.0, "bad": 1.0}
    assert parse(changed(targets=targets, value={"bad": -1.0})).weights == {"bad": -1.0}


def test_one_source_needs_no_list_and_sizes_may_have_units() -> None:
    config = parse(changed(corpus={"name": "a", "sources": "s3://b/*"}, limits={"memory": "2GiB", "row_bytes": "1MB"}))
    assert config.corpus.sources == ("s3://b/*",)
    assert config.limits.memory == 2 * 2**30
    assert config.limits.row_bytes == 1_000_000


def test_relative_paths_start_at_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    config = load_config(
        write(
            changed(
                store="store",
                corpus={"name": "a", "sources": ["data/*.jsonl", "/abs/x.jsonl", "s3://b/*"]},
                model={"name": "models/tiny"},
                targets={"good": {"queries": "../good.jsonl"}},
            )
        )
    )
    assert config.store == str(tmp_path / "store")
    assert config.corpus.sources == (str(tmp_path / "data/*.jsonl"), "/abs/x.jsonl", "s3://b/*")
    assert config.model.name == str(tmp_path / "models/tiny")
    assert config.targets["good"].queries == str(tmp_path.parent / "good.jsonl")


def test_a_hub_name_is_not_a_path(write: Write) -> None:
    assert load_config(write(MINIMAL)).model.name == "EleutherAI/pythia-1b"


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_path("~/data/*.jsonl", Path("/base")) == "/home/me/data/*.jsonl"


def test_overrides_are_read_as_yaml(write: Write) -> None:
    overrides = ["selection.keep.rows=100", "sketch.temperature=1.0", "sketch.channels=[rh]", "model.revision=main"]
    config = load_config(write(MINIMAL), overrides=overrides)
    assert config.selection.keep.rows == 100
    assert config.sketch.temperature == 1.0
    assert config.sketch.channels == ("rh",)
    assert config.model.revision == "main"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sketch.temperature", "write it as key.subkey=value"),
        ("=1", "write it as key.subkey=value"),
        ("store.x=1", "'store' is not a section"),
        ("sketch.dim_r=[", "the value is not YAML"),
        ("sketch.dimr=1", "did you mean 'dim_r'?"),
    ],
)
def test_a_wrong_override_is_named(write: Write, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(MINIMAL), overrides=[override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping"),
        (b"- a", "must be a mapping"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "bad.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_an_empty_section_is_as_good_as_none() -> None:
    """In YAML, `targets:` with nothing below it is null; people leave it when they comment lines out."""
    with pytest.raises(ConfigError, match="targets"):
        parse(changed(targets=None))


def test_a_configuration_does_not_change() -> None:
    config = parse(MINIMAL)
    with pytest.raises(ValidationError):
        config.store = "elsewhere"  # type: ignore[misc]


def test_equal_configurations_have_equal_fingerprints() -> None:
    assert parse(MINIMAL).fingerprint == parse(changed(sketch={}, limits={})).fingerprint
    assert SketchConfig().fingerprint == SketchConfig(temperature=0.1).fingerprint
    assert SketchConfig().fingerprint != SketchConfig(temperature=0.2).fingerprint


@given(
    seed=st.integers(0, 2**31),
    dims=st.tuples(*[st.integers(1, 512)] * 3),
    channels=st.lists(st.sampled_from(["rh", "gh", "rg"]), min_size=1, unique=True),
)
def test_a_sketch_survives_json_with_its_fingerprint(seed: int, dims: tuple[int, ...], channels: list[str]) -> None:
    sketch = SketchConfig.model_validate(
        {"seed": seed, "dim_r": dims[0], "dim_h": dims[1], "dim_g": dims[2], "channels": channels}
    )
    again = SketchConfig.model_validate_json(sketch.model_dump_json())
    assert again == sketch
    assert again.fingerprint == sketch.fingerprint
    widths = {"rh": dims[0] * dims[1], "gh": dims[2] * dims[1], "rg": dims[0] * dims[2]}
    assert sketch.dim == sum(widths[channel] for channel in channels)


def test_the_fingerprint_shows() -> None:
    sketch = SketchConfig()
    assert sketch.fingerprint[:12] in repr(sketch)


@pytest.mark.parametrize("key", ["store", "corpus.sources", "targets.good.queries"])
def test_a_url_with_credentials_is_refused_and_not_shown(tmp_path: Path, key: str) -> None:
    path = tmp_path / "curate.yaml"
    path.write_text(
        "store: s\ncorpus: {name: c, sources: [a.jsonl]}\nmodel: {name: m}\ntargets: {good: {queries: q.jsonl}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="credentials do not belong in a URL") as caught:
        load_config(path, overrides=[f"{key}=s3://AKIA:planted-secret@bucket/x"])
    assert "planted-secret" not in str(caught.value)


def test_a_target_that_only_excludes_does_not_count() -> None:
    targets = {name: {"queries": f"{name}.jsonl"} for name in ("good", "backdoor")}
    selection = {"exclude": [{"target": "backdoor", "top_rows": 5}]}
    assert parse(changed(targets=targets, selection=selection)).weights == {"good": 1.0}
    both = parse(changed(targets=targets, selection=selection, value={"good": 1, "backdoor": -1}))
    assert both.weights == {"good": 1.0, "backdoor": -1.0}
    alone = parse(changed(targets={"backdoor": targets["backdoor"]}, selection=selection))
    assert alone.weights == {}


def test_a_selection_survives_being_written_down() -> None:
    """A run's record and a flow's parameters hold every key, those of the other way to exclude, too."""
    document = changed(
        targets={"good": {"queries": "q.jsonl"}},
        selection={
            "exclude": [{"target": "good", "top_rows": 5}, {"pattern": "(?i)x", "field": "lang"}],
            "near_duplicates": 0.98,
            "sample": {"seed": 3},
            "per_source": {"groups": {"*/a/*": {"max_fraction": 0.5}}},
            "keep": {"rows": 3},
        },
    )
    config = parse(document)
    assert config.selection.near_duplicates is not None and config.selection.near_duplicates.cosine == 0.98
    assert CurationConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"exclude": [{"pattern": "(?i"}]}, "selection.exclude.0.pattern: not a regular expression: regex"),
        ({"exclude": [{"pattern": r"(a)\1"}]}, "not a regular expression"),
        ({"exclude": [{"pattern": "(a{1000}){1000}"}]}, "not a regular expression"),
        ({"exclude": [{"target": "god", "top_rows": 5}]}, "not a target; did you mean 'good'?"),
        ({"exclude": [{"target": "good"}]}, "give one of 'top_rows', 'top_fraction', 'min_score'"),
        ({"exclude": [{"target": "good", "top_rows": 5, "min_score": 0}]}, "give one of"),
        ({"exclude": [{"target": "good", "top_rows": 5, "field": "lang"}]}, "cannot use 'field' with 'target'"),
        ({"exclude": [{"target": "good", "pattern": "x"}]}, "give either 'target' or 'pattern'"),
        ({"exclude": [{"pattern": "x", "top_rows": 5}]}, "cannot use 'top_rows' with 'pattern'"),
        ({"sample": {}, "diversity": {}, "keep": {"rows": 1}}, "cannot use 'diversity' with 'sample'"),
        ({"sample": {}}, "'sample' needs a budget"),
        ({"diversity": {}, "keep": {"min_value": 0}}, "'diversity' needs a budget"),
        ({"per_source": {"min_rows": 5, "max_rows": 4}}, "min_rows 5 is more than max_rows 4"),
        ({"per_label": {"groups": {"a": {"min_fraction": 0.5, "max_fraction": 0.4}}}}, "min_fraction 0.5 is more"),
        ({"per_source": {"by": "bucket"}}, "selection.per_source.by:"),
        ({"near_duplicates": 0.2}, "selection.near_duplicates.cosine:"),
        ({"keep": {"min_percentile": 100}}, "selection.keep.min_percentile:"),
    ],
)
def test_selections_that_mean_nothing_are_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(targets={"good": {"queries": "q.jsonl"}}, selection=selection))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500

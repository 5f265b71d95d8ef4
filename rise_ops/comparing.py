"""A comparison, method by method, each in a process of its own (`rise_ops.isolation`); what was measured is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rise_ops.baselines.registry import METHODS, open_method
from rise_ops.compare_config import MethodConfig, RiseMethod
from rise_ops.comparison import (
    FORMAT_VERSION,
    Facts,
    Material,
    method_key,
    method_seeds,
    open_material,
    refuse_infeasible,
    setting_of,
)
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import ConfigError, LimitError, ModelError, WorkerError
from rise_ops.isolation import run_isolated
from rise_ops.progress import Progress, silent
from rise_ops.scratch import Scratch
from rise_ops.shapes import FactsShape, OutcomeShape
from rise_ops.store import Store

Json = dict[str, Any]

_WORKER = "rise_ops.baselines.worker"
_OF_THE_METHOD = (LimitError, ModelError, ConfigError, WorkerError)
"""What ends a method and not the comparison."""


def find_facts(store: Store, config: CurationConfig, version: CorpusVersion, *, progress: Progress = silent) -> Json:
    """`rise_ops.comparison.Facts` of a comparison, as JSON, with its id; counted once.

    Raises
    ------
    CurationError
        As `open_material` and `count_facts`.
    """
    material = open_material(store, config, version)
    key = f"comparisons/{material.identity}/facts.json"
    if not store.exists(key):
        call = {"config": config.model_dump(mode="json"), "store_uri": store.uri, "version": version.version}
        counted = run_isolated(_WORKER, call, progress=progress)
        store.create_json(key, {"format_version": FORMAT_VERSION, **counted})
    facts = store.get_json(key, format_version=FORMAT_VERSION, shape=FactsShape)
    return {name: value for name, value in facts.items() if name != "format_version"} | {
        "comparison_id": material.identity,
        "queries": len(material.queries),
    }


def plan_methods(config: CurationConfig) -> list[Json]:
    """Every run of every method: {method, name, seed}, in the configured order.

    A name that is not configured is the method's own, with what tells it from its fellows.
    """
    names = method_names(config.compare.methods)
    return [
        {"method": method.model_dump(mode="json"), "name": name, "seed": seed}
        for method, name in zip(config.compare.methods, names, strict=True)
        for seed in method_seeds(method, config.compare)
    ]


def method_names(methods: Sequence[MethodConfig]) -> list[str]:
    """What tables call methods; each name once."""
    named = [method.name or _told(method) for method in methods]
    count = Counter(named)
    return [name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(named, 1)]


def _told(method: MethodConfig) -> str:
    given = method.model_dump(mode="json", exclude={"method", "name", "seeds", "checkpoints"}, exclude_defaults=True)
    return " ".join([method.method, *(f"{name} {_short(value)}" for name, value in given.items())])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def measure(store: Store, config: CurationConfig, version: CorpusVersion, *, facts: Mapping[str, Any],
            method: MethodConfig, seed: int, run_id: str, progress: Progress = silent) -> Json:  # fmt: skip
    """One run of one method: what the store has of it, or what it gives now.

    Returns
    -------
    dict
        status (completed, infeasible, failed), reason, need, and of a completed one what `rise_ops.comparison.Outcome`
        has, and whether it was there already (reused).

    Raises
    ------
    CurationError
        What is not the method's own fault: of the store, the sources or the network.
    """
    material = open_material(store, config, version)
    known = Facts(**{name: facts[name] for name in Facts.__slots__})
    about: Json = {"paper": METHODS[method.method].paper, "need": None, "reused": False}
    try:
        waiting = method.model_copy(update={"temperature": None}) if isinstance(method, RiseMethod) else method
        opened = open_method(waiting, setting_of(config, material, known, scratch=Scratch(Path(), 0), seed=seed))
        about["need"] = asdict(opened.need())
        refuse_infeasible(opened, method.method)
        found = _outcome(store, config, version, material, facts=known, method=method, seed=seed, run_id=run_id,
                         progress=progress)  # fmt: skip
    except _OF_THE_METHOD as error:
        status = "infeasible" if isinstance(error, LimitError) else "failed"
        return {**about, "status": status, "reason": str(error)}
    return {**about, "status": "completed", "reason": None, **_derived(found, known)}


def _outcome(store: Store, config: CurationConfig, version: CorpusVersion, material: Material, *, facts: Facts,
             method: MethodConfig, seed: int, run_id: str, progress: Progress) -> Json:  # fmt: skip
    key = method_key(material, config, method, seed)
    reused = store.exists(key)
    if not reused:
        call = {
            "config": config.model_dump(mode="json"),
            "store_uri": store.uri,
            "version": version.version,
            "method": method.model_dump(mode="json"),
            "seed": seed,
            "facts": {name: getattr(facts, name) for name in Facts.__slots__},
            "run_id": run_id,
        }
        store.create_json(key, run_isolated(_WORKER, call, progress=progress))
    return {**store.get_json(key, format_version=FORMAT_VERSION, shape=OutcomeShape), "reused": reused, "key": key}


def _derived(found: Json, facts: Facts) -> Json:
    rows, seconds = max(1, facts.rows), found["index_seconds"]
    return {
        **{name: value for name, value in found.items() if name != "format_version"},
        "bytes_per_row": found["index_bytes"] / rows if found["index_bytes"] else None,
        "tokens_per_second": facts.tokens / seconds if found["index_bytes"] and seconds else None,
    }

"""The process that runs one method: `python -m rise_ops.baselines.worker`, see `rise_ops.isolation`."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any

import torch

from rise_ops.choosing import choose
from rise_ops.compare_config import RiseMethod, parse_method
from rise_ops.comparison import Facts, count_facts, open_material, outcome_record, run_method
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, read_version
from rise_ops.errors import LimitError
from rise_ops.heap import steady_heap
from rise_ops.isolation import answer
from rise_ops.logs import FORMAT_VARIABLE, formatter
from rise_ops.machine import device_name
from rise_ops.progress import Progress
from rise_ops.store import Store
from rise_ops.trunk import pick_device

Json = dict[str, Any]


def work(call: Json, progress: Progress) -> Json:
    """Count the facts of a comparison, or run a method.

    Raises
    ------
    CurationError
        As `rise_ops.comparison.run_method`.
    """
    config, store = CurationConfig.model_validate(call["config"]), Store(call["store_uri"])
    version = read_version(store, config.corpus.name, call["version"])
    material = open_material(store, config, version)
    if call.get("method") is None:
        return asdict(count_facts(store, config, material, progress=progress))
    steady_heap()
    method = parse_method(call["method"])
    if isinstance(method, RiseMethod) and method.temperature == "auto":
        method = _with_temperature(store, config, version, method, run_id=call["run_id"])
    try:
        facts = Facts(**call["facts"])
        outcome = run_method(store, config, material, facts, method, seed=call["seed"], progress=progress)
    except torch.OutOfMemoryError as error:
        raise LimitError(f"{method.method} ran out of memory on {config.model.device}") from error
    return outcome_record(outcome, device=device_name(pick_device(config.model.device)))


def _with_temperature(
    store: Store, config: CurationConfig, version: CorpusVersion, method: RiseMethod, *, run_id: str
) -> RiseMethod:
    """The method with the temperature that is chosen for its widths, now or by an earlier run."""
    widths = {name: getattr(method, name) for name in ("dim_r", "dim_h", "dim_g") if getattr(method, name) is not None}
    wanted = config.model_copy(
        update={
            "sketch": config.sketch.model_copy(update=widths),
            "tuning": config.tuning.model_copy(update={"temperature": True, "dim": False}),
        }
    )
    chosen = choose(store, wanted, version, run_id=run_id)["chosen"]
    return method.model_copy(update={"temperature": float(chosen["temperature"])})


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(formatter("json" if os.environ.get(FORMAT_VARIABLE) == "json" else "plain"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    answer(work)

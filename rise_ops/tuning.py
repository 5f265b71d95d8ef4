"""Temperature and widths chosen once, before a corpus is indexed, and kept.

    tunings/<tuning_id>.json    the choice, all candidates with their figures (`rise_ops.choosing`)

`tuning_id` covers the corpus' name, the model, the fixed part of the sketch and the settings of `tuning`, not the rows
or the targets: a corpus that changes keeps its index. Another `tuning.seed` makes another choice.
"""

from __future__ import annotations

from typing import Any

from rise_ops.config import CurationConfig, SketchConfig, TuningConfig
from rise_ops.errors import ConfigError
from rise_ops.hashing import fingerprint
from rise_ops.model_files import model_fingerprint
from rise_ops.shapes import TuningShape
from rise_ops.signatures import ESTIMATOR_VERSION
from rise_ops.store import Store

FORMAT_VERSION = 1

Json = dict[str, Any]


def is_tuned(config: CurationConfig) -> bool:
    """Whether anything of the sketch is to be chosen."""
    return config.tuning.temperature or config.tuning.dim


def tuning_id(config: CurationConfig) -> str:
    """Identity of a choice."""
    fixed = config.sketch.model_dump(mode="json")
    for name in (["temperature"] if config.tuning.temperature else []) + (
        ["dim_r", "dim_h", "dim_g"] if config.tuning.dim else []
    ):
        del fixed[name]
    settings = config.tuning.model_dump(mode="json")
    model = model_fingerprint(config.model)
    return fingerprint([FORMAT_VERSION, config.corpus.name, model, fixed, settings, ESTIMATOR_VERSION])


def tuning_key(identity: str) -> str:
    """Where a choice is in the store."""
    return f"tunings/{identity}.json"


def read_tuning(store: Store, config: CurationConfig) -> Json | None:
    """The choice for a configuration; None where none was made."""
    identity = tuning_id(config)
    key = tuning_key(identity)
    if not store.exists(key):
        return None
    return store.get_json(key, format_version=FORMAT_VERSION, shape=TuningShape, holds={"tuning_id": identity})


def settled(store: Store, config: CurationConfig) -> CurationConfig:
    """The configuration with the sketch that was chosen for it.

    Raises
    ------
    ConfigError
        The choice was not made yet.
    """
    if not is_tuned(config):
        return config
    found = read_tuning(store, config)
    if found is None:
        raise ConfigError(
            f"temperature and widths for corpus {config.corpus.name} are not chosen yet; run `curate index`, which "
            "chooses them, or set sketch.temperature (and sketch.dim_r, dim_h, dim_g)"
        )
    return with_choice(config, found["chosen"])


def with_choice(config: CurationConfig, chosen: Json) -> CurationConfig:
    """The configuration with what was chosen in place of `tuning`."""
    sketch = SketchConfig.model_validate({**config.sketch.model_dump(), **chosen})
    return config.model_copy(update={"sketch": sketch, "tuning": TuningConfig()})


def planned(store: Store, config: CurationConfig) -> tuple[CurationConfig, Json]:
    """The configuration as far as its sketch is known, and what to tell of it.

    Before a choice is made the configured values, by default those of the paper, stand in for it.
    """
    found = read_tuning(store, config) if is_tuned(config) else None
    known = config if found is None else with_choice(config, found["chosen"])
    sketch = known.sketch
    told: Json = {name: getattr(sketch, name) for name in ("temperature", "dim_r", "dim_h", "dim_g", "dim")}
    if found is not None:
        told["chosen"] = {name: found.get(name) for name in ("tuning_id", "why", "rows", "version", "created")}
    elif is_tuned(config):
        waiting = [name for name in ("temperature", "dim") if getattr(config.tuning, name)]
        told["to_choose"] = waiting
    return known, told

"""The task that looks before a run pays: is everything that it will need there?"""

from __future__ import annotations

from rise_ops.config import CurationConfig
from rise_ops.damage import heal
from rise_ops.model_files import resolve_model
from rise_ops.session import plan_stages
from rise_ops.sources import list_objects
from rise_ops.store import Store
from tasks.policy import Json, stage


@stage("preflight")
def preflight(store_uri: str, config: CurationConfig, model: bool, targets: bool) -> Json:
    """Check the store, and as far as the run goes, that the model and the targets' queries can be found.

    What was noted as broken in the store is removed, so that this run makes it again.
    """
    store = Store(store_uri)
    store.probe()
    if model:
        resolve_model(config.model)
    if targets:
        for target in config.targets.values():
            list_objects([target.queries])
    if model:  # that no stage is refused for its memory after others were paid for
        plan_stages(config if targets else config.model_copy(update={"targets": {}}))
    return {"healed": heal(store)}

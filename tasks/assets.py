"""Prefect assets: what a run published, told to the server as a materialisation.

The events are those that Prefect's own `@materialize` emits; that decorator wants an asset's key before the
configuration is known, and would claim a materialisation also where the store had everything already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext, TaskRunContext
from prefect.events import emit_event
from prefect.types.names import MAX_ASSET_KEY_LENGTH, RESTRICTED_ASSET_CHARACTERS

from rise_ops.store import Store

_RESTRICTED = re.compile(f"[{re.escape(''.join(RESTRICTED_ASSET_CHARACTERS))}]")


def asset_of(store: Store, folder: str, **properties: Any) -> Asset | None:
    """The asset of a folder of the store; None where its URI is too long to name one.

    Characters that Prefect does not allow in a key become `_`.
    """
    uri = f"file://{store.url(folder)}" if store.is_local else store.url(folder)
    if len(uri) > MAX_ASSET_KEY_LENGTH:
        return None
    return Asset(key=_RESTRICTED.sub("_", uri), properties=AssetProperties(**properties))


def materialised(asset: Asset | None, metadata: Mapping[str, Any], *, made_of: Asset | None = None) -> None:
    """Tell that the task that runs has published a new state of an asset; nothing without a task run."""
    if asset is None or TaskRunContext.get() is None:
        return
    related = []
    if made_of is not None:
        emit_event(event="prefect.asset.referenced", resource=AssetContext.asset_as_resource(made_of), related=[])
        related.append(AssetContext.asset_as_related(made_of))
    emit_event(
        event="prefect.asset.materialization.succeeded",
        resource=AssetContext.asset_as_resource(asset),
        related=related,
        payload=dict(metadata),
    )

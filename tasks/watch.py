"""Watching a corpus: one look at the sources, and an event where they changed."""

from __future__ import annotations

from prefect.events import emit_event

from rise_ops.config import CurationConfig
from rise_ops.corpus import look_at_sources
from rise_ops.store import Store
from tasks.policy import Json

EVENT = "curation.corpus.changed"


def look(config: CurationConfig) -> Json:
    """Compare a listing of the sources with the current version. Reads no source object, writes nothing."""
    store = Store(config.store)
    version, diff = look_at_sources(store, config.corpus, config.limits)
    found = {name: [item.uri for item in getattr(diff, name)] for name in ("added", "changed", "removed")}
    return {
        "corpus": config.corpus.name,
        "version": version.version if version else None,
        "is_changed": any(found.values()),
        "unchanged": len(diff.unchanged),
        **found,
    }


def announce(config: CurationConfig, found: Json) -> None:
    """Emit the event `curation.corpus.changed` with the diff; whoever reacts lists again."""
    resource = {"prefect.resource.id": f"curation.corpus.{config.corpus.name}", "store": config.store}
    emit_event(EVENT, resource=resource, payload=found)

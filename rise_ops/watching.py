"""One look at the sources of a corpus: what differs from its current version, by a listing alone."""

from __future__ import annotations

from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import look_at_sources
from rise_ops.store import Store

KINDS = ("added", "changed", "removed")

Json = dict[str, Any]


def look(config: CurationConfig) -> Json:
    """Compare a listing of the sources with the current version. Reads no source object, writes nothing."""
    store = Store(config.store)
    version, diff = look_at_sources(store, config.corpus, config.limits)
    found = {name: [item.uri for item in getattr(diff, name)] for name in KINDS}
    return {
        "corpus": config.corpus.name,
        "store": store.uri,
        "version": version.version if version else None,
        "is_changed": any(found.values()),
        "unchanged": len(diff.unchanged),
        **found,
    }

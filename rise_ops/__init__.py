"""Forward-only data valuation and attribution over versioned corpora.

`rise_ops` is the library: the RISE estimator (arXiv 2604.16197), the store, ingestion, the signature
index, valuation, selection, export and lineage. It never imports Prefect; `tasks/` and `flows/` put it
under orchestration.

For notebooks and scripts: `load` opens a configuration, `open_store` a store (`rise_ops.curation.Curation`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rise_ops.curation import Curation, load, open_store

__all__ = ["Curation", "load", "open_store"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The names of the notebook interface, imported when they are asked for: `import rise_ops` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'rise_ops' has no attribute '{name}'")
    from rise_ops import curation

    return getattr(curation, name)


def __dir__() -> list[str]:
    """With the names that are imported when they are asked for."""
    return sorted({*globals(), *__all__})

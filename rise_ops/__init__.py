"""Forward-only data valuation and attribution over versioned corpora.

`rise_ops` is the library: the RISE estimator (arXiv 2604.16197), the store, ingestion, the signature
index, valuation, selection, export and lineage. It never imports Prefect; `tasks/` and `flows/` put it
under orchestration.
"""

__version__ = "0.1.0"

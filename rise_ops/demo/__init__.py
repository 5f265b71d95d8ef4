"""The demonstration: a small corpus with planted backdoor rows, and a tiny model trained on it.

`corpus` writes the corpus, the queries and the configuration; `train` regenerates the model that ships in
`model/`. Everything in both was made for this project, no row is copied from anywhere.
"""

from __future__ import annotations

from rise_ops.demo.corpus import DemoCorpus, DemoRow, demo_config, write_corpus, write_demo
from rise_ops.demo.outcome import count_planted

__all__ = ["DemoCorpus", "DemoRow", "count_planted", "demo_config", "write_corpus", "write_demo"]

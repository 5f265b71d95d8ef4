"""What a run would do and cost, before it is paid for. Reads sources that changed; writes nothing.

Objects that are not in the current corpus version are read and cut into blocks as a run would, without
writing them, so rows and blocks are exact. Tokens are exact for what is indexed already and estimated from
SAMPLE_ROWS rows for the rest. Time is estimated from the rate at which this index's blocks were computed
before; without any, from sketching the sample, if the model's weights fit in `limits.memory`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, current_version, diff_sources, list_sources
from rise_ops.errors import BadRowsError
from rise_ops.index import BlockRecord, index_id, list_indexed, read_records
from rise_ops.ingest import IngestedObject, ingest_object, preview
from rise_ops.rows import ingest_fingerprint
from rise_ops.session import block_rows, open_signer
from rise_ops.sources import sample_texts
from rise_ops.store import Store
from rise_ops.trunk import model_fingerprint, weight_bytes

SAMPLE_ROWS = 128

Json = dict[str, Any]

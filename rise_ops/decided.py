"""Decisions that were made before: a run that would decide as an earlier one did takes its decisions over.

    runs/<run_id>/decisions.json   decision_id, what was decided in numbers, the checksum of `decisions.parquet`, the
                                   run that these were taken from, if any; written after them

    decision_id = sha256 of canonical_json([code, sources, parts, targets, weights, aggregate, index, selection])

All that decisions depend on has a name by content, and the code counts as the hash of the package's sources: another
release decides anew. Looked at are the LATEST runs in the store. Decisions that do not match their checksum, or went
while they were copied, are as good as none. The examples for people follow from the decisions, and go along with them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rise_ops.checksums import crc32c, stored_crc32c
from rise_ops.config import SelectionConfig
from rise_ops.errors import IntegrityError, MissingObjectError
from rise_ops.examples import FORMAT_VERSION as EXAMPLES_FORMAT
from rise_ops.examples import examples_key
from rise_ops.hashing import fingerprint
from rise_ops.progress import Progress, silent
from rise_ops.runs import code_identity, decided_key, decisions_key
from rise_ops.selection import Scored, Selection, decide, preview
from rise_ops.shapes import DecidedShape
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.valuation import check_parts

FORMAT_VERSION = 1
LATEST = 20
"""Runs whose decisions are looked at, the latest first."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decided:
    """A selection, and whether its decisions are those of an earlier run."""

    selection: Selection
    reused: bool


def decide_once(store: Store, scored: Scored, *, run_id: str, selection: SelectionConfig, memory: int,
                progress: Progress = silent) -> Decided:  # fmt: skip
    """`selection.decide`, where no earlier run has decided the same. Raises what it raises.

    The scores are held against their checksums in either case, so that broken ones are not passed over.
    """
    identity = decision_id(scored, selection)
    known = _find(store, identity)
    if known is not None:
        check_parts(store, scored.parts)
        if _taken_over(store, *known, run_id):
            return Decided(Selection(**known[1]["selection"]), reused=True)
    found = decide(
        store, scored.version, run_id=run_id, parts=scored.parts, weights=scored.weights, targets=scored.targets,
        aggregate=scored.aggregate, selection=selection, memory=memory, identity=scored.identity,
        sources=scored.sources, progress=progress,
    )  # fmt: skip
    record = {
        "format_version": FORMAT_VERSION,
        "decision_id": identity,
        "crc32c": stored_crc32c(store, decisions_key(run_id)),
        "selection": asdict(found),
        "taken_from": None,
    }
    store.create_json(decided_key(run_id), record)
    return Decided(found, reused=False)


def preview_once(store: Store, scored: Scored, selection: SelectionConfig, *, memory: int) -> Selection:
    """`selection.preview`, or the numbers of an earlier run that has decided the same."""
    known = _find(store, decision_id(scored, selection))
    if known is None:
        return preview(store, scored, selection, memory=memory)
    check_parts(store, scored.parts)
    return Selection(**known[1]["selection"])


def take_examples(store: Store, run_id: str, *, evaluation: Json | None) -> str | None:
    """Copy the examples of the run that a run's decisions were taken from. Returns their key, None: there are none.

    Examples without the influence of tokens are not taken: the model may be there by now.

    Parameters
    ----------
    evaluation
        What the examples have to say of it.

    Raises
    ------
    StoreError, TransientError
    """
    with suppress(MissingObjectError, IntegrityError):
        earlier = store.get_json(decided_key(run_id), format_version=FORMAT_VERSION, shape=DecidedShape)["taken_from"]
        if earlier is not None:
            found = store.get_json(examples_key(earlier), format_version=EXAMPLES_FORMAT)
            hits = (hit for query in found["queries"] for hit in query["top"])
            if found["evaluation"] == evaluation and any("tokens" in hit for hit in hits):
                store.create_json(examples_key(run_id), found)
                return examples_key(run_id)
    return None


def decision_id(scored: Scored, selection: SelectionConfig) -> str:
    """Identity of the decisions on scored rows."""
    version = scored.version
    sources = [[entry.uri, entry.object_sha, entry.record, entry.pack, entry.blocks] for entry in version.sources]
    parts = [[part.folder, part.part_id] for part in scored.parts]
    ways = [list(scored.targets), dict(scored.weights), scored.aggregate, scored.identity, list(scored.sources)]
    code = code_identity()["fingerprint"]
    return fingerprint([code, dict(version.fields), sources, parts, ways, selection.model_dump(mode="json")])


def _find(store: Store, identity: str) -> tuple[str, Json] | None:
    """The latest run that decided so, and its record."""
    for run_id in reversed(store.children("runs")[-LATEST:]):
        with suppress(MissingObjectError, IntegrityError):
            found = store.get_json(decided_key(run_id), format_version=FORMAT_VERSION, shape=DecidedShape)
            if found["decision_id"] == identity:
                return run_id, found
    return None


def _taken_over(store: Store, earlier: str, record: Json, run_id: str) -> bool:
    """Copy the decisions of an earlier run, some megabytes at a time; False where they are not what was written."""
    key, checksum = decisions_key(earlier), 0
    with spool() as folder:
        path = folder / "decisions.parquet"
        try:
            with path.open("wb") as file:
                for piece in store.pieces(key):
                    checksum = crc32c(piece, checksum)
                    file.write(piece)
        except MissingObjectError:  # a collector was faster
            return False
        if checksum != record["crc32c"]:
            return False
        store.create_from_file(decisions_key(run_id), path)
    store.create_json(decided_key(run_id), {**record, "taken_from": earlier})
    return True

"""How temperature and widths are chosen, on a sample of the corpus and without labels.

`temperature: auto` takes the candidate at which the signatures of the sample have the largest effective rank
(`rise_ops.sweep`). Measured with two models of 3 M parameters on three tasks (precision at 10 on 1,000 rows, against
the best of nine candidates; `tests/benchmarks/tuning.py`): on one sample within 1 point on 5 of 6 pairs and 6 points
below on the sixth; on another sample 1.4, 2.7 and 6.4 points below on the three pairs that were measured. A fixed 0.1
was within 2 points on 1 of 6 and up to 67 points below, a fixed 1.0 within 2 points on 5 of 6. Six pairs are few, and
strong models were not among them: where rows have labels, `curate sweep --label` says what is best.

`dim: auto` takes the narrowest widths at which two sketches with independent tables agree to AGREEMENT. At temperature
1 the same models agree to 0.73 to 0.77 at 24,576 numbers a row and to 0.64 to 0.69 at 8,192, which costs 0.2 to 4
points of precision at 10 (mean of two seeds, 600 rows), so there it takes the widest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import ConfigError, SourceError
from rise_ops.evaluation import Label
from rise_ops.filters import as_label
from rise_ops.model_files import model_fingerprint
from rise_ops.progress import Progress, silent
from rise_ops.rows import CanonicalRow
from rise_ops.session import open_corpus
from rise_ops.store import Store
from rise_ops.sweep import WIDTHS, Candidate, Sample, draw_sample, sweep
from rise_ops.targets import read_queries
from rise_ops.tuning import FORMAT_VERSION, planned, read_tuning, tuning_id, tuning_key

AGREEMENT = 0.7
"""Least correlation of two sketches that `dim: auto` is content with."""

KS = (5, 10, 50)
"""Values of K in the labelled figures of a sweep."""

Json = dict[str, Any]


def choose(store: Store, config: CurationConfig, version: CorpusVersion, *, run_id: str,
           progress: Progress = silent) -> Json:  # fmt: skip
    """Choose and record; what another run has recorded meanwhile stands. Returns the record.

    Raises
    ------
    SourceError
        The corpus has too few rows.
    ModelError, LimitError
        As `Signer.rows`.
    """
    found = read_tuning(store, config)
    if found is not None:
        return found
    record = {
        "format_version": FORMAT_VERSION,
        "tuning_id": tuning_id(config),
        "corpus": config.corpus.name,
        "version": version.version,
        "model": {"name": config.model.name, "fingerprint": model_fingerprint(config.model)},
        "tuning": config.tuning.model_dump(mode="json"),
        **try_candidates(store, config, version, progress=progress),
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.create_json(tuning_key(record["tuning_id"]), record)
    winner = read_tuning(store, config)
    return record if winner is None else winner


def try_candidates(store: Store, config: CurationConfig, version: CorpusVersion, *,
                   progress: Progress = silent) -> Json:  # fmt: skip
    """Measure the candidates on a sample: {chosen, rows, candidates, why}. Writes nothing.

    Raises
    ------
    SourceError
        The corpus has fewer than 2 distinct rows.
    """
    tuning, sketch = config.tuning, config.sketch
    sample = draw_sample(store, version, tuning.rows, seed=tuning.seed)
    if len(sample.texts) < 2:
        raise SourceError(
            f"corpus {config.corpus.name} has one row only; set sketch.temperature, nothing can be chosen"
        )
    tried: list[Candidate] = []
    chosen: Json = {}
    why: list[str] = []
    if tuning.temperature:
        options = [sketch.model_copy(update={"temperature": each}) for each in tuning.temperatures]
        tried = sweep(store, config, sample, options, targets={}, progress=progress)
        best = best_temperature(tried)
        sketch = sketch.model_copy(update={"temperature": best.temperature})
        chosen["temperature"] = best.temperature
        why.append(
            f"temperature {best.temperature:g}: {len(sample.texts):,} rows spread into {best.effective_rank:.0f} "
            f"directions, the most of {len(tried)} candidates"
        )
    if tuning.dim:
        widths = [dict(zip(("dim_r", "dim_h", "dim_g"), each, strict=True)) for each in WIDTHS]
        options = [sketch.model_copy(update=each) for each in widths]
        measured = sweep(store, config, sample, options, targets={}, agreement=True, progress=progress)
        narrow, enough = narrowest(measured)
        chosen |= {"dim_r": narrow.dim_r, "dim_h": narrow.dim_h, "dim_g": narrow.dim_g}
        tried += measured
        told = f"two sketches of {narrow.dim:,} numbers a row agree to {narrow.agreement:.3f}"
        why.append(f"widths {narrow.dim_r}/{narrow.dim_h}/{narrow.dim_g}: {told}" +
                   ("" if enough else f", less than {AGREEMENT}, and no candidate is wider"))  # fmt: skip
    return {"chosen": chosen, "rows": len(sample.texts), "candidates": [asdict(each) for each in tried], "why": why}


def best_temperature(candidates: Sequence[Candidate]) -> Candidate:
    """The one of the largest effective rank; of equal ones the first."""
    return max(candidates, key=lambda each: each.effective_rank)


def narrowest(candidates: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """The narrowest one that agrees enough, or the widest, and whether it does."""
    for each in sorted(candidates, key=lambda each: each.dim):
        if each.agreement is not None and each.agreement >= AGREEMENT:
            return each, True
    return max(candidates, key=lambda each: each.dim), False


def sweep_corpus(store: Store, config: CurationConfig, *, label: Label | None = None, target: str | None = None,
                 rows: int | None = None, temperatures: Sequence[float] | None = None, widths: bool = False,
                 progress: Progress = silent) -> Json:  # fmt: skip
    """Candidates on a sample of the ingested corpus: {rows, targets, candidates, auto, labels}. Writes nothing.

    Parameters
    ----------
    label
        What makes a row positive; where None, the column `label` if rows and all queries have it.
    target
        Only this one's queries.
    temperatures
        In place of the configured candidates.
    widths
        Compare widths at the configured temperature, or the chosen one, instead of temperatures.

    Raises
    ------
    ConfigError
        There is no such target, or no row or query has the label.
    SourceError
        Nothing was ingested.
    """
    if target is not None and target not in config.targets:
        raise ConfigError(f"--target {target}: not a target; known: {', '.join(config.targets) or 'none'}")
    version = open_corpus(store, config)
    known, _ = planned(store, config)
    sample = draw_sample(store, version, rows or config.tuning.rows, seed=config.tuning.seed)
    names = list(config.targets) if target is None else [target]
    targets = {name: read_queries(config.targets[name], limits=config.limits) for name in names}
    labels = _labels(sample, targets, label)
    if widths:
        options = [known.sketch.model_copy(update={"dim_r": r, "dim_h": h, "dim_g": g}) for r, h, g in WIDTHS]
    else:
        tried = temperatures or config.tuning.temperatures
        options = [known.sketch.model_copy(update={"temperature": each}) for each in tried]
    found = sweep(store, config, sample, options, targets=targets, agreement=widths, labels=labels,
                  ks=KS, progress=progress)  # fmt: skip
    best = narrowest(found)[0] if widths else best_temperature(found)
    return {
        "corpus": config.corpus.name,
        "version": version.version,
        "rows": len(sample.texts),
        "targets": {name: len(each) for name, each in targets.items()},
        "labels": labels is not None,
        "candidates": [asdict(each) for each in found],
        "auto": found.index(best),
    }


def _labels(
    sample: Sample, targets: Mapping[str, Sequence[CanonicalRow]], label: Label | None
) -> tuple[list[str | None], dict[str, list[str]]] | None:
    """Labels of the rows, and what each query wants; None where nobody asked and they are not there."""
    wanted = Label("label") if label is None else label
    own = [as_label(json.loads(meta).get(wanted.field)) for meta in sample.meta]
    want = {
        name: [wanted.value if wanted.value is not None else as_label(row.meta.get(wanted.field)) for row in rows]
        for name, rows in targets.items()
    }
    complete = {name: [each for each in values if each is not None] for name, values in want.items()}
    lacking = [name for name, values in want.items() if len(complete[name]) != len(values)]
    if not any(each is not None for each in own) or lacking:
        if label is None:
            return None
        lack = (
            f"a query of target {lacking[0]} has it not"
            if lacking
            else "no row of the sample has it, or no target is given"
        )
        raise ConfigError(f"--label {wanted.field}: every query and some rows must have this field; {lack}")
    return own, complete

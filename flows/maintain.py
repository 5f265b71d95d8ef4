"""The flow `maintain`: is everything in the store that its records promise, and what may be removed from it?"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from rise_ops.config import CurationConfig
from rise_ops.errors import IntegrityError
from tasks.maintain import collect, verify_contents


@flow(name="maintain", flow_run_name=lambda: run_name("maintain"), **FLOW_OPTIONS)
def maintain(
    config: CurationConfig, deep: bool = False, garbage: bool = False, keep: int | None = None
) -> dict[str, Any]:
    """Check the whole store of a configuration and, where it is whole, remove what nothing reaches.

    Parameters
    ----------
    deep
        Hash all contents again.
    garbage
        Collect garbage after the check. Beside a run at work nothing is removed; the result says so.
    keep
        Versions of each corpus to keep; all where None.

    Returns
    -------
    dict
        {store, checked, deep, faults, collected: {objects, bytes, kept, refused} or None}

    Raises
    ------
    IntegrityError
        Something is broken. The artifact `store-faults` lists it, nothing is removed, and the next run makes again
        what can be made again.
    """
    found = verify_contents(store_uri=config.store, deep=deep)
    if found["faults"]:
        first = found["broken"][0]
        raise IntegrityError(
            f"{found['faults']:,} of {found['checked']:,} blocks and files in {found['store']} are broken, the first: "
            f"{first['key']} ({first['problem']}; {first['remedy']}). The artifact store-faults lists them; the next "
            "run mends what can be made again"
        )
    collected = collect(store_uri=config.store, keep=keep) if garbage else None
    return {**{name: found[name] for name in ("store", "checked", "deep", "faults")}, "collected": collected}

"""Which rows a search looks at: those of some sources, or with a label."""

from __future__ import annotations

import fnmatch
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.blocks import read_block
from rise_ops.corpus import CorpusVersion, Placements
from rise_ops.errors import ConfigError
from rise_ops.store import Store

if TYPE_CHECKING:
    from rise_ops.search import Wanted


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Conditions that must all hold; None: no condition."""

    source: str | None = None
    """URI of a source object; one that ends in / or has glob characters stands for all that it matches."""
    label: tuple[str, str] | None = None
    """A column of the source and its value, as text."""

    @classmethod
    def parse(cls, *, source: str | None, label: str | None) -> RowFilter:
        """As the command line gives them; the path of a local object may be relative."""
        if source is not None and "://" not in source:
            source = os.path.abspath(source) + ("/" if source.endswith("/") else "")
        if label is None:
            return cls(source)
        field, equals, value = label.partition("=")
        if not (field and equals):
            raise ConfigError(f"--label {label}: write it as FIELD=VALUE")
        return cls(source, (field, value))

    def __bool__(self) -> bool:
        return self.source is not None or self.label is not None

    def matches(self, uri: str) -> bool:
        """Whether rows of this source object are looked at."""
        if self.source is None:
            return True
        folder = self.source.endswith("/") and uri.startswith(self.source)
        return folder or uri == self.source or fnmatch.fnmatchcase(uri, self.source)

    def wanted(self, store: Store, version: CorpusVersion) -> Wanted | None:
        """The rows of a corpus version that are looked at, by block.

        Raises
        ------
        ConfigError
            The corpus has no such source or column.
        """
        if not self:
            return None
        uris = {entry.uri for entry in version.sources if self.matches(entry.uri)}
        if self.source is not None and not uris:
            known = ", ".join(entry.uri for entry in version.sources[:3])
            raise ConfigError(f"--source {self.source}: corpus {version.corpus} has no such object; it has {known}, …")
        if self.label is not None and self.label[0] not in version.fields:
            known = ", ".join(list(version.fields)[:10]) or "none"
            raise ConfigError(f"--label {self.label[0]}: corpus {version.corpus} has no such column; it has {known}")
        whole = {block for entry in version.sources if entry.uri in uris and not entry.pack for block in entry.blocks}
        held = {block for entry in version.sources if entry.uri in uris for block in entry.blocks}

        placements = Placements(store, version)

        def rows(block_id: str) -> npt.NDArray[np.bool_]:
            if block_id not in held:
                return np.zeros(1, bool)  # broadcast: none
            found = np.ones(1, bool)
            if block_id not in whole:
                found = _placed(placements, block_id, uris)
            return found if self.label is None else found & _labelled(store, block_id, *self.label)

        return rows


def _placed(placements: Placements, block_id: str, uris: set[str]) -> npt.NDArray[np.bool_]:
    """Rows of a block that some sources hold: small objects share blocks."""
    places = placements.of([block_id])
    mine = places.filter(pl.col("source_uri").is_in(list(uris)))["block_row"].to_numpy()
    return np.isin(np.arange(1 + int(places["block_row"].to_numpy().max())), mine)


def _labelled(store: Store, block_id: str, field: str, value: str) -> npt.NDArray[np.bool_]:
    frame = read_block(store, block_id, columns=("text", "text_field", "meta"))
    return np.array(
        [
            (text if name == field else as_label(json.loads(meta).get(field))) == value
            for text, name, meta in frame.select("text", "text_field", "meta").iter_rows()
        ],
        bool,
    )


def as_label(value: object) -> str | None:
    """A label as text: strings as they are, other JSON values as JSON; None where there is none."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


EVERY_ROW = RowFilter()

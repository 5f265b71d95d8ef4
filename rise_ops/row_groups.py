"""What a row's source and its label are, and what it says: what a selection looks at beside scores.

A source is an object, the folder that it is in (with the slash at its end), or the entry of `corpus.sources` that
names it; of several the first. A label is the value of a column of the source, as text (`rise_ops.filters.as_label`),
cut to 200 characters. A row without that column is in no label's group.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from rise_ops.blocks import read_block
from rise_ops.config import LabelQuota, Quota, SourceQuota
from rise_ops.errors import LimitError
from rise_ops.filters import as_label
from rise_ops.quotas import Partition, Rule
from rise_ops.store import Store

LABEL_CHARACTERS = 200
MOST_LABELS = 100_000
"""Different labels for which quotas can be kept."""

_parse = json.JSONDecoder().raw_decode  # canonical JSON begins at once: no search for blanks on either side of a row's

NewCode = Callable[[str, str, str], int]
"""Makes the code of a step, a reason and a rule."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression for a column of a row."""

    field: str
    """text, prompt, or a column of the source."""
    expression: str
    code: int
    """What a row gets in which it matches."""


@dataclass(slots=True)
class RowFacts:
    """Labels and matching patterns of rows, from their contents; the last block's are kept.

    Parameters
    ----------
    label
        Column of the source that is the label; None: rows have none.
    patterns
        In the order of precedence.
    """

    store: Store
    label: str | None
    patterns: Sequence[Pattern]
    _last: tuple[str, pl.DataFrame] | None = field(default=None, init=False)

    def __bool__(self) -> bool:
        return self.label is not None or bool(self.patterns)

    def of(self, blocks: Iterable[str]) -> pl.DataFrame:
        """block_id, block_row, label, pattern (code, 0: none) of all rows of some blocks."""
        return pl.concat([self._of(block) for block in blocks])

    def _of(self, block: str) -> pl.DataFrame:
        if self._last is None or self._last[0] != block:
            self._last = block, self._read(block)
        return self._last[1]

    def _read(self, block: str) -> pl.DataFrame:
        own = {pattern.field for pattern in self.patterns} | ({self.label} if self.label is not None else set())
        columns = sorted(own & {"text", "prompt"})
        named = own - {"text", "prompt"}
        if self.label in ("text", "prompt"):
            named.add(self.label)
        if named:
            columns = sorted({*columns, "text", "text_field", "meta"})
        content = read_block(self.store, block, columns=columns)
        values = _columns(content, named)
        code = np.zeros(content.height, np.uint16)
        for pattern in reversed(self.patterns):
            searched = content[pattern.field] if pattern.field in ("text", "prompt") else values[pattern.field]
            code[searched.str.contains(pattern.expression).fill_null(value=False).to_numpy()] = pattern.code
        labels = pl.Series([None], dtype=pl.String) if self.label is None else values[self.label]
        return pl.DataFrame(
            {
                "block_id": pl.repeat(block, content.height, eager=True),
                "block_row": np.arange(content.height, dtype=np.uint32),
                "label": labels.str.slice(0, LABEL_CHARACTERS)
                if self.label is not None
                else pl.repeat(None, content.height, dtype=pl.String, eager=True),
                "pattern": code,
            }
        )


def _columns(content: pl.DataFrame, names: Iterable[str]) -> dict[str, pl.Series]:
    """Columns of the source as text; null where a row has none."""
    found: dict[str, list[str | None]] = {name: [] for name in names}
    if found:
        for text, own, meta in content.select("text", "text_field", "meta").iter_rows():
            parsed, _ = _parse(meta)
            for name, values in found.items():
                values.append(text if name == own else as_label(parsed.get(name)))
    return {name: pl.Series(name, values, dtype=pl.String) for name, values in found.items()}


@dataclass(slots=True)
class SourceGroups:
    """Groups of rows by where they come from."""

    partition: Partition
    number_of: Mapping[str, int]
    """Group by the URI of a source object."""

    @classmethod
    def of(cls, uris: Sequence[str], quota: SourceQuota, patterns: Sequence[str], new_code: NewCode) -> SourceGroups:
        """Groups of all objects of a corpus; `patterns` are its sources as configured."""
        named = {uri: source_name(uri, quota.by, patterns) for uri in uris}
        names = ["", *dict.fromkeys(named.values())]
        numbers = {name: number for number, name in enumerate(names) if number}
        rules = _rules("source", quota, quota.groups, new_code)
        globs = list(quota.groups)
        own = (
            next((1 + n for n, glob in enumerate(globs) if fnmatch.fnmatchcase(name, glob)), 0) for name in names[1:]
        )
        partition = Partition("source", names, rules, np.array([-1, *own], np.int64))
        return cls(partition, {uri: numbers[name] for uri, name in named.items()})

    def numbers(self, uris: pl.Series) -> pl.Series:
        """Groups of rows by their URIs."""
        unique = uris.unique().to_list()
        return uris.replace_strict(unique, [self.number_of[uri] for uri in unique], return_dtype=pl.UInt32)


@dataclass(slots=True)
class LabelGroups:
    """Groups of rows by their labels, as they come."""

    quota: LabelQuota
    rules: Sequence[Rule]
    names: list[str]
    _numbers: dict[str, int]

    @classmethod
    def of(cls, quota: LabelQuota, new_code: NewCode) -> LabelGroups:
        """Groups that begin with the labels that the configuration names."""
        names = ["", *(name[:LABEL_CHARACTERS] for name in quota.groups)]
        numbers = {name: number for number, name in enumerate(names) if number}
        return cls(quota, _rules("label", quota, quota.groups, new_code), names, numbers)

    def numbers(self, labels: pl.Series) -> pl.Series:
        """Groups of rows by their labels.

        Raises
        ------
        LimitError
            There are too many.
        """
        unique = labels.drop_nulls().unique(maintain_order=True).to_list()
        for name in unique:
            if name not in self._numbers:
                self._numbers[name] = len(self.names)
                self.names.append(name)
        if len(self.names) > MOST_LABELS:
            raise LimitError(
                f"selection.per_label: column '{self.quota.field}' has more than {MOST_LABELS:,} different values; "
                "quotas are for labels that many rows share"
            )
        numbers = [self._numbers[name] for name in unique]
        return labels.replace_strict(unique, numbers, default=0, return_dtype=pl.UInt32).fill_null(0)

    @property
    def partition(self) -> Partition:
        """The groups, when all rows were seen."""
        own = {name[:LABEL_CHARACTERS]: 1 + number for number, name in enumerate(self.quota.groups)}
        rule_of = [-1, *(own.get(name, 0) for name in self.names[1:])]
        return Partition("label", self.names, self.rules, np.array(rule_of, np.int64))


def _rules(kind: str, quota: Quota, groups: Mapping[str, Quota], new_code: NewCode) -> list[Rule]:
    """The bounds of each group, then those of the named ones."""
    found = []
    for name, own in (("", quota), *groups.items()):
        text = f"selection.per_{kind}{'.groups.' if name else ''}{name}"
        rows, part = own.max_rows, own.max_fraction
        code_rows = 0 if rows is None else new_code(f"per_{kind}", f"over_{kind}_quota", f"{text}.max_rows")
        key = "min_fraction" if part is None else "max_fraction"
        bound = part is not None or own.min_fraction is not None
        code_fraction = new_code(f"per_{kind}", f"over_{kind}_quota", f"{text}.{key}") if bound else 0
        found.append(Rule(own, text, code_rows, code_fraction))
    return found


def source_name(uri: str, by: Literal["object", "folder", "pattern"], patterns: Sequence[str]) -> str:
    """What a source is called: the object's URI, its folder, or the first pattern that matches it (else the URI)."""
    if by == "folder":
        return uri[: uri.rfind("/") + 1]
    if by == "pattern":
        parts = _parts(uri)
        return next((pattern for pattern in patterns if _matches(parts, _parts(pattern))), uri)
    return uri


def _parts(uri: str) -> list[str]:
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "", uri
    scheme = {"s3a": "s3", "file": "", "local": ""}.get(scheme.lower(), scheme.lower())
    return [scheme, *rest.strip("/").split("/")]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path has the form of a glob; `**` stands for any number of folders."""
    reached = {0}
    for number, part in enumerate(pattern):
        if part == "**" and number < len(pattern) - 1:
            reached = {place for first in reached for place in range(first, len(parts))}
        elif part == "**":
            return any(place < len(parts) for place in reached)
        else:
            reached = {place + 1 for place in reached if place < len(parts) and fnmatch.fnmatchcase(parts[place], part)}
    return len(parts) in reached

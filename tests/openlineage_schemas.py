"""The OpenLineage JSON schemas, and whether events keep to them.

The schemas are made from the classes of the client library, which its authors generate from the specification: names,
types, what is required and the URL of each schema come from there. They are stricter than the specification in one
way: a facet that it defines may hold nothing else. With `OPENLINEAGE_SPEC=<folder>` (the folder `spec` of a checkout
of the OpenLineage repository), the files of the specification itself are used instead.
"""

from __future__ import annotations

import enum
import importlib
import json
import os
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]
from openlineage.client import generated
from referencing import Registry
from referencing.jsonschema import DRAFT202012

Json = dict[str, Any]

_OWN = "riseOps_"
_FORMATS = {"runId": "uuid", "eventTime": "date-time", "producer": "uri", "_producer": "uri", "schemaURL": "uri",
            "_schemaURL": "uri"}  # fmt: skip
_FACETS = (("run", "facets"), ("job", "facets"))
_VERSION = re.compile(r"/\d+-\d+-\d+/")


def check_event(event: Json) -> None:
    """Raise `jsonschema.ValidationError` for an event, or a facet of it, that does not fit its schema."""
    _validate(event, event["schemaURL"])
    for name, facet in facets_of(event):
        _validate(facet, facet["_schemaURL"])
        assert name.startswith(_OWN) or not facet["_schemaURL"].endswith("Facet.json#/$defs/RunFacet"), name


def facets_of(event: Json) -> Iterator[tuple[str, Json]]:
    """Every facet of an event with its name."""
    for owner, kind in _FACETS:
        yield from event[owner][kind].items()
    for dataset in (*event["inputs"], *event["outputs"]):
        for kind in ("facets", "inputFacets", "outputFacets"):
            yield from dataset.get(kind, {}).items()


def _validate(value: Json, url: str) -> None:
    base, _, pointer = url.partition("#")
    reference = {"$ref": f"{_unversioned(base)}#{pointer}"}
    Draft202012Validator(reference, registry=registry(), format_checker=formats()).validate(value)


def _unversioned(url: str) -> str:
    return _VERSION.sub("/", url)


@lru_cache(1)
def formats() -> FormatChecker:
    """Formats that need no package: what `jsonschema` has, and URIs and times by their beginning."""
    checker = FormatChecker(["uuid"])
    checker.checks("uri")(lambda value: re.match(r"^[a-z][a-z0-9+.-]*:\S+$", str(value)) is not None)
    checker.checks("date-time")(
        lambda value: re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$", str(value)) is not None
    )
    return checker


@lru_cache(1)
def registry() -> Registry[Any]:
    """All schemas by their URL without its version."""
    folder = os.environ.get("OPENLINEAGE_SPEC")
    documents = _published(Path(folder)) if folder else _generated()
    resources = [(url, DRAFT202012.create_resource(document)) for url, document in documents.items()]
    return Registry().with_resources(resources)


def _published(folder: Path) -> dict[str, Json]:
    found = {}
    for file in (folder / "OpenLineage.json", *(folder / "facets").glob("*.json")):
        text = re.sub(
            r"https://openlineage\.io/spec/\S*?\.json", lambda match: _unversioned(match[0]), file.read_text()
        )
        document = json.loads(text)
        found[document["$id"]] = document
    return found


def _generated() -> dict[str, Json]:
    documents: dict[str, Json] = {}
    for module in pkgutil.iter_modules(generated.__path__):
        loaded = importlib.import_module(f"openlineage.client.generated.{module.name}")
        for kind in vars(loaded).values():
            if isinstance(kind, type) and hasattr(kind, "_get_schema") and hasattr(kind, "__attrs_attrs__"):
                base, _, pointer = kind._get_schema().partition("#/$defs/")
                document = documents.setdefault(_unversioned(base), {"$id": _unversioned(base), "$defs": {}})
                document["$defs"].setdefault(pointer, _object(kind))
    return documents


def _object(kind: Any) -> Json:
    hints = typing.get_type_hints(kind, include_extras=True)
    properties: Json = {}
    required = ["_producer", "_schemaURL"] if "_producer" in hints else []
    required += ["producer", "schemaURL"] if "producer" in hints else []
    for field in kind.__attrs_attrs__:
        properties[field.name] = _type(hints[field.name])
        if field.name in _FORMATS:
            properties[field.name]["format"] = _FORMATS[field.name]
        if repr(field.default) == "NOTHING":
            required.append(field.name)
    is_open = kind.__module__.endswith("base") and kind.__name__.endswith("Facet")  # facets of anybody
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": is_open}


def _type(hint: Any) -> Json:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(each) for each in arguments if each is not type(None)]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [item.value for item in hint]}
    if hasattr(hint, "__attrs_attrs__"):
        return {"$ref": _unversioned(hint._get_schema())} if hasattr(hint, "_get_schema") else _object(hint)
    return {"type": {str: "string", int: "integer", float: "number", bool: "boolean"}[hint]} if hint is not Any else {}

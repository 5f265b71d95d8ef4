"""What all sections of a configuration share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rise_ops.hashing import fingerprint


class Section(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field: two configurations with equal fingerprints do the same."""
        return fingerprint(self.model_dump(mode="json"))


_WITH_SECRET = re.compile(r"^[A-Za-z0-9+.-]+://[^/?#]*@")
_SIGNED = re.compile(
    r"(?i)://.*[?&](x-(amz|goog)-(signature|security-token)|signature|sig|(access_|auth_)?token|api_?key)="
)


def _without_secret(url: str) -> str:
    if _WITH_SECRET.match(url):
        raise ValueError("credentials do not belong in a URL; set the AWS_* variables instead")
    if _SIGNED.search(url):
        raise ValueError("a signed URL is a secret; give the object's own address, which the AWS_* variables may open")
    return url


def no_url(name: str) -> str:
    """A model is a hub name or a folder."""
    if "://" in name:
        raise ValueError("a hub name or a folder, not a URL; HF_TOKEN opens what the hub does not show to everybody")
    return name


Url = Annotated[str, Field(min_length=1), AfterValidator(_without_secret)]
"""A path, glob or URL that names no user or password: configurations end up in records and reports."""


class FieldMap(Section):
    """Which columns hold the text. Give `text` (and optionally `prompt`, its beginning), or nothing."""

    text: str | None = Field(None, description="Column with the whole text.")
    prompt: str | None = Field(None, description="Column with the prompt that precedes `text`.")

    @model_validator(mode="after")
    def _prompt_needs_text(self) -> FieldMap:
        if self.prompt is not None and self.text is None:
            raise ValueError("cannot use 'prompt' without specifying 'text'")
        return self


class TargetConfig(Section):
    """A named set of queries: text whose loss the curated rows should lower (or raise)."""

    queries: Url = Field(description="File or glob with the queries, in any format that sources may have.")
    fields: FieldMap = Field(default_factory=lambda: FieldMap(), description="Columns; default: known row shapes.")

"""How the report writes numbers, settings and texts: the filters of its templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml

MARKED = 24
"""Tokens of a text that are marked: the ones that carry most."""
_FAINTEST = 0.08
"""A token that carries less than this part of the strongest is not marked."""
_DEFAULTS = (("field", "text"), ("by", "object"))
"""Settings that go without saying."""
_NAMED = 4
"""Tokens that are named beneath a text."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text: a token that carries influence, or what stands between two such."""

    text: str
    score: float | None = None
    strength: int = 0
    """1 to 4, negative where the token works against the query; 0: not marked."""


def count(value: Any) -> str:
    """A whole number with separators."""
    return "–" if not isinstance(value, int | float) or value != value else f"{value:,.0f}"


def signed(value: Any) -> str:
    """A score with its sign and three digits that matter."""
    if not isinstance(value, int | float) or value != value:
        return "–"
    if value == 0:
        return "0"
    text = f"{abs(value):.3f}" if abs(value) >= 0.1 else f"{abs(value):.3g}"
    return f"{'−' if value < 0 else '+'}{text}"


def plain(value: Any) -> str:
    """An amount without a sign: an error, a width."""
    return signed(value).removeprefix("+")


def weight(value: float) -> str:
    """The weight of a target."""
    return f"{value:+g}".replace("-", "−")


def percent(part: Any, whole: Any = 1) -> str:
    """`part` of `whole`; one decimal where it says more."""
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "< 0.1 %"
    return f"{share:.1f} %" if 0 < share < 99.95 and round(share, 1) != round(share) else f"{share:.0f} %"


def duration(seconds: Any) -> str:
    """Seconds, minutes or hours."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def moment(text: Any) -> str:
    """A time of `run.json`."""
    try:
        return f"{datetime.fromisoformat(str(text)):%d %B %Y, %H:%M:%S} UTC"
    except ValueError:
        return "–"


def short(identity: Any) -> str:
    """The first letters of a hash."""
    return str(identity)[:12] if isinstance(identity, str) else "–"


def clip(text: Any, characters: int) -> str:
    """The beginning of a long text, and how much is missing."""
    whole = str(text)
    if len(whole) <= characters:
        return whole
    return f"{whole[:characters]} … ({len(whole) - characters:,} more characters)"


def quote(text: Any, characters: int) -> str:
    """The beginning of a text in one line."""
    line = " ".join(str(text)[: 4 * characters].split())
    return line if len(line) <= characters else f"{line[:characters]}…"


def words(reason: Any) -> str:
    """A reason or step as people write it."""
    return str(reason).replace("_", " ")


def setting(config: Any, rule: Any) -> str:
    """What a configuration key such as `selection.exclude[1]` is set to, in one line; nothing where it is not there."""
    value = config
    for name in str(rule).replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            value = None
    return brief_yaml(value)


def brief_yaml(value: Any) -> str:
    """A setting in one line, without what is not set."""
    if isinstance(value, Mapping):
        pairs = [
            f"{key} {brief_yaml(each)}"
            for key, each in value.items()
            if each not in (None, (), [], {}, "") and (key, each) not in _DEFAULTS
        ]
        return ", ".join(pairs)
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip("'\"")


def pieces(text: str, tokens: Sequence[Mapping[str, Any]] | None, characters: int) -> list[Piece]:
    """A text cut at the tokens that carry most of its influence.

    Parameters
    ----------
    tokens
        `{text, start, end, score}`, places in `text`; those that do not fit are left out.
    characters
        The text ends here.
    """
    shown, rest = text[:characters], len(text) - characters
    found, at = [], 0
    for start, end, score, strength in _marked(shown, tokens or ()):
        if start > at:
            found.append(Piece(shown[at:start]))
        found.append(Piece(shown[start:end], score, strength))
        at = end
    tail = shown[at:] + (f" … ({rest:,} more characters)" if rest > 0 else "")
    return [*found, Piece(tail)] if tail else found


def _marked(text: str, tokens: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, float, int]]:
    """Start, end, score and strength of the tokens to mark, in order, none within another."""
    strongest = sorted(tokens, key=lambda token: -abs(token["score"]))[:MARKED]
    most = abs(strongest[0]["score"]) if strongest else 0.0
    at = 0
    for token in sorted(strongest, key=lambda token: int(token["start"])):
        start, end, score = int(token["start"]), int(token["end"]), float(token["score"])
        share = abs(score) / most if most else 0.0
        if at <= start < end <= len(text) and share >= _FAINTEST:
            level = 1 + (share >= 0.25) + (share >= 0.5) + (share >= 0.75)
            yield start, end, score, level if score > 0 else -level
            at = end


def strongest(tokens: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, float]]:
    """The tokens that carry most, with their scores, for those who cannot see the marks."""
    ordered = sorted(tokens or (), key=lambda token: -abs(token["score"]))
    return [(str(token["text"]).strip() or "␣", float(token["score"])) for token in ordered[:_NAMED]]


def beyond(item: Mapping[str, Any], characters: int) -> float | None:
    """What the part of a hit's text that is not shown carries, where that is a tenth of its score or more."""
    rest = sum(float(token["score"]) for token in item.get("tokens") or () if int(token["start"]) >= characters)
    rest += float(item.get("tokens_beyond") or 0.0)
    score = item.get("score")
    return rest if isinstance(score, int | float) and abs(rest) >= abs(score) / 10 and rest else None


def summed(hits: Sequence[Mapping[str, Any]], name: str = "query_tokens") -> list[Json]:
    """Tokens of a query with their scores summed over its hits: what of the query drew these rows."""
    sums: dict[tuple[int, int], Json] = {}
    for hit in hits:
        for token in hit.get(name) or ():
            place = (int(token["start"]), int(token["end"]))
            known = sums.setdefault(place, {**token, "score": 0.0})
            known["score"] += float(token["score"])
    return list(sums.values())


FILTERS = {
    "count": count,
    "signed": signed,
    "plain": plain,
    "weight": weight,
    "percent": percent,
    "duration": duration,
    "moment": moment,
    "short": short,
    "clip": clip,
    "quote": quote,
    "words": words,
    "pieces": pieces,
    "strongest": strongest,
    "beyond": beyond,
    "summed": summed,
    "brief": brief_yaml,
    "unprefixed": lambda uri, prefix: str(uri).removeprefix(prefix) or str(uri),
}

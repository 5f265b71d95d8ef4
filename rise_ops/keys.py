"""Keys of the store: which ones there are.

A key is a path of plain names below the store's root. Some are built from what a document holds, or from what
somebody typed (a run's id), so `Store` holds every key against this before it goes anywhere.
"""

from __future__ import annotations

from rise_ops.errors import StoreError


def refuse_key(root: str, key: str) -> None:
    """Raise StoreError for a key that could lead out of the store, or that not every store can hold.

    An empty key is the root, and a slash at the end says that a folder is meant.
    """
    if key and not all(map(_is_plain, key.removesuffix("/").split("/"))):
        raise StoreError(
            f"{key[:200]!r} is not a key of store {root}: names between slashes cannot be empty, '.' or '..', nor hold "
            "control characters or backslashes; what names it is wrong or was tampered with"
        )


def _is_plain(name: str) -> bool:
    if name in ("", ".", "..") or "\\" in name:
        return False
    return not any(sign < " " or sign == "\x7f" or "\ud800" <= sign <= "\udfff" for sign in name)

"""What identifies a model: where its files are, and a fingerprint over them.

A folder's fingerprint is a SHA-256 over its weight files, `config.json` without keys that do not change what
the model computes, its tokenizer files, and its code where that is allowed to run. It does not depend on the
folder's path. A hub model's fingerprint is its commit, which fixes all of these. `model.quantization` gives other
weights and so another fingerprint; how the weights are spread over devices and processes does not. Nothing is loaded
here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rise_ops.config import ModelConfig
from rise_ops.errors import ModelError
from rise_ops.families import hub_name
from rise_ops.hashing import fingerprint

_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "_commit_hash", "use_cache")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_VOCABULARIES = tuple(name for name in _TOKENIZER_FILES if "config" not in name and "tokens" not in name)

_hashes: dict[tuple[str, int, int], str] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model comes from, resolved."""

    location: str
    """Folder, or hub name."""
    commit: str | None
    """Commit of a hub model; None for a folder."""


def resolve_model(config: ModelConfig) -> ModelFiles:
    """Find a model without loading it: a folder, a preset of `rise_ops.families` by its name, or a hub model.

    Raises
    ------
    ModelError
        It is neither a folder nor a hub model that can be reached, or its folder lacks something.
    """
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        _check_folder(config, folder)
        return ModelFiles(str(folder), None)
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"model {config.name}: there is no such folder; check model.name")
    name = hub_name(config.name)
    return ModelFiles(name, _hub_commit(config, name))


def model_fingerprint(config: ModelConfig) -> str:
    """Identity of a model, tokenizer included, without loading its weights.

    Raises
    ------
    ModelError
        As `resolve_model`; also when a file cannot be read.
    """
    files = resolve_model(config)
    quantization = {} if config.quantization is None else {"quantization": config.quantization}
    if files.commit is not None:
        return fingerprint({"hub": files.commit, "remote_code": config.trust_remote_code, **quantization})
    folder = Path(files.location)
    names = [*weight_files(folder), *(name for name in _TOKENIZER_FILES if (folder / name).is_file())]
    names += sorted(path.name for path in folder.glob("*.tiktoken"))
    if config.trust_remote_code:
        names += sorted(path.name for path in folder.glob("*.py"))
    try:
        hashes = {name: _file_sha256(folder / name) for name in names}
    except OSError as error:
        raise ModelError(f"model {config.name}: {first_line(error)}; check the folder's files") from error
    return fingerprint({"config": _stable_config(config, folder), "files": hashes, **quantization})


def stored_bytes(files: ModelFiles) -> int | None:
    """Size of a folder's weight files; None for a hub model, of which nothing may be here yet."""
    if files.commit is not None:
        return None
    folder = Path(files.location)
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut: libraries write paragraphs."""
    text = str(error).strip()
    return text.splitlines()[0][:300].rstrip(".") if text else type(error).__name__


def _check_folder(config: ModelConfig, folder: Path) -> None:
    if config.revision is not None:
        raise ModelError(f"model {config.name} is a folder and has no revisions; leave out model.revision")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {config.name} has no config.json; give the folder that save_pretrained wrote")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model {config.name} is an adapter; merge it into its base model and save that")
    if not weight_files(folder):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise ModelError(
                f"model {config.name} has pickled weights only, which are never loaded because they can run code; "
                "convert it with save_pretrained(..., safe_serialization=True)"
            )
        raise ModelError(f"model {config.name} has no model.safetensors; complete the folder")
    if not any((folder / name).is_file() for name in _VOCABULARIES) and not any(folder.glob("*.tiktoken")):
        raise ModelError(
            f"model {config.name} has no tokenizer; put the tokenizer files (tokenizer.json, tokenizer_config.json) "
            "next to its weights"
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that are loaded from a folder; none where there are no safetensors."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({first_line(error)}); download the model again") from error


def _stable_config(config: ModelConfig, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {config.name}: config.json is damaged ({first_line(error)}); restore it") from error
    if not isinstance(document, dict):
        raise ModelError(f"model {config.name}: config.json does not hold an object; restore it")
    return {key: value for key, value in document.items() if key not in _VOLATILE_KEYS}


def _file_sha256(path: Path) -> str:
    """Content hash, remembered by path, size and time of change: weights can be many gigabytes."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    with _lock:
        if key in _hashes:
            return _hashes[key]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _lock:
        _hashes[key] = digest
    return digest


def _hub_commit(config: ModelConfig, name: str) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        path = cached_file(name, "config.json", revision=config.revision)
    except (OSError, ValueError) as error:
        at = f" at revision {config.revision}" if config.revision else ""
        raise ModelError(
            f"model {name} is neither a folder nor a hub model{at} that can be reached ({first_line(error)}); "
            "check model.name, or download the model and give its folder"
        ) from error
    commit = extract_commit_hash(path, None)
    if commit is None:
        raise ModelError(f"model {name}: the hub names no commit for it; download it and give its folder")
    return str(commit)

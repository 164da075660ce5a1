"""The manifest of a cache: its facts in JSON with a hash over them, kept twice, each copy written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cskd.errors import CacheError
from cskd.files.durable import json_bytes, json_hash, put
from cskd.files.read import parse_json, read_file
from cskd.store.format import FORMAT, MANIFEST, MANIFEST_COPY
from cskd.store.record_checks import check_manifest

RESTORE = (
    "`cskd repair` restores it from its second copy; else make the cache again in another folder (--set cache.path=...)"
)


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a cache's identity."""
    return json_hash(identity)


def begin_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Put the manifest of a new cache in place; of several processes the first one counts, whatever its identity."""
    put(root / MANIFEST, json_bytes(_sealed(manifest)), first=True)
    complete_manifest(root)


def complete_manifest(root: Path) -> None:
    """Write the second copy where it is missing, as after a death between the two."""
    if not (root / MANIFEST_COPY).exists():
        put(root / MANIFEST_COPY, json_bytes(read_manifest(root)))


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Replace both copies; 'format', 'fingerprint' and 'sha256' are set here."""
    for name in (MANIFEST_COPY, MANIFEST):
        put(root / name, json_bytes(_sealed(manifest)))


def read_manifest(root: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest, or its copy. CacheError when there is none, when it is of another format, or damaged."""
    path = root / name
    try:
        manifest = parse_json(read_file(path))
    except FileNotFoundError:
        if name == MANIFEST and (root / MANIFEST_COPY).exists():
            raise CacheError(f"{path} is missing; {RESTORE}") from None
        raise CacheError(f"no cache at {root} ({name} is missing); make one with `cskd cache-teacher CONFIG`") from None
    except NotADirectoryError:
        raise CacheError(
            f"{root} is a file, expected the folder of a cache, made by `cskd cache-teacher CONFIG`"
        ) from None
    except (ValueError, OSError) as e:
        raise CacheError(f"{path} is not readable: {e}; {RESTORE}") from None
    if not isinstance(manifest, dict):
        raise CacheError(f"{path} holds a {type(manifest).__name__}, expected a mapping; {RESTORE}")
    if manifest.get("format") != FORMAT:
        mend = "cache it again" if type(manifest.get("format")) is int else RESTORE
        raise CacheError(f"{path} has format {str(manifest.get('format'))[:40]}, this version reads {FORMAT}; {mend}")
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    if json_hash(facts) != manifest.get("sha256"):
        raise CacheError(f"{path} does not match its own hash; {RESTORE}")
    try:
        check_manifest(manifest)
    except ValueError as e:
        raise CacheError(f"{path} is no manifest of a cache: {e}; {RESTORE}") from None
    if fingerprint_of(manifest["identity"]) != manifest["fingerprint"]:
        raise CacheError(f"{path} does not match its own fingerprint; {RESTORE}")
    return manifest


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    facts = {**manifest, "format": FORMAT, "fingerprint": fingerprint_of(manifest["identity"])}
    facts.pop("sha256", None)
    return {**facts, "sha256": json_hash(facts)}

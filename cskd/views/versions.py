"""Which versions of libraries make the pixels and logits here, and which of them are others than a cache recorded."""

from __future__ import annotations

import importlib.metadata
import platform

from cskd.dataset.images import decoder_versions

# Libraries whose version can change a pixel or a logit.
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "zarr", "numcodecs")


def library_versions() -> dict[str, str]:
    """Versions recorded beside the identity, those of the image decoders included; a change of them calls for a replay,
    not for a new cache."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {f"decoder {name}": version for name, version in decoder_versions().items()}


def changed_versions(recorded: dict[str, str]) -> str:
    """What is installed here in another version than `recorded`, in words; '' where nothing is."""
    now = library_versions()
    names = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    return ", ".join(f"{name} {recorded.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names)

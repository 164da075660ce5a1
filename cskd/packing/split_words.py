"""Which names of folders and shards are those of a split (train, validation, ...), and which are of the split asked for.

Names only: nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_SPELLINGS = {
    "train": "train training trainset trn",
    "val": "val valid validation valset",
    "test": "test testing testset tst",
    "dev": "dev devset",
    "eval": "eval evaluation evalset",
    "trainval": "trainval",
    "minival": "minival",
    "holdout": "holdout heldout",
}
WORDS = {word: split for split, words in _SPELLINGS.items() for word in words.split()}
_FILLERS = frozenset(["set", "data", "dataset", "split", "images", "image", "imgs", "img", "folder", "dir"])


def words_in(name: str) -> list[str]:
    """The splits that the words of a name speak of: ['train'] for 'ILSVRC2012_img_train' and for 'bullet train'."""
    return [WORDS[word] for word in _tokens(name) if word in WORDS]


def split_of(name: str) -> str | None:
    """The split that a name says and nothing else: 'val' for 'Validation', 'val2017' and 'val_images', not for 'img_val_x'."""
    rest = [word for word in _tokens(name) if word not in _FILLERS and len(word) > 1]
    return WORDS.get(rest[0]) if len(rest) == 1 else None


def written_word(name: str) -> str | None:
    """The first word of a name that speaks of a split, as it is written there: 'validation' for 'x-validation-007'."""
    return next((word for word in _tokens(name) if word in WORDS), None)


def split_names(names: Collection[str]) -> set[str]:
    """Those of the names that stand for splits: by their only word, or, where two splits occur, by one of their words."""
    loose = {name: words for name in names if (words := words_in(name))}
    if len({word for words in loose.values() for word in words}) > 1:
        return set(loose)
    return {name for name in loose if split_of(name)}


def in_order(names: Iterable[str]) -> list[str]:
    """Training first, then validation, test, ..., then by name: the order in which they are shown."""
    places = list(_SPELLINGS)
    return sorted(names, key=lambda name: (min((places.index(w) for w in words_in(name)), default=99), name))


def some(names: Iterable[str], most: int = 4) -> str:
    """'a, b, c' or 'a, b, c, d and 96 more', each name cut to 40 characters."""
    all_names = [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more


def chosen(names: Collection[str], asked: str) -> set[str]:
    """Those of the names that `--split asked` means: that very name, else all that speak of the same split."""
    if asked in names:
        return {asked}
    split = split_of(asked)
    return {name for name in names if split in words_in(name)} if split else set()


def roots_of(folders: Iterable[str], asked: str) -> list[str]:
    """The folders that `--split asked` means, of the paths and those above them, nearest to the source; it may be a path."""
    every = list(folders)
    if "/" in asked:
        asked = asked.strip("/")
        return [asked] if any(f"{folder}/".startswith(f"{asked}/") for folder in every) else []
    named = chosen({part for folder in every for part in folder.split("/")}, asked)
    roots: dict[int, set[str]] = {}
    for folder in every:
        parts = folder.split("/")
        at = next((i for i, part in enumerate(parts) if part in named), None)
        if at is not None:
            roots.setdefault(at, set()).add("/".join(parts[: at + 1]))
    return sorted(roots[min(roots)]) if roots else []


class KeySplit:
    """Which samples of shards `--split` takes where only the folders in their keys tell; all, where none was asked for."""

    def __init__(self, split: str | None) -> None:
        self.split, self.seen = split, 0
        self.folders: dict[str, bool] = {}  # of the keys -> whether its samples are taken

    def takes(self, key: str) -> bool:
        """Whether to take the next sample."""
        self.seen += 1
        folder = key.rpartition("/")[0]
        if folder not in self.folders:
            self.folders[folder] = self.split is None or bool(chosen(folder.split("/"), self.split))
        return self.folders[folder]


def _tokens(name: str) -> list[str]:
    return re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())

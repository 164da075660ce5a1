"""Tables that a script puts into a page, from `<!-- table NAME -->` to `<!-- end -->`; nothing is written there by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def fill(page: str, tables: Mapping[str, Sequence[str]], name: str) -> str:
    """The page with the lines of each table that it asks for. KeyError, naming the page, for one that is not there."""

    def block(found: re.Match[str]) -> str:
        if found[1] not in tables:
            raise KeyError(f"{name} asks for table {found[1]}, known: {', '.join(tables)}")
        return "\n".join([f"<!-- table {found[1]} -->", *tables[found[1]], "<!-- end -->"])

    return re.sub(r"(?s)<!-- table ([\w-]+) -->\n.*?<!-- end -->", block, page)

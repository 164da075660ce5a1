"""The pool of workers: a stream that is left ends its workers at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from multiprocessing.spawn import get_preparation_data

import pytest

from cskd.loading.stream import Stream


class Slow:
    """Sleeps for so many seconds."""

    def __call__(self, task: float) -> float:
        time.sleep(task)
        return task


def test_a_stream_that_is_left_does_not_wait_for_what_its_workers_are_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at Ctrl-C; torch would wait five seconds for each of them, here more than any machine takes to end them."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 300.0)
    results = iter(Stream(Slow(), [0.0, 600.0, 600.0, 600.0], workers=2))
    assert next(results) == 0.0
    clock = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    del results
    assert time.monotonic() - clock < 200


@pytest.mark.parametrize(("module", "imports_it"), [(__name__, False), ("__main__", True)])
def test_workers_import_the_main_script_only_where_they_are_in_it(
    module: str, imports_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script of a user's own that trains without `if __name__ == "__main__"` would train in every worker, too."""
    seen: list[bool] = []

    class Loader:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __iter__(self) -> Iterator[int]:
            seen.append(bool({"init_main_from_name", "init_main_from_path"} & set(get_preparation_data("worker"))))
            return iter([1])

    monkeypatch.setattr("cskd.loading.stream.DataLoader", Loader)
    monkeypatch.setattr(Slow, "__module__", module)
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", __file__, raising=False)
    before = main.__spec__, main.__file__
    assert list(Stream(Slow(), [0.0], workers=0)) == [1] and seen == [imports_it]
    assert (main.__spec__, main.__file__) == before

"""What the system refuses is said with its own cause and cure, by all that read and write files."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from cskd.dataset.inventory import open_inventory
from cskd.errors import CskdError, LimitError, limit_said, said
from cskd.files.read import open_regular
from cskd.packing.index import index
from tests.caches import make_tiny_data

EXPECTED = {
    errno.EMFILE: r"over its limit of [\d,]+ \(Too many open files\); .*ulimit -n",
    errno.ENFILE: r"on this machine .*fs.file-max",
    errno.ENOSPC: r"no room .*df -h",
    errno.EDQUOT: r"quota .*quota -s",
    errno.EROFS: r"mounted read-only .*give another path",
    errno.EACCES: r"no permission .*chmod",
    errno.EPERM: r"does not permit .*lsattr",
    errno.ENAMETOOLONG: r"name is too long .*shorter",
    errno.EIO: r"disk failed .*dmesg",
    errno.ESTALE: r"stale handle.*mount that again",
    errno.ENOENT: r"no such file .*exists",
    errno.ELOOP: r"in a circle .*link",
    errno.ENOTCONN: r"not connected .*mounted",
    errno.ENOLCK: r"no locks .*locks",
    errno.EBUSY: r"another program holds it",
}


@pytest.mark.parametrize("number", list(EXPECTED), ids=lambda number: errno.errorcode[number])
def test_each_error_of_the_system_has_its_own_cause_and_cure(number: int) -> None:
    error = OSError(number, os.strerror(number), "/data/x.tar")
    line = said(error)
    assert line.startswith("/data/x.tar: ") and len(line) <= 300
    with pytest.raises(OSError, match="data") as raised:
        raise error
    assert line == said(raised.value)
    assert re.search(EXPECTED[number], line), line
    assert ("no room" in line) == (number == errno.ENOSPC), "that is of a full disk alone"


def test_our_own_words_for_a_file_are_kept() -> None:
    own = OSError(errno.EINVAL, "a pipe, socket or device, expected a regular file", "x")
    assert said(own).startswith("x: a pipe, socket or device, expected a regular file; mend that")


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A data folder, and a process that has as many files open as it may."""
    data = make_tiny_data(tmp_path / "data").root
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        while len(held) < 256:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield data
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_many_open_files_say_ulimit_and_blame_no_file(few_files: Path) -> None:
    for act in (lambda: open_regular(few_files / "00000.tar"), lambda: open_inventory(few_files)):
        with pytest.raises(LimitError, match=r"Too many open files.*ulimit -n"):
            act()
    with pytest.raises(CskdError, match=r"Too many open files.*ulimit -n"):
        index(few_files / "00000.tar")


def test_a_library_that_ran_out_of_files_is_understood() -> None:
    assert "ulimit -n" in limit_said(RuntimeError("unable to open shared memory object: Too many open files (24)"))
    assert "ulimit -n" in limit_said(RuntimeError("received 0 items of ancdata"))
    outer = ValueError("x")
    outer.__cause__ = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert "ulimit -n" in limit_said(outer) and limit_said(ValueError("y")) == ""

"""Object stores and web servers as a storage, by obstore. Timeouts and credentials are obstore's own, and most of the retries."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from cskd.errors import StorageError, printable, shortened
from cskd.files.waiting import SOON, said_when_long
from cskd.storage.base import Contents, Counts, Range, Stat, check_key

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
IN_FLIGHT = 64  # requests at the same time: 200 objects of 700 bytes at 30 ms take 0.15 s, one after the other 6.3
TRIES = 6  # of a request that obstore does not ask again for: see `_passing`
SILENT = 15.0  # seconds without an answer after which that is said, where the store has answered before
AGAIN = 15.0  # seconds after which none is begun: obstore's own tries took them
WHOLE = 1 << 25  # bytes that are put by one request; more in parts
# Before the first answer little patience: a wrong endpoint or missing credentials are to be known within seconds.
_FIRST = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}
_LATER = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
_CLIENT = {
    "connect_timeout": "5s",
    "timeout": "2m",
}  # of each request; what is given at all replaces all of the environment
_OF_ENVIRONMENT = (*_CLIENT, "allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a key, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist|container does not exist", re.I)
_NO_CREDENTIALS = re.compile(r"169\.254\.|metadata\.google|Account must be specified|Missing \w*Key|credential", re.I)
_NOT_REACHED = re.compile(r"error sending request|timed out|connect error|dns error|Connection refused", re.I)


class Objects:
    """See `cskd.storage.Storage`. location: in its usual form, see `cskd.files.paths.location_text`."""

    def __init__(self, location: str) -> None:
        self.location, self.counts = location, Counts()
        self.scheme, _, rest = location.partition("://")
        self.bucket = rest.partition("/")[0]
        self.read_only = self.scheme in ("http", "https")
        self.ranges = True  # unless the server turns out to have none, so that each request is for a whole object
        self._answered = False
        self._first, self._later = self._open(_FIRST), self._open(_LATER)

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.location,)

    def get(self, key: str, start: int = 0, size: int | None = None, *, limit: int | None = None) -> bytes:
        return self._run(self._get, Range(check_key(key), start, size), limit)

    def get_many(self, wanted: Sequence[str | Range]) -> Contents:
        ranges = [Range(one) if isinstance(one, str) else one for one in wanted]
        if len(ranges) < 2:
            return [self.get(*one) for one in ranges]
        for one in ranges:
            check_key(one.key)
        with ThreadPoolExecutor(1, "objects") as pool:  # of its own, since the caller's may run an event loop
            return pool.submit(asyncio.run, self._get_many(ranges)).result()

    def put(self, key: str, data: bytes) -> None:
        import obstore

        self._refuse_writing(key)
        whole = len(data) <= WHOLE
        self._run(lambda: obstore.put(self._store, check_key(key), data, mode="overwrite", use_multipart=not whole))
        self.counts.add(written=len(data))

    def create(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        self._refuse_writing(key)
        check_key(key)
        for tried in range(TRIES):
            if tried:
                time.sleep(_backoff(tried))
            self.counts.add(written=len(data))
            try:
                with self._waiting():
                    obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                pass  # by another writer, or by this call, whose first answer was lost
            except FileNotFoundError as e:
                raise self._lost(e, key) from None
            except BaseError as e:  # an answer that did not come: the object may be there
                if tried + 1 == TRIES or not _may_be_there(e):
                    raise self._explain(e) from None
            else:
                self._answered = True
                return True
            try:
                return self.get(key) == data
            except FileNotFoundError:
                continue
        raise StorageError(
            f"{self.location}/{key}: the store says that it exists, and has it not, {TRIES} times; see that the store has "
            "conditional writes (If-None-Match), and run the same command again"
        )

    def list(self, prefix: str = "") -> Iterator[Stat]:
        import obstore

        if self.read_only:
            raise StorageError(f"{self.location}: a web server has no list of its files; give s3://, gs:// or az://")
        of, last, stream = prefix and check_key(prefix), None, None

        def chunk() -> Sequence[ObjectMeta] | None:
            nonlocal stream
            try:
                stream = stream or iter(obstore.list(self._store, of, offset=last, chunk_size=1000))
                return next(stream, None)
            except Exception:
                stream = None  # a broken one would say that nothing follows
                raise

        while (found := self._run(chunk)) is not None:
            for meta in found:
                last = meta["path"]
                yield _stat(last, meta)

    def stat(self, key: str) -> Stat | None:
        import obstore

        try:
            meta = self._run(lambda: obstore.head(self._store, check_key(key)))
        except FileNotFoundError:
            return None
        return _stat(key, meta)

    def delete(self, key: str) -> None:
        import obstore

        self._refuse_writing(key)
        try:
            self._run(lambda: obstore.delete(self._store, check_key(key)))
        except FileNotFoundError:
            return

    @property
    def _store(self) -> ObjectStore:
        return self._later if self._answered else self._first

    def _open(self, retry: dict[str, object]) -> ObjectStore:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise StorageError(
                f"{self.location} needs obstore, which is not installed; run `pip install 'cskd[cloud]'`, or give a local path"
            ) from None
        try:
            return from_url(self.location, client_options=_client(self.scheme), retry_config=retry)  # type: ignore[call-overload, no-any-return]
        except (BaseError, ValueError) as e:
            raise self._explain(e) from None

    def _run(self, call: Callable[..., T], *arguments: object) -> T:
        """`_tried`, and said where it takes long."""
        with self._waiting():
            return self._tried(call, *arguments)

    def _tried(self, call: Callable[..., T], *arguments: object) -> T:
        """One request, again where that may help. Raises as `Storage` says."""
        from obstore.exceptions import BaseError

        begun, tried = time.monotonic(), 0
        while True:
            self.counts.add()
            try:
                answer = call(*arguments)
            except FileNotFoundError as e:
                raise self._lost(e) from None
            except BaseError as e:
                if (pause := self._pause(e, tried := tried + 1, begun)) is None:
                    raise self._explain(e) from None
                time.sleep(pause)
            else:
                self._answered = True
                return answer

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """Say where an answer does not come; once the store has answered, later: obstore asks again for minutes, and much takes long."""
        endpoint = os.environ.get(_ENDPOINTS.get(self.scheme, ""), "")
        cure = f"check {_ENDPOINTS[self.scheme]}" if self.scheme in _ENDPOINTS else "check the address"
        what = f"{self.location}{f' from {endpoint}' if endpoint else ''}"
        cure += " and the network, or give a local path"
        return said_when_long(what, cure, SILENT if self._answered else SOON)

    def _pause(self, error: Exception, tried: int, begun: float) -> float | None:
        """Seconds until a request that failed is tried again. None: it is given up."""
        if tried >= TRIES or time.monotonic() - begun > AGAIN or not self._passing(error):
            return None
        return _backoff(tried)

    def _passing(self, error: Exception) -> bool:
        """Whether an error may pass that obstore does not ask again for: an answer whose body did not come whole, a conflict with
        another writer, a lost answer to a request that it takes for one that must not be repeated. Here all may be."""
        text = str(error)
        if re.search(r"body error|body from connection|end of file|incomplete message", text, re.I):
            return True
        return self._answered and _may_be_there(error)

    def _get(self, wanted: Range, limit: int | None) -> bytes:
        import obstore

        if wanted.size == 0:
            return b""
        try:
            found = obstore.get(self._store, wanted.key, options=_options(wanted))
        except Exception as e:
            if _past_the_end(e):
                return b""
            if not _no_ranges(e):
                raise
            self.ranges = False
            end = None if wanted.size is None else wanted.start + wanted.size
            return self._get(Range(wanted.key), limit)[wanted.start : end]
        if limit is not None and found.meta["size"] > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes", f"{self.location}/{wanted.key}")
        data = bytes(found.bytes())
        self.counts.add(0, read=len(data))
        return data

    async def _get_many(self, ranges: Sequence[Range]) -> Contents:
        import obstore

        free = asyncio.Semaphore(IN_FLIGHT)

        async def one(wanted: Range) -> bytes:
            if wanted.size == 0:
                return b""
            begun, tried = time.monotonic(), 0
            while True:
                async with free:
                    try:
                        found = await obstore.get_async(self._store, wanted.key, options=_options(wanted))
                        return bytes(await found.bytes_async())
                    except Exception as e:
                        if _past_the_end(e):
                            return b""
                        if (pause := self._pause(e, tried := tried + 1, begun)) is None:
                            raise
                await asyncio.sleep(pause)

        from obstore.exceptions import BaseError

        self.counts.add(len(ranges))
        try:
            with self._waiting():
                async with asyncio.TaskGroup() as group:  # the first failure ends the others
                    tasks = [group.create_task(one(wanted)) for wanted in ranges]
        except* FileNotFoundError as e:
            raise self._lost(e.exceptions[0]) from None
        except* BaseError as e:
            raise self._explain(e.exceptions[0]) from None
        self._answered = True
        found = [task.result() for task in tasks]
        self.counts.add(0, read=sum(map(len, found)))
        return found

    def _refuse_writing(self, key: str) -> None:
        if self.read_only:
            raise StorageError(
                f"{self.location}/{key}: a web server is only read; give a local path or s3://BUCKET/NAME"
            )

    def _lost(self, error: BaseException, key: str = "") -> Exception:
        """An object that is absent, or a bucket that is."""
        if _NO_BUCKET.search(str(error)):
            return self._explain(error)
        named = re.match(r"Object at location (\S+) not found", str(error))
        prefix = self.location.partition("://")[2].partition("/")[2]
        name = key or (named[1].removeprefix(f"{prefix}/") if named else "")
        return FileNotFoundError(errno.ENOENT, "no such object", f"{self.location}/{name}")

    def _explain(self, error: BaseException) -> StorageError:
        """What a store refused, as one line."""
        text = str(error).partition("Debug source")[0]
        code, status = re.search(r"<Code>([\w.]+)</Code>", text), re.search(r"status code: (\d+ \w[\w ]*)", text)
        said = " ".join(filter(None, (status and status[1], code and code[1])))
        url = re.search(r"https?://[^/\s]+", text)
        if _NO_BUCKET.search(text):
            kind = "container" if self.scheme == "az" else "bucket"
            why = f"there is no {kind} {self.bucket!r}; make it, or give the name of one that exists"
        elif _NO_CREDENTIALS.search(text) and self.scheme in _CREDENTIALS and "SignatureDoesNotMatch" not in text:
            why = f"no credentials were found in the environment; {_CREDENTIALS[self.scheme]} (docs/STORAGE.md)"
        elif status and status[1][:3] in ("401", "403"):
            why = f"the store does not let this user in ({said}); check the credentials and what they permit (docs/STORAGE.md)"
        elif _NOT_REACHED.search(text):
            what = f"{_ENDPOINTS[self.scheme]} and " if self.scheme in _ENDPOINTS else ""
            why = f"{url[0] if url else 'its server'} can't be reached; check {what}the network, and run the same command again"
        else:
            why = f"the store answers {said or shortened(printable(' '.join(text.split())), 120)}; run the same command again"
        return StorageError(f"{self.location}: {why}")


def _client(scheme: str) -> dict[str, object]:
    """Options of obstore's HTTP client: ours, and over them those of the environment. Who names an endpoint http:// means it."""
    found: dict[str, object] = {**_CLIENT}
    prefix = _ENDPOINTS.get(scheme, "HTTP_").partition("_")[0]
    given = {name: os.environ.get(f"{prefix}_{name.upper()}") for name in _OF_ENVIRONMENT}
    found |= {name: value for name, value in given.items() if value}
    endpoint = scheme if scheme not in _ENDPOINTS else os.environ.get(_ENDPOINTS[scheme], "")
    if endpoint.startswith("http") and not endpoint.startswith("https"):
        found.setdefault("allow_http", "true")
    return found


def _stat(key: str, meta: ObjectMeta) -> Stat:
    # Both, since a bucket whose versions are suspended calls each of them "null"
    version = " ".join(filter(None, (meta["e_tag"], meta["version"])))
    return Stat(key, meta["size"], meta["last_modified"].timestamp(), version)


def _options(wanted: Range) -> GetOptions | None:
    """Of a request for a range, as obstore has it; None for a whole object."""
    if wanted.size is not None:
        return {"range": (wanted.start, wanted.start + wanted.size)}
    return {"range": {"offset": wanted.start}} if wanted.start else None


def _backoff(tried: int) -> float:
    """Seconds after so many tries: about 0.15, 0.3, ... 2.4."""
    return random.uniform(0.05, 0.1) * 2.0**tried


def _past_the_end(error: Exception) -> bool:
    return "416 Range Not Satisfiable" in str(error)


def _no_ranges(error: Exception) -> bool:
    return "Range request not supported" in str(error)


def _may_be_there(error: Exception) -> bool:
    """Whether a write that failed may have been done: its answer was lost, or the store failed or was busy."""
    text = str(error)
    return bool(_NOT_REACHED.search(text) or re.search(r"status code: (409|429|5\d\d)|HTTP error", text))

"""Files that are read over the network through fsspec: `gs://`, `s3://`, `hf://`, `https://`."""

import dataclasses
import fnmatch
import functools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from glm5_jax.errors import InputError, Missing

_PAUSES = (1, 2, 4, 8)  # seconds before what failed is tried again
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "hf": "hf", "http": "http", "https": "http"}
# What tells a version of a file, by fsspec's file systems; the first that one has.
_MARKS = (
    "generation", "blob_id", "xet_hash", "ETag", "etag", "md5Hash", "Content-MD5",
    "mtime", "LastModified", "last_modified", "Last-Modified", "modified", "created",
)  # fmt: skip
_DEFECTS = (TypeError, AttributeError, NameError, AssertionError, MemoryError)
_FINAL = (ImportError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
_TRIED_AGAIN = (408, 425, 429)  # statuses of HTTP from 400 to 499 that may pass

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """What readers of checkpoints use of a `pathlib.Path`, for a URL.

    Every method asks the file system, several times if it has to, and raises `InputError` if there
    is no answer, which names the URL and the reason.
    """

    url: str = dataclasses.field(
        repr=False
    )  # of the directory that was given, credentials included
    inside: str = ""  # the path of a file or folder in it

    def __post_init__(self) -> None:
        protocol = self.url.partition("://")[0]
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or "::" in self.url:
            raise InputError(f"{self}: expected a URL such as gs://bucket/folder")
        if _is_http(self.url) and set("?#") & set(self.url):
            raise InputError(f"{self}: expected the URL of a directory, which has no ? or #")

    def __str__(self) -> str:
        protocol, _, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        if protocol != "hf":  # where it is followed by a revision
            host = host.rpartition("@")[2]
        shown = f"{protocol}://{host}{slash}{path}".rstrip("/")
        if _is_http(shown):
            shown = re.split("[?#]", shown)[0]
        return f"{shown}/{self.inside}" if self.inside else shown

    def __truediv__(self, name: str) -> Self:
        return dataclasses.replace(self, inside=f"{self.inside}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def revision(self) -> str | None:
        """That of a model on the Hugging Face hub, if one was asked for."""
        found = re.match(r"hf://[^@]*@(refs/[^/]+/[^/]+|[^/]+)", self.url)
        return found[1] if found else None

    def resolve(self) -> Self:
        """The same: links are the file system's own affair."""
        return self

    def require_directory(self) -> None:
        """Raises `InputError` if there is no such directory, as far as the protocol has them."""
        if not _is_http(self.url) and self._info()["type"] != "directory":
            raise InputError(f"{self}: is not a directory, expected one with a checkpoint")

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is a folder; over HTTP, there are only files."""
        return self._kind() == "directory"

    def glob(self, pattern: str) -> Iterator[Self]:
        """The files of a folder whose names match; none where the server does not list any."""
        try:
            paths = self._ask(lambda files, path: files.ls(path, detail=False))
        except Missing:
            return
        for path in paths:
            name = path.rstrip("/").rpartition("/")[2]
            if fnmatch.fnmatchcase(name, pattern):
                yield self / name

    def read_bytes(self) -> bytes:
        """A whole file."""
        return self._ask(lambda files, path: files.cat_file(path))

    def read_part(self, start: int, stop: int) -> bytes:
        """Bytes of a file, by one request; fewer if it ends before or the server cuts them short.

        Several threads may read.
        """
        return self._ask(lambda files, path: _part(files, path, start, stop))

    def version(self, *, fresh: bool = False) -> tuple[int, str]:
        """The size of a file in bytes, and what else the file system tells versions by.

        Args:
          fresh: whatever has been heard of it before.
        """
        if fresh:
            self._ask(lambda files, path: files.invalidate_cache(path))
        info = self._info()
        if info["type"] == "directory":
            raise InputError(f"{self}: not a file")
        if info.get("size") is None:
            raise InputError(f"{self}: the server does not tell its size")
        return info["size"], next((str(info[mark]) for mark in _MARKS if info.get(mark)), "")

    def _kind(self) -> str | None:
        try:
            return str(self._info()["type"])
        except Missing:
            return None

    def _info(self) -> Any:
        return self._ask(lambda files, path: files.info(path))

    def _ask(self, request: Callable[[Any, str], Result]) -> Result:
        """Makes a request of the file system, again after a pause if it may pass another time."""
        for pause in (*_PAUSES, None):
            try:
                files, root = _opened(self.url)
                inside = f"/{self.inside}" if self.inside else ""
                return request(files, root.rstrip("/") + inside)
            except _DEFECTS:
                raise
            except Exception as error:  # file systems raise what their libraries do
                if pause is None or _is_final(error):
                    raise self._named(error) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _named(self, error: Exception) -> InputError:
        if isinstance(error, ImportError):
            extra = _EXTRAS.get(self.url.partition("://")[0])
            advice = f"pip install 'glm5-jax[{extra}]'" if extra else _said(error)
            return InputError(f"{self}: needs a package that is not installed: {advice}")
        said, missing = _said(error), _is_missing(error)
        if isinstance(error, FileNotFoundError) and self._is_path(said):
            said = "no such file or directory" if missing else _said(list(_chain(error))[-1])
        return (Missing if missing else InputError)(f"{self}: {said}")

    def _is_path(self, text: str) -> bool:
        """Whether an error says nothing but what was asked for, in the words of its library."""
        return " " not in text or text.strip("/'") in f"{self.url}/{self.inside}"


AnyPath = Path | RemotePath


def any_path(text: str) -> AnyPath:
    """What a user means: a URL, or a path on this machine.

    Raises:
      InputError: it is a URL that nothing can be read under.
    """
    return RemotePath(text) if "://" in text else Path(text)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@functools.cache
def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, one for all threads, and the path in it."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url, skip_instance_cache=True)
    return files, path


def _part(files: Any, path: str, start: int, stop: int) -> bytes:
    from fsspec.spec import AbstractFileSystem

    # Over HTTP, only what is opened looks whether the server sends a part or the whole. Where
    # `cat_file` opens a file, it would read ahead.
    opens = not files.async_impl and type(files).cat_file is AbstractFileSystem.cat_file
    if opens or _is_http(path):
        with files.open(path, "rb", cache_type="none", size=stop) as file:
            file.seek(start)
            return bytes(file.read(stop - start))
    return bytes(files.cat_file(path, start=start, end=stop))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error of a library tells of."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        for holder, name in ((each, "status"), (each, "code"), (response, "status_code")):
            if str(status := getattr(holder, name, None)).isdecimal():
                return int(str(status))
        if isinstance(response, dict):  # of botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _is_missing(error: Exception) -> bool:
    """Whether there is nothing there; fsspec says so of what it cannot reach, too."""
    if (status := _status(error)) is not None:
        return status in (404, 410)
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and isinstance(cause, LookupError | None)


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail in the same way."""
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status not in _TRIED_AGAIN
    return _is_missing(error) or isinstance(error, _FINAL)


def _said(error: BaseException) -> str:
    """The reason, without credentials and signatures, which libraries show with their URLs."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = re.sub(r"(://)[^/\s@'\"]*@", r"\1", " ".join(text.split()))
    return re.sub(r"(://[^\s?'\"]*)[?][^\s'\"]*", r"\1", text)[:300]

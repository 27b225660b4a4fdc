"""What a conversion has done so far, kept beside the place where the result will appear.

While `DST` is being made, there is `.DST.converting`:

    plan.json       what is converted, and how
    done-0.jsonl    a line for every shard that process 0 has finished with
    content/        what will get the name DST
    looked          says that the source was looked at, where that takes long
    stand-ins/      what is kept of shards of the source that were deleted

Content is on the disk before a line says so. A process that is killed at any time therefore leaves
what the same command goes on with, and several processes can share the work without talking.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert.journal import Journal, Record, journal_path, journals, read_journals
from glm5_jax.atomic import locked, make_parent, named_errors, refuse_existing, sync
from glm5_jax.coordination import LONGEST, said_by_all
from glm5_jax.errors import InputError
from glm5_jax.processes import is_first
from glm5_jax.strict_json import read_json

IsThere = Callable[[Path, Record], bool]
_PLAN_NAME = "plan.json"
_CONTENT_NAME = "content"
_LOOKED_NAME = "looked"
_STAND_INS_NAME = "stand-ins"
_RESTARTED = "conversion begun anew"


class Share(NamedTuple):
    """Which part of a conversion a process does: every `processes`-th shard, from `number` on."""

    number: int = 0
    processes: int = 1


class Workspace:
    """The folder of a conversion that is under way."""

    def __init__(self, destination: Path, share: Share, keys: Collection[str], is_there: IsThere):
        """Reads what was done; `open_workspace` makes or finds the folder."""
        self._keys, self._is_there = keys, is_there
        self.destination = destination
        directory = self.directory = _directory_of(destination)
        self.content = directory / _CONTENT_NAME
        self._share = share
        self._journal = Journal(journal_path(directory, share.number))
        self.records = self.read_records()

    def read_records(self) -> dict[str, Record]:
        """What all processes have said of the shards they finished, by the shards' names."""
        found = read_journals(self.directory, self._keys)
        return {
            shard: record for shard, record in found.items() if self._is_there(self.content, record)
        }

    def durable_records(self) -> dict[str, Record]:
        """The same, when they are on the disk: a process may be killed before it sees to that."""
        records = self.read_records()
        for path in journals(self.directory):
            with contextlib.suppress(FileNotFoundError):  # as above
                sync(path)
        return records

    def look_once(self, look: Callable[[], None]) -> None:
        """Looks at the source, unless this or another process has; waits for one that is at it."""
        path = self.directory / _LOOKED_NAME
        path.touch()
        with locked(path):
            if not path.stat().st_size:
                look()
                path.write_text("yes\n")
                sync(path)
                sync(self.directory)

    def share_of(self, shards: Iterable[str]) -> list[str]:
        """The shards that this process is to do, whether they are done or not."""
        return list(shards)[self._share.number :: self._share.processes]

    def finish(self, record: Record) -> None:
        """Writes down that a shard is done and all its content on the disk."""
        self._journal.write(record)

    def partial(self, name: str) -> Path:
        """Where this process writes what is to become a file of the content."""
        return self.directory / f"{name}.{self._share.number}"

    def bytes_left_over(self, sizes: Mapping[str, int], growth: float) -> int:
        """What there is of shards that are not done: in the content, and in files of this process.

        Args:
          sizes: of all shards, in bytes.
          growth: bytes of content for each one of a shard.
        """
        files = (path for path in self.content.rglob("*") if path.is_file())
        held = sum(path.stat().st_size for path in files)
        done = sum(size for shard, size in sizes.items() if shard in self.records)
        begun = sum(path.stat().st_size for path in self.directory.glob(self.partial("*").name))
        return max(0, held - int(growth * done)) + begun

    @contextlib.contextmanager
    def finishing(self, shards: Collection[str]) -> Iterator[dict[str, Record] | None]:
        """Gives the content its name after the body, if all shards are done.

        Yields:
          All records, or None if another process has yet to do a shard, or was here first; then
          the body is to do nothing.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.directory / _PLAN_NAME))
            except FileNotFoundError:  # the folder went when another process had finished
                yield None
                return
            records = self.read_records()
            if not self.content.exists() or any(shard not in records for shard in shards):
                yield None
                return
            yield {shard: records[shard] for shard in shards}
            for path in self.content.iterdir():
                sync(path)
            sync(self.content)
            refuse_existing(self.destination)
            self.content.rename(self.destination)
            sync(self.destination.parent)
        shutil.rmtree(self.directory, ignore_errors=True)


def _directory_of(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.converting")


def stand_ins_of(destination: Path) -> Path:
    """Where what is kept of deleted shards lies."""
    return _directory_of(destination) / _STAND_INS_NAME


def refuse_finished(destination: Path) -> None:
    """Raises `InputError` if there is something under the name of a destination."""
    if not destination.name:  # a folder such as .
        refuse_existing(destination)
    directory = _directory_of(destination)
    if destination.exists() and directory.exists() and not (directory / _CONTENT_NAME).exists():
        shutil.rmtree(directory)  # left by a process that was killed right after the last rename
    refuse_existing(destination)


@contextlib.contextmanager
def open_workspace(
    destination: Path,
    plan: Mapping[str, Any],
    share: Share,
    *,
    keys: Collection[str] = (),
    is_there: IsThere = lambda content, record: True,
    restart: bool = False,
) -> Iterator[Workspace]:
    """Begins a conversion, or goes on with one.

    Args:
      plan: what must be the same for going on, in JSON.
      keys: of a record, beside those that all have.
      is_there: whether the content still has what a record says was done.
      restart: begin anew if it is not the same, or is; of processes that are connected, the first
        does so for all.

    Raises:
      InputError: there is something under the name of the destination, another process is at this
        share of the work, or what was begun there is another conversion.
    """
    refuse_finished(destination)
    directory = _directory_of(destination)
    make_parent(destination)
    if restart and not is_first():
        said_by_all(_RESTARTED, "", LONGEST)
        restart = False
    with named_errors(destination, directory.name):
        if directory.is_symlink() or directory.exists() and not directory.is_dir():
            raise InputError(f"{directory}: is in the way, expected nothing of that name")
        own = journal_path(directory, share.number)
        try:
            directory.mkdir(exist_ok=True)
            own.touch()
        except OSError:
            refuse_finished(destination)  # the folder goes when another process has made it
            with contextlib.suppress(OSError):
                directory.rmdir()  # if nobody else was here
            raise
        refusal = f"{destination}: another process is converting to it"
        with locked(own, refusal), _removed_if_useless(directory, own, keys):
            refuse_finished(destination)  # which another process may have made just now
            if restart:
                with contextlib.ExitStack() as stack:
                    for other in set(journals(directory)) - {own}:
                        stack.enter_context(locked(other, refusal))
                    _refuse_loss(destination)  # now that nobody is at it
                    (directory / _PLAN_NAME).unlink(missing_ok=True)
            _require_plan(directory, destination, plan)
            if restart:
                said_by_all(_RESTARTED, "", LONGEST)
            workspace = Workspace(destination, share, keys, is_there)
            try:
                with named_errors(destination, directory.name):
                    yield workspace
            except InputError as error:
                if not workspace.read_records():
                    raise
                kept = "what is done is kept for when it goes on"
                raise InputError(f"{error}; {kept}") from None


@contextlib.contextmanager
def _removed_if_useless(directory: Path, own: Path, keys: Collection[str]) -> Iterator[None]:
    """Removes the folder of a conversion after the body, if there is nothing to go on with."""
    try:
        yield
    finally:
        others = set(journals(directory)) - {own}
        stand_ins = any((directory / _STAND_INS_NAME).glob("*"))
        begun = (directory / _PLAN_NAME).exists() and read_journals(directory, keys)
        if directory.exists() and not others and not begun and not stand_ins:
            shutil.rmtree(directory, ignore_errors=True)


def _refuse_loss(destination: Path) -> None:
    """Raises `InputError` if what is done cannot be done again."""
    if not (_directory_of(destination) / _CONTENT_NAME).exists():
        return  # it has its name already, or had
    if gone := sorted(path.name for path in stand_ins_of(destination).glob("*.safetensors")):
        raise InputError(
            f"{destination}: {len(gone)} shards of the source were deleted once they were "
            f"converted, such as {gone[0]}, and what was made of them is nowhere else; expected "
            "the same command as before, without --restart"
        )


def _require_plan(directory: Path, destination: Path, plan: Mapping[str, Any]) -> None:
    """Writes down what is converted, or compares it with what was written."""
    path = directory / _PLAN_NAME
    lock = directory / "lock"
    lock.touch()
    with locked(lock):  # processes that share the work may begin at the same time
        if not path.exists():  # what there is without a plan is of one that was thrown away
            _refuse_loss(destination)
            (directory / _LOOKED_NAME).unlink(missing_ok=True)
            shutil.rmtree(directory / _STAND_INS_NAME, ignore_errors=True)
            for done in journals(directory):
                os.truncate(done, 0)
            if (directory / _CONTENT_NAME).exists():
                shutil.rmtree(directory / _CONTENT_NAME)
            (directory / _CONTENT_NAME).mkdir()
            unfinished = path.with_name(f".{_PLAN_NAME}")
            unfinished.write_text(json.dumps(plan))
            sync(unfinished)
            unfinished.replace(path)
    try:
        changes = _changes(read_json(path), plan)
    except InputError as error:
        raise InputError(f"{error}; expected a plan, or --restart to begin anew") from None
    if changes:
        raise InputError(
            f"{destination}: a conversion was begun with {'; '.join(changes)}; expected the same, "
            "or --restart to begin anew"
        )


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How what was begun differs from what is wanted."""
    changes = []
    for key in wanted.keys() | found.keys():
        before, now = found.get(key), wanted.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            changes += [
                f"{key} {name} {before.get(name)!r:.80}, not {now.get(name)!r:.80}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            ]
        else:
            changes.append(f"{key} {before!r:.80}, not {now!r:.80}")
    return sorted(changes)

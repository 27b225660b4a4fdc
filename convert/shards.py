"""Doing a process's share of the shards of a conversion."""

import contextlib
import itertools
from collections.abc import Callable, Mapping

from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn

from convert.conversion import Effort, require_room
from convert.journal import Record
from convert.pipeline import Pipeline
from convert.workspace import Workspace
from glm5_jax.console import Advance, notice, progress

Work = Callable[[str, Pipeline, Advance], Record]


def do_share(
    command: str,
    workspace: Workspace,
    sizes: Mapping[str, int],
    effort: Effort,
    work: Work,
    *,
    units: str = "shards",
    growth: float = 1.0,
    freed: float = 0.0,
    prepare: Callable[[], None] = lambda: None,
    finished: Callable[[str], None] = lambda shard: None,
) -> None:
    """Does what this process is to do and has not been done, several shards at a time.

    Args:
      sizes: of all shards, in bytes, by their names.
      work: does one shard, whose record is written down then; it moves the bar by its bytes.
      units: what they are called.
      growth: bytes that are written for each one of a shard.
      freed: bytes that the disk has more for each one of a shard, when it is finished.
      prepare: is called first, if there is anything to do.
      finished: is called with a shard when its record is on the disk.

    Raises:
      InputError: the disk is too small for what is left.
    """
    own = workspace.share_of(sizes)
    left = [shard for shard in own if shard not in workspace.records]
    num_done = len(own) - len(left)
    if num_done:
        notice(f"{num_done} of {len(own)} {units} are done already")
    if left:
        at_a_time = sorted(sizes[shard] for shard in left)[-effort.num_threads :]
        needed = int(max(growth - freed, 0) * sum(sizes[shard] for shard in left))
        needed += int(min(growth, freed) * sum(at_a_time))  # before they are freed
        needed -= workspace.bytes_left_over(sizes, growth)  # which is written over
        require_room(workspace.destination, needed)
        prepare()
    counted = itertools.count(num_done + 1)
    columns = (
        TextColumn("{task.fields[done]}/" + f"{len(own)} {units}"),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    total = sum(sizes[shard] for shard in own)
    with (
        contextlib.closing(Pipeline(effort.memory, effort.num_threads)) as pipeline,
        progress(command, total, *columns, done=num_done) as advance,
    ):
        advance(total - sum(sizes[shard] for shard in left))

        def follow(shard: str) -> Callable[[], None]:
            def do() -> None:
                workspace.finish(work(shard, pipeline, advance))
                finished(shard)
                advance(0, done=next(counted))

            return do

        pipeline.run(map(follow, left), effort.num_threads)

"""One of several processes that compute on meshes over the devices of all; for the tests."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from glm5_jax.collectives import BATCH, MODEL
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.mesh import fetch
from glm5_jax.params import leaves_by_path
from glm5_jax.processes import add_processes, one_program
from glm5_jax.sharding import DECODE, TRAIN
from tests import test_sharded as sharded
from train.placing import next_batch


def compute(shape):
    """What `test_sharded` compares with one device, as arrays by name, and a text."""
    specs = sharded.partition(shape, TRAIN).specs(sharded.BLUEPRINT)
    scores, loads = sharded.on_mesh(
        sharded.predict, shape, DECODE, ([P(BATCH, None, MODEL)] * 3, P())
    )
    learnt = sharded.on_mesh(sharded.learn, shape, TRAIN, ((P(), P()), specs))
    generator = Generator(sharded.model(), sharded.partition(shape, DECODE))
    text = generator.complete(sharded.PROMPTS, 12, Sampling())
    arrays = {"scores": scores, "loads": loads, "learnt": learnt}
    return {name: fetch(array) for name, array in leaves_by_path(arrays).items()}, text


class Rows:
    """Stands for what reads data: row `r` is full of the number `r`, its segments of `-r`."""

    def next(self, size, part):
        self.read = range(size)[part]
        rows = np.repeat(np.array(self.read, np.int32)[:, None], 3, axis=1)
        return rows, -rows


def read_rows(shape):
    """The rows of a batch as the devices of all processes have them; those that are read here."""
    reader = Rows()
    batch = next_batch(reader, 16, sharded.partition(shape, TRAIN))
    return [fetch(each).tolist() for each in batch], list(reader.read)


def work(args):
    with one_program(args):
        shape = tuple(map(int, args.shape.split("x")))
        arrays, text = compute(shape)
        out = Path(args.folder) / f"{args.shape}-{jax.process_index()}"
        np.savez(out.with_suffix(".npz"), **arrays)
        out.with_suffix(".json").write_text(json.dumps([text, *read_rows(shape)]))
    return 0


if __name__ == "__main__":
    parser, commands = command_parser("worker", "Computes.")
    command = add_command(commands, "work", work, "Compute.")
    command.add_argument("shape")
    command.add_argument("folder")
    add_processes(command)
    sys.exit(run_command(parser, None))

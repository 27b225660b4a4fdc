"""Training in a process of its own, to be killed; apart from tests, which it need not import."""

import os
import sys

from tests.flags import xla_flags
from train.__main__ import main


def train_in_a_process(arguments, cache):
    """Runs the command on one device, with what XLA compiles kept in a folder."""
    import jax

    os.environ["XLA_FLAGS"] = xla_flags(1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(main(arguments))

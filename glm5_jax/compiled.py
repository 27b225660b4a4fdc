"""Where the commands keep compiled programs, so that the next one starts sooner."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_SHORTEST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_MOST_BYTES = 4 * 2**30


def keep_compiled_programs() -> None:
    """Has JAX, which must not be loaded yet, keep what it compiles in a folder of the user's.

    The environment goes first: JAX_COMPILATION_CACHE_DIR names another folder, or none if it is
    empty. Without a folder that can be written nothing is kept.
    """
    if VARIABLE in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "glm5-jax" / f"compiled-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[VARIABLE] = str(folder)
            os.environ.setdefault(_SHORTEST_SECONDS, "0.3")
            _trim(folder)


def _processor() -> str:
    """Names the instructions that the processor has: JAX does not ask what a program was made for,
    and homes are shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = f"{platform.machine()} {platform.processor()} {flags}"
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _trim(folder: Path) -> None:
    """Removes the programs that were not used for longest, if there are too many."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another command may be doing the same
            stat = path.stat()
            files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    size = sum(num_bytes for _, num_bytes, _ in files)
    for _, num_bytes, path in sorted(files):
        if size <= _MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        size -= num_bytes

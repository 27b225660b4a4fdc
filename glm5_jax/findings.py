"""What is found on one machine: versions, accelerators, memory, disks."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from glm5_jax.compiled import VARIABLE

Level = Literal["ok", "note", "problem"]

PACKAGES = (
    "glm5-jax",
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "orbax-checkpoint", "safetensors", "numpy"),
)
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_GIB = 2**30
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*?\])?\s*([^;\s]*)\s*(?:;\s*extra == [\"'](.*)[\"'])?")


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""  # what to do about it
    process: int = 0


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines; what to do stands below what was found."""
    width = max(len(each.name) for each in findings)
    lines = []
    for each in findings:
        where = f"process {each.process}: " if each.process else ""
        lines.append(f"{each.level:7}  {each.name:{width}}  {where}{each.found}")
        if each.advice:
            lines.append(f"{'':7}  {'':{width}}  -> {each.advice}")
    count = sum(each.level == "problem" for each in findings)
    return "\n".join([*lines, f"{count} problem{'s' if count != 1 else ''}"])


def installed_versions() -> dict[str, str]:
    """The versions of the packages that matter, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_versions(installed: dict[str, str]) -> Iterator[Finding]:
    """Python and packages, against what this package and jax demand."""
    yield Finding("python", "ok", sys.version.split()[0])
    if "glm5-jax" not in installed:
        advice = "pip install '.', so that it is known what versions are needed"
        yield Finding("glm5-jax", "note", "not installed", advice)
    wanted = {"jax": _demands("jax"), "glm5-jax": _demands("glm5-jax")}
    for package in PACKAGES:
        if package not in installed:
            if package not in (*_PLUGINS, "glm5-jax"):
                yield Finding(package, "problem", "not installed", "pip install '.'")
            continue
        have = installed[package]
        unmet = [
            f"{who} needs {clause}"
            for who, demands in wanted.items()
            for clause in demands.get(package, ())
            if not satisfies(have, clause)
        ]
        if unmet:
            extra = {"libtpu": "[tpu]"}.get(package, "[cuda]" if package in _PLUGINS else "")
            advice = f"pip install --upgrade '.{extra}', which installs versions that fit"
            yield Finding(package, "problem", f"{have}, but {' and '.join(unmet)}", advice)
        else:
            yield Finding(package, "ok", have)


def _demands(package: str) -> dict[str, list[str]]:
    """The version clauses that an installed package has for the others."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:  # run from a checkout
        return {}
    demands: dict[str, list[str]] = {}
    for line in lines:
        match = _REQUIREMENT.fullmatch(line)
        if match and match[2] and (match[3] is None or match[1] in _PLUGINS):
            demands.setdefault(match[1], []).extend(match[2].split(","))
    return demands


def satisfies(have: str, clause: str) -> bool:
    """Whether a version meets one clause: >=, <=, ==, with * at the end, <, > or !=."""
    match = re.fullmatch(r"(>=|<=|==|!=|<|>)([\d.]+?)(\.\*)?", clause)
    if match is None:
        return True
    operator, text, prefix = match.groups()
    release = re.match(r"[\d.]*\d", have)
    ours = [int(part) for part in (release[0] if release else "0").split(".")]
    wanted = [int(part) for part in text.split(".")]
    if prefix:
        ours = ours[: len(wanted)]
    length = max(len(ours), len(wanted))
    ours, wanted = ([*parts, *[0] * (length - len(parts))] for parts in (ours, wanted))
    return {
        ">=": ours >= wanted,
        "<=": ours <= wanted,
        "==": ours == wanted,
        "!=": ours != wanted,
        "<": ours < wanted,
        ">": ours > wanted,
    }[operator]


def check_accelerators() -> Iterator[Finding]:
    """Whether JAX uses the accelerators that the machine has."""
    backend = jax.default_backend()
    yield Finding("backend", "ok", backend)
    for variable in ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        if os.environ.get(variable):
            yield Finding(variable, "ok", os.environ[variable])
    installed = installed_versions()
    for kind, present, plugins, extra in (
        ("gpu", _has_nvidia_gpu(), ("jax-cuda12-plugin", "jax-cuda13-plugin"), "cuda"),
        ("tpu", _has_tpu(), ("libtpu",), "tpu"),
    ):
        plugin = next((name for name in plugins if name in installed), None)
        if backend == kind:
            continue
        if present and os.environ.get("JAX_PLATFORMS", kind).find(kind) < 0:
            what = f"there is one, and JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} leaves it out"
            yield Finding(kind, "note", what, f"unset JAX_PLATFORMS to compute on the {kind}")
        elif present and plugin is None:
            what = f"there is one, and JAX runs on {backend} without a plugin for it"
            yield Finding(kind, "problem", what, f"pip install '.[{extra}]'")
        elif present:
            what = f"there is one, and JAX runs on {backend} although {plugin} is installed"
            advice = (
                f"look at the reason: JAX_PLATFORMS={kind} python -c 'import jax; jax.devices()'"
            )
            yield Finding(kind, "problem", what, advice)
        elif plugin is not None:
            yield Finding(kind, "ok", f"none here; {plugin} is installed, enough to plan for one")


def _has_nvidia_gpu() -> bool:
    gpus = Path("/proc/driver/nvidia/gpus")
    return gpus.is_dir() and any(gpus.iterdir())


def _has_tpu() -> bool:
    # jax looks for TPUs on the PCI bus when it is imported, and notes here that there is none.
    return "TPU_SKIP_MDS_QUERY" not in os.environ


def check_machine() -> Iterator[Finding]:
    """Memory, disks and the compilation cache of this machine."""
    yield _check_memory()
    for name, folder in (
        ("working directory", Path.cwd()),
        ("temporary files", tempfile.gettempdir()),
    ):
        free = shutil.disk_usage(folder).free / _GIB
        found = f"{folder}, {free:,.1f} GiB free"
        if not os.access(folder, os.W_OK):
            yield Finding(name, "note", f"{folder} cannot be written", "write to another folder")
        elif free < 5:
            yield Finding(name, "note", found, "free some space: checkpoints are large")
        else:
            yield Finding(name, "ok", found)
    cache = jax.config.values["jax_compilation_cache_dir"]
    if not cache:
        advice = f"set {VARIABLE} to a folder: the next start compiles nothing again"
        yield Finding("compilation cache", "note", "none", advice)
    elif "://" not in cache and Path(cache).exists() and not os.access(cache, os.W_OK):
        advice = f"set {VARIABLE} to a folder of your own"
        yield Finding("compilation cache", "problem", f"{cache} cannot be written", advice)
    else:
        yield Finding("compilation cache", "ok", cache)


def _check_memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    found = f"{pages:,.1f} GiB"
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return Finding("host memory", "ok", found)
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    found += f", {available:,.1f} GiB available"
    if available < 2:
        return Finding("host memory", "note", found, "end what else is running, or weights swap")
    return Finding("host memory", "ok", found)

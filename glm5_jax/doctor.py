"""What may keep a model from running on this machine, or on several together."""

import functools
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm5_jax.collectives import MESH_AXES, total
from glm5_jax.coordination import end_at_exit, said_by_all, within
from glm5_jax.findings import (
    PACKAGES,
    Finding,
    check_accelerators,
    check_machine,
    check_versions,
    installed_versions,
)
from glm5_jax.mesh import fetch, format_mesh, make_mesh


def diagnose(sizes: dict[str, int], seconds: float) -> list[Finding]:
    """All findings, the same in every process.

    Args:
      sizes: of the mesh whose axes are tried.
      seconds: how long processes wait for each other, and collectives for all devices.

    Raises:
      InputError: another process did not get here.
    """
    here = [*check_versions(installed_versions()), *check_accelerators(), *check_machine()]
    said = said_by_all("doctor", json.dumps([socket.gethostname(), here]), seconds)
    everywhere = [
        (host, [Finding(*each) for each in found]) for host, found in map(json.loads, said)
    ]
    findings = [*everywhere[0][1]]
    for process, (_, found) in enumerate(everywhere[1:], start=1):
        findings += [
            each._replace(process=process)
            for each in found
            if each.level != "ok" and each not in everywhere[0][1]
        ]
    findings += compare_processes([host for host, _ in everywhere], [f for _, f in everywhere])
    findings += check_devices()
    return [*findings, *check_collectives(sizes, seconds)]


def compare_processes(hosts: Sequence[str], found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Whether all processes have the same versions."""
    if len(hosts) == 1:
        return [Finding("processes", "ok", f"1, on {hosts[0]}")]
    names = ", ".join(dict.fromkeys(hosts))
    findings = [Finding("processes", "ok", f"{len(hosts)}, on {names:.200}")]
    compared = {"python", "backend", *PACKAGES}
    versions = [{each.name: each.found for each in of if each.name in compared} for of in found]
    for name in sorted({name for of in versions for name in of}):
        by_version: dict[str, list[str]] = {}
        for process, of in enumerate(versions):
            by_version.setdefault(of.get(name, "missing"), []).append(str(process))
        if len(by_version) > 1:
            what = "; ".join(f"{v} in process {', '.join(who)}" for v, who in by_version.items())
            advice = "install the same on all machines: programs compiled apart may not fit"
            findings.append(Finding(f"same {name}", "problem", what, advice))
    if len(findings) == 1:
        findings.append(Finding("same versions", "ok", f"in all {len(hosts)} processes"))
    return findings


def check_devices() -> Iterator[Finding]:
    """The devices of all processes, and the memory of this one's."""
    devices = jax.devices()
    kinds = " and ".join(sorted({device.device_kind for device in devices}))
    counts = [
        sum(device.process_index == process for device in devices)
        for process in range(jax.process_count())
    ]
    found = f"{len(devices)} x {kinds}"
    if len(set(counts)) > 1:
        what = f"{found}, of the processes in order {', '.join(map(str, counts))}"
        yield Finding("devices", "problem", what, "give every process as many devices")
    else:
        per_process = f", {counts[0]} per process" if len(counts) > 1 else ""
        yield Finding("devices", "ok", found + per_process)
    stats = [stat for device in jax.local_devices() if (stat := device.memory_stats())]
    if stats and all({"bytes_limit", "bytes_in_use"} <= stat.keys() for stat in stats):
        limit = min(stat["bytes_limit"] for stat in stats) / 2**30
        used = max(stat["bytes_in_use"] for stat in stats) / 2**30
        found = f"{limit:,.1f} GiB each for this program, {used:,.1f} GiB in use"
        yield Finding("device memory", "ok", found)


def check_collectives(sizes: dict[str, int], seconds: float) -> Iterator[Finding]:
    """A sum over every axis of the mesh, compared with what it must be."""
    mesh = make_mesh(sizes)
    for axis in MESH_AXES:
        name = f"sum over {axis}"
        results: list[tuple[float, np.ndarray]] = []
        attempt = functools.partial(_sum_over, axis, mesh, results)
        advice = (
            f"look at the links between the devices along {axis} of --mesh {format_mesh(sizes)}"
        )
        try:
            ended = within(seconds, attempt)
        except jax.errors.JaxRuntimeError as error:
            yield Finding(name, "problem", " ".join(str(error).split())[:300], advice)
            continue
        if not ended:
            end_at_exit(1)
            yield Finding(name, "problem", f"did not end within {seconds:g} s", advice)
            return  # the devices are stuck
        duration, sums = results[0]
        yield compare_sums(name, sums, axis, duration, advice)


def _sum_over(axis: str, mesh: Mesh, results: list[tuple[float, np.ndarray]]) -> None:
    """Sums the devices' numbers over an axis, and adds the seconds that took and the sums."""
    spec = PartitionSpec(*MESH_AXES)
    each = np.arange(mesh.size, dtype=np.int32).reshape(mesh.devices.shape)
    numbers = jax.make_array_from_callback(
        each.shape, NamedSharding(mesh, spec), lambda part: each[part]
    )

    def add(number: jax.Array) -> Any:
        return jax.lax.pcast(total(number, (axis,)), (axis,), to="varying")

    function = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=spec))
    jax.block_until_ready(function(numbers))
    start = time.perf_counter()
    sums = jax.block_until_ready(function(numbers))
    results.append((time.perf_counter() - start, fetch(sums)))


def compare_sums(name: str, sums: np.ndarray, axis: str, duration: float, advice: str) -> Finding:
    """Compares sums, one per device, with what they must be."""
    numbers = np.arange(sums.size).reshape(sums.shape)
    expected = numbers.sum(MESH_AXES.index(axis), keepdims=True)
    wrong = numbers[sums != expected]
    if wrong.size:
        devices = ", ".join(map(str, wrong[:8]))
        return Finding(name, "problem", f"wrong on device {devices} of the mesh", advice)
    size = sums.shape[MESH_AXES.index(axis)]
    return Finding(name, "ok", f"{size} devices, {duration * 1000:.2f} ms")

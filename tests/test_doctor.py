import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from glm5_jax import doctor, findings
from glm5_jax.commands import doctor as command
from glm5_jax.console import command_parser, run_command
from glm5_jax.findings import Finding, check_versions, format_findings, satisfies

PROGRAM = """
import sys
from glm5_jax.commands import doctor
from glm5_jax.console import command_parser, run_command
parser, commands = command_parser("glm5", "Runs GLM-5 models.")
doctor.add(commands)
sys.exit(run_command(parser, None))
"""


def glm5(*arguments):
    parser, commands = command_parser("glm5", "Runs GLM-5 models.")
    command.add(commands)
    return run_command(parser, arguments)


@contextlib.contextmanager
def start(number, port, *arguments):
    flags = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "http_proxy": "http://proxy.invalid:1",  # must not matter
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "doctor", *flags, "--process-id", number, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def levels(report):
    return {each["name"]: each["level"] for each in report["findings"]}


def test_this_machine_is_well(capsys):
    assert glm5("doctor", "--mesh", "data=2,expert=2,model=2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == 0
    found = {each["name"]: each["found"] for each in report["findings"]}
    assert found["devices"] == "8 x cpu" and found["backend"] == "cpu"
    for axis in ("data", "expert", "model"):
        assert found[f"sum over {axis}"].startswith("2 devices")
    assert all(bool(each["advice"]) == (each["level"] != "ok") for each in report["findings"])


def test_all_devices_are_tried_by_default(capsys):
    assert glm5("doctor") == 0
    output = capsys.readouterr().out
    assert "8 devices" in output and output.endswith("0 problems\n")


def test_a_mesh_for_other_devices_is_refused(capsys):
    assert glm5("doctor", "--mesh", "data=3") == 2
    assert "expected 8" in capsys.readouterr().err


def test_a_version_that_does_not_fit_is_a_problem(monkeypatch, capsys):
    installed = findings.installed_versions() | {"jaxlib": "0.1.0"}
    monkeypatch.setattr(doctor, "installed_versions", lambda: installed)
    assert glm5("doctor", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == 1 and levels(report)["jaxlib"] == "problem"
    assert glm5("doctor") == 1
    assert "0.1.0, but jax needs" in capsys.readouterr().out


def test_packages_are_held_to_what_asks_for_them(monkeypatch):
    lines = {
        "jax": ["jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"', "numpy>=2.0"],
        "glm5-jax": ["jax>=0.10.2", "flax>=0.12.8", 'torch==2.0; extra == "parity"'],
    }
    monkeypatch.setattr(findings, "requires", lines.__getitem__)
    installed = dict.fromkeys(findings.PACKAGES, "1.0") | {
        "jax": "0.10.1",
        "jaxlib": "0.10.3",
        "libtpu": "0.0.43",
        "numpy": "2.4",
    }
    problems = [each for each in check_versions(installed) if each.level == "problem"]
    assert {each.name: each.found for each in problems} == {
        "jax": "0.10.1, but glm5-jax needs >=0.10.2",
        "jaxlib": "0.10.3, but jax needs <=0.10.2",
        "libtpu": "0.0.43, but jax needs ==0.0.42.*",
    }
    del installed["flax"], installed["libtpu"], installed["jax-cuda12-plugin"]
    missing = {each.name for each in check_versions(installed) if each.found == "not installed"}
    assert missing == {"flax"}


@pytest.mark.parametrize(
    ("have", "clause", "expected"),
    [
        ("0.10.2", ">=0.10.2", True),
        ("0.9.9", ">=0.10", False),
        ("0.10.2.dev3+local", ">=0.10.2", True),
        ("0.12.0.1", "<=0.12.0.1", True),
        ("0.12.0.1", "<=0.12.0", False),
        ("1.0", "==1.0.0", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.43", "==0.0.42.*", False),
        ("2.0", "!=2.0", False),
        ("2.0", "<2.0", False),
        ("2.1", ">2.0", True),
    ],
)
def test_versions_are_compared_by_number(have, clause, expected):
    assert satisfies(have, clause) == expected


def accelerators(monkeypatch, gpu=False, tpu=False, installed=(), platforms=None):
    monkeypatch.setattr(findings, "_has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(findings, "_has_tpu", lambda: tpu)
    monkeypatch.setattr(findings, "installed_versions", lambda: dict.fromkeys(installed, "1"))
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    found = findings.check_accelerators()
    return {each.name: each for each in found if each.name in ("gpu", "tpu")}


def test_an_accelerator_that_is_not_used_is_reported(monkeypatch):
    found = accelerators(monkeypatch, gpu=True)
    assert found["gpu"].level == "problem" and "'.[cuda]'" in found["gpu"].advice
    found = accelerators(monkeypatch, gpu=True, installed=["jax-cuda13-plugin"])
    assert found["gpu"].level == "problem" and "jax-cuda13-plugin" in found["gpu"].found
    found = accelerators(monkeypatch, tpu=True, installed=["libtpu"], platforms="cpu")
    assert found["tpu"].level == "note" and "unset JAX_PLATFORMS" in found["tpu"].advice
    found = accelerators(monkeypatch, installed=["libtpu"])
    assert found["tpu"].level == "ok" and "plan" in found["tpu"].found
    assert accelerators(monkeypatch) == {}


def test_processes_with_other_versions_are_named():
    ours = [
        Finding("jax", "ok", "1.0"),
        Finding("backend", "ok", "gpu"),
        Finding("disk", "ok", "5"),
    ]
    theirs = [Finding("jax", "ok", "1.1"), Finding("backend", "ok", "gpu")]
    found = doctor.compare_processes(["a", "b", "b"], [ours, theirs, theirs])
    assert [each.name for each in found] == ["processes", "same jax"]
    assert found[1].level == "problem" and found[1].found == "1.0 in process 0; 1.1 in process 1, 2"


def test_a_wrong_sum_names_its_devices():
    sums = np.broadcast_to(np.arange(8).reshape(2, 2, 2).sum(1, keepdims=True), (2, 2, 2)).copy()
    assert doctor.compare_sums("sum", sums, "expert", 0.002, "").found == "2 devices, 2.00 ms"
    sums[1, 0, 1] += 1
    wrong = doctor.compare_sums("sum", sums, "expert", 0.002, "look")
    assert wrong.level == "problem" and "device 5 of the mesh" in wrong.found


def test_advice_stands_below_its_finding():
    lines = format_findings(
        [Finding("a", "ok", "1"), Finding("longer", "problem", "2", "do", process=3)]
    ).splitlines()
    assert lines == [
        "ok       a       1",
        "problem  longer  process 3: 2",
        "                 -> do",
        "1 problem",
    ]


def test_two_processes_try_all_axes_and_one_prints(port):
    flags = ("--mesh", "data=2,expert=2,model=2", "--json", "--start-timeout", "60")
    with start("0", port, *flags) as first, start("1", port, *flags) as second:
        output, error = first.communicate(timeout=60)
        assert second.communicate(timeout=60) == ("", "")
    assert (first.returncode, second.returncode, error) == (0, 0, "")
    report = json.loads(output)
    found = {each["name"]: each["found"] for each in report["findings"]}
    assert found["devices"] == "8 x cpu, 4 per process"
    assert found["same versions"] == "in all 2 processes"
    for axis in ("data", "expert", "model"):
        assert levels(report)[f"sum over {axis}"] == "ok"


def test_a_process_that_never_comes_is_named(port):
    began = time.monotonic()
    with start("0", port, "--start-timeout", "1") as first:
        output, error = first.communicate(timeout=30)
    assert time.monotonic() - began < 20
    assert first.returncode == 2 and output == ""
    assert error.startswith("glm5: error: process 0 of 2 waited") and error.count("\n") == 1
    assert "did not come: process 1" in error

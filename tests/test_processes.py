import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest

from glm5_jax.cluster import find_cluster, read_member
from glm5_jax.console import Parser
from glm5_jax.coordination import said_by_all, within
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, is_first, one_program, only_first_prints
from glm5_jax.rendezvous import Member, meet

CLUSTER_VARIABLES = ("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM", "OMPI", "TPU_W")

# Three processes of one program; what `how` says happens to the chosen one.
PROGRAM = """
import os, signal, sys, time
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.coordination import said_by_all
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, one_program

def work(args):
    with one_program(args):
        print("printed")
        if args.process_id == args.who:
            match args.how:
                case "input":
                    raise InputError("the file is bad")
                case "defect":
                    raise RuntimeError("a defect")
                case "signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "late":
                    time.sleep(4)
        if args.how == "late":
            said_by_all("lunch", "soup", 1)
        elif args.how != "well":
            time.sleep(60)
        assert said_by_all("names", args.process_id, 10) == ["0", "1", "2"]
    return 3

parser, commands = command_parser("tool", "Works.")
command = add_command(commands, "work", work, "Work.")
command.add_argument("--who")
command.add_argument("--how")
add_processes(command)
sys.exit(run_command(parser, None))
"""


def arguments(*given):
    parser = Parser(prog="tool")
    add_processes(parser)
    return parser.parse_args(given)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_three(how, who="1"):
    """Exit status, output and errors of three processes, in order."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["http_proxy"] = "http://proxy.invalid:1"  # must not matter
    coordinator = f"127.0.0.1:{free_port()}"
    flags = ["work", "--how", how, "--who", who, "--coordinator", coordinator]
    flags += ["--num-processes", "3", "--start-timeout", "60", "--process-id"]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *flags, str(number)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            for number in range(3)
        ]
        outputs = [process.communicate(timeout=50) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, outputs, strict=True)]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for variable in list(os.environ):
        if variable.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(variable)


def test_without_arguments_there_is_one_process(capsys):
    assert read_member(arguments()) == (None, 300)
    assert find_cluster() is None
    with one_program(arguments()), only_first_prints():
        print("printed")
    assert capsys.readouterr().out == "printed\n"
    assert is_first() and said_by_all("anything", "text", 1) == ["text"]


def test_one_process_of_one_needs_no_coordinator():
    with one_program(
        arguments("--coordinator", "nowhere:1", "--num-processes", "1", "--process-id", "0")
    ):
        assert is_first()


def test_the_environment_stands_for_arguments(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    member, seconds = read_member(arguments("--process-id", "3", "--start-timeout", "7"))
    assert member == Member("::1", 1234, 4, 3) and seconds == 7
    assert member.address == "[::1]:1234"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--process-id": None}, "--coordinator and --num-processes without --process-id"),
        ({"--coordinator": None}, "--num-processes and --process-id without --coordinator"),
        ({"--coordinator": "host"}, "--coordinator is 'host', expected HOST:PORT"),
        ({"--coordinator": ":12"}, "--coordinator is ':12', expected HOST:PORT"),
        ({"--coordinator": "host:99999"}, "expected HOST:PORT with a port from 1 to 65535"),
        ({"--num-processes": "0"}, "--num-processes is '0', expected an integer from 1"),
        ({"--process-id": "2"}, "--process-id is '2', expected an integer from 0 to 1"),
        ({"--process-id": "-1"}, "--process-id is '-1', expected an integer from 0 to 1"),
        ({"--start-timeout": "soon"}, "--start-timeout is 'soon', expected an integer"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    flags = {"--coordinator": "host:12", "--num-processes": "2", "--process-id": "1"} | changed
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    with pytest.raises(InputError, match=message.replace("(", "[(]")):
        read_member(arguments(*given))


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'first'"):
        read_member(arguments("--coordinator", "host:12", "--num-processes", "2"))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        (SLURM | {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}, "Slurm"),
        (SLURM | {"SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # sbatch, no srun
        (SLURM | {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU workers"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_clusters_of_several_processes_are_recognised(monkeypatch, variables, cluster):
    monkeypatch.delenv("JAX_PLATFORMS")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert find_cluster() == cluster


@pytest.mark.parametrize(("workers", "cluster"), [("a,b", "a TPU pod slice"), ("a", None)])
def test_a_tpu_vm_is_asked_for_its_workers(monkeypatch, workers, cluster):
    for variable in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("glm5_jax.cluster.find_spec", lambda name: name)
    monkeypatch.setattr("glm5_jax.cluster._tpu_endpoints", lambda: workers)
    assert find_cluster() == cluster


def test_the_cluster_completes_an_address(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:12")
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS without --num-processes"):
        read_member(arguments())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert read_member(arguments())[0] is None


def gather(*members, seconds=2):
    """What `meet` says to each of them; the last one waits in this thread."""
    errors = [None] * len(members)

    def attempt(position):
        try:
            meet(members[position], seconds)
        except InputError as error:
            errors[position] = str(error)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_that_all_come_go_on():
    port = free_port()
    assert gather(*(Member("localhost", port, 3, number) for number in (2, 0, 1))) == [None] * 3


def test_everybody_learns_who_did_not_come():
    port = free_port()
    for error in gather(*(Member("127.0.0.1", port, 4, number) for number in (0, 2)), seconds=1):
        assert f"waited at 127.0.0.1:{port} up to 1 s: did not come: process 1, 3;" in error


def test_a_missing_coordinator_is_named():
    port = free_port()
    with pytest.raises(InputError, match=f"process 1 of 2 waited at 127.0.0.1:{port} up to 1 s"):
        meet(Member("127.0.0.1", port, 2, 1), 1)


def test_a_number_given_twice_is_found():
    port = free_port()
    errors = gather(*(Member("127.0.0.1", port, 3, number) for number in (0, 1, 1)))
    assert "two processes 1" in errors[0]
    assert any("two processes 1" in error for error in errors[1:])


def test_different_numbers_of_processes_are_found():
    port = free_port()
    for error in gather(Member("127.0.0.1", port, 2, 0), Member("127.0.0.1", port, 3, 1)):
        assert "process 1" in error and "is one of 3" in error and "one of 2" in error


def test_a_second_process_0_is_found():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 of 2 cannot listen on port {port}"):
            meet(Member("127.0.0.1", port, 2, 0), 1)


def test_strangers_are_not_taken_for_processes():
    port = free_port()
    first = threading.Thread(target=meet, args=(Member("127.0.0.1", port, 2, 0), 10))
    first.start()
    for nonsense in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b'{"process": 1}\n',
        b'{"process": 1, "of": 2}\n',
        b'{"fault": 1}\n',
        b'{"fault": 1, "process": 1}\n',
        b'{"process": [1], "of": 2, "host": "x"}\n',
        b'{"process": 2, "of": 2, "host": "x"}\n',
        b"[" * 4095 + b"\n",
        b"",
    ):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port)) as stranger,
        ):
            stranger.sendall(nonsense)
    meet(Member("127.0.0.1", port, 2, 1), 10)
    first.join()


def test_what_takes_too_long_is_left_alone():
    assert within(10, lambda: None)
    release = threading.Event()
    assert not within(0.05, lambda: release.wait() and None)
    release.set()
    with pytest.raises(InputError, match="inside"):
        within(10, lambda: (_ for _ in ()).throw(InputError("inside")))


def test_three_processes_print_once_and_end_alike():
    results = run_three("well")
    assert [status for status, _, _ in results] == [3, 3, 3], results
    assert [output for _, output, _ in results] == ["printed\n", "", ""]


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_failing_process_ends_the_others(who):
    results = run_three("input", who)
    assert [status for status, _, _ in results] == [2, 2, 2], results
    assert results[int(who)][2] == f"tool: error: process {who} of 3: the file is bad\n"
    ended = f"process 2 of 3: ended, because process {who} failed: the file is bad\n"
    assert results[2][2] == ended


@pytest.mark.parametrize(
    ("how", "status", "said"), [("defect", 1, "RuntimeError: a defect"), ("signal", 143, "SIGTERM")]
)
def test_defects_and_signals_end_the_others(how, status, said):
    results = run_three(how)
    assert [status for status, _, _ in results] == [2, status, 2], results
    assert all(said in results[number][2] for number in (0, 2))
    assert ("Traceback" in results[1][2]) == (how == "defect")


def test_a_process_that_does_not_get_there_is_named():
    results = run_three("late", "2")
    assert [status for status, _, _ in results] == [2, 2, 2], results
    errors = [error for _, _, error in results]
    assert any("waited 1 s at 'lunch' for process 2, expected all 3" in error for error in errors)
    assert not any("Traceback" in error for error in errors)

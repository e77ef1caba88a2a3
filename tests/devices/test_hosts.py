"""Which processes the environment announces, and a process alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import announcements

from cogi2v_jax.devices import hosts

ANNOUNCING = ("COGI2V_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_")
BY_HAND = {"COGI2V_COORDINATOR": "node-1:8476", "COGI2V_PROCESSES": "4", "COGI2V_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "65539",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables given, and no others that could announce anything."""
    for name in os.environ:
        if name.startswith(ANNOUNCING):
            monkeypatch.delenv(name)
    monkeypatch.setattr(hosts, "_metadata", lambda key: pytest.fail("the network was asked"))
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_processes_are_announced_by_hand_whatever_a_cluster_says(announce) -> None:
    announce(BY_HAND | SLURM)
    assert hosts.announced() == {
        "coordinator_address": "node-1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


def test_an_ipv6_coordinator_stands_in_brackets(announce) -> None:
    announce(BY_HAND | {"COGI2V_COORDINATOR": "[fe80::1]:80"})
    assert hosts.announced()["coordinator_address"] == "[fe80::1]:80"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"COGI2V_PROCESS": ""},
            "COGI2V_COORDINATOR, COGI2V_PROCESSES, COGI2V_PROCESS must be set together: got only ",
        ),
        ({"COGI2V_PROCESS": "4"}, "COGI2V_PROCESS must be a number from 0 to 3: got '4'"),
        ({"COGI2V_PROCESS": "-1"}, "COGI2V_PROCESS must be a number from 0 to 3: got '-1'"),
        ({"COGI2V_PROCESSES": "0"}, "COGI2V_PROCESSES must be a number from 1: got '0'"),
        ({"COGI2V_PROCESSES": "four"}, "COGI2V_PROCESSES must be a number from 1: got 'four'"),
        ({"COGI2V_COORDINATOR": "node-1"}, "COGI2V_COORDINATOR must be HOST:PORT: got 'node-1'"),
        ({"COGI2V_COORDINATOR": ":8476"}, "COGI2V_COORDINATOR must be HOST:PORT: got ':8476'"),
        (
            {"COGI2V_COORDINATOR": "node-1:65536"},
            "COGI2V_COORDINATOR must be HOST:PORT: got 'node-1:65536'",
        ),
    ],
)
def test_a_wrong_variable_is_an_error_of_one_line(
    announce, changes: dict[str, str], line: str
) -> None:
    announce(BY_HAND | changes)
    with pytest.raises(ValueError, match=r"^COGI2V_") as caught:
        hosts.announced()
    assert str(caught.value).startswith(line)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("variables", [SLURM, OPEN_MPI])
def test_a_cluster_without_tpus_is_left_to_jax(announce, variables: dict[str, str]) -> None:
    announce(variables)
    assert hosts.announced() == {}


def test_an_indexed_job_of_kubernetes_is_left_to_jax(announce, monkeypatch) -> None:
    announce(KUBERNETES)
    assert hosts.announced() is None  # jax could not ask it: no package `kubernetes` is installed
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "kubernetes")
    assert hosts.announced() == {}


@pytest.mark.parametrize(
    "variables",
    [
        {"TPU_WORKER_HOSTNAMES": "localhost,t1k-w-1", "TPU_WORKER_ID": "1"},
        {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_a_pod_announces_its_workers_on_machines_with_tpus(
    announce, monkeypatch, variables: dict[str, str]
) -> None:
    announce(variables)
    assert hosts.announced() is None
    monkeypatch.setattr(hosts, "has_tpu", lambda: True)
    assert hosts.announced() == {}


@pytest.mark.parametrize(
    ("endpoints", "expected"), [("a:b:10.0.0.1,a:b:10.0.0.2", {}), ("a:b:10.0.0.1", None)]
)
def test_a_pod_without_variables_is_known_by_its_metadata(
    announce, monkeypatch, endpoints: str, expected: dict | None
) -> None:
    announce({})
    monkeypatch.setattr(hosts, "has_tpu", lambda: True)
    monkeypatch.setattr(hosts, "_metadata", {"worker-network-endpoints": endpoints}.get)
    assert hosts.announced() == expected
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert hosts.announced() is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"COGI2V_PROCESSES": "1"} | SLURM,
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_is_alone_and_the_network_is_not_asked(
    announce, monkeypatch, variables: dict[str, str]
) -> None:
    announce(variables)
    assert hosts.announced() is None
    if any(name.startswith("TPU_") for name in variables):
        monkeypatch.setattr(hosts, "has_tpu", lambda: True)
        assert hosts.announced() is None


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "cannot join the other processes: coordinator_address should be defined.; ",
        ),
        (
            SLURM | {"SLURM_PROCID": "second"},
            "cannot join the other processes: invalid literal for int() with base 10: 'second'; ",
        ),
    ],
)
def test_a_cluster_that_jax_cannot_number_is_an_error_of_one_line(
    variables: dict[str, str], line: str, tmp_path: Path
) -> None:
    done = alone("hosts.join()", tmp_path, variables)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"OSError: {line}")
    assert last.endswith(
        "set COGI2V_COORDINATOR, COGI2V_PROCESSES, COGI2V_PROCESS, "
        "or COGI2V_PROCESSES=1 to run alone"
    )


def test_metadata_that_nobody_serves_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    assert hosts._metadata("worker-network-endpoints") == ""


def test_a_container_has_no_more_memory_than_it_was_given(tmp_path, monkeypatch) -> None:
    given = tmp_path / "memory.max"
    monkeypatch.setattr(hosts, "MEMORY_MAX", given)
    host = hosts.host_memory()
    given.write_text(f"{2**30}\n")
    assert hosts.host_memory() == 2**30
    given.write_text("max\n")
    assert hosts.host_memory() == host


def alone(lines: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """One process of Python, in an environment that announces no more than `variables`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ANNOUNCING)
    }
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from cogi2v_jax.devices import hosts; {lines}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | variables,
    )


def test_joining_alone_does_not_import_jax(tmp_path: Path) -> None:
    lines = "hosts.join(); assert hosts.leads(); sys.exit('jax' in sys.modules)"
    done = alone(lines, tmp_path, {})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_program_that_runs_alone_is_not_changed() -> None:
    @hosts.distributed
    def program(code: int) -> int:
        """A program."""
        if code < 0:
            raise KeyError(code)
        return code

    assert program.__doc__ == "A program."
    assert [program(0), program(code=3)] == [0, 3]
    with pytest.raises(KeyError):
        program(-1)


JOINED = "hosts._joined = True"  # without a service, whose shutdown then does nothing


@pytest.mark.parametrize(
    ("ending", "code", "err"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no image')", 1, "no image\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_a_program_that_joined_ends_as_python_would_end_it(
    ending: str, code: int, err: str, tmp_path: Path
) -> None:
    lines = f"{JOINED}\n@hosts.distributed\ndef main(): {ending}\nsys.exit(main())"
    done = alone(lines, tmp_path, {})
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


def test_a_shutdown_that_fails_is_one_line(tmp_path: Path) -> None:
    lines = f"""{JOINED}
import jax

def broken():
    raise RuntimeError("the service is gone\\nand more")

jax.distributed.shutdown = broken
sys.exit(hosts.distributed(lambda: 0)())"""
    done = alone(lines, tmp_path, {})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "cannot end with the other processes: the service is gone\n"


def test_processes_that_do_not_all_start_are_one_line(tmp_path: Path) -> None:
    done = alone("hosts.join(arrival=2)", tmp_path, announcements(2)[0])
    ways = "set COGI2V_COORDINATOR, COGI2V_PROCESSES, COGI2V_PROCESS, or COGI2V_PROCESSES=1"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "cogi2v: cannot join the other processes: not all of them have started within 2 s; "
        f"{ways} to run alone\n"
    )


def test_devices_that_do_not_start_are_no_failure_to_join(tmp_path: Path) -> None:
    lines = """
import jax

def broken():
    raise RuntimeError("the devices are busy")

jax.distributed.initialize, jax.process_index = lambda **_: None, broken
try:
    hosts.join()
except RuntimeError as error:
    print(error, hosts._joined)"""
    done = alone(lines, tmp_path, BY_HAND)
    assert (done.stdout, done.stderr) == ("the devices are busy True\n", "")

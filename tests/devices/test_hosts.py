"""What the environment announces, and a process alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogi2v_jax.devices import hosts
from cogi2v_jax.devices.hosts import Seat

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
POD = {"TPU_WORKER_HOSTNAMES": "localhost,t1k-w-1", "TPU_WORKER_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables given, and no others that could announce anything."""
    for name in os.environ:
        if name.startswith(
            ("COGI2V_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(hosts, "_metadata", lambda key: pytest.fail("the network was asked"))
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_processes_are_announced_by_hand(announce) -> None:
    announce(BY_HAND | SLURM)
    assert hosts.announced() == Seat("node-1", 8476, 4, 3)


def test_an_ipv6_coordinator_stands_in_brackets(announce) -> None:
    announce(BY_HAND | {"COGI2V_COORDINATOR": "[fe80::1]:80"})
    assert hosts.announced() == Seat("fe80::1", 80, 4, 3)


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
def test_what_is_announced_wrongly_is_one_line(
    announce, changes: dict[str, str], line: str
) -> None:
    announce(BY_HAND | changes)
    with pytest.raises(ValueError, match=r"^COGI2V_") as caught:
        hosts.announced()
    assert str(caught.value).startswith(line)
    assert len(str(caught.value).splitlines()) == 1


def test_slurm_announces_a_process_a_device(announce) -> None:
    announce(SLURM)
    seat = hosts.announced()
    assert seat == Seat("node001", seat.port, 8, 5, [1])


def test_open_mpi_announces_a_process_a_device(announce) -> None:
    announce(OPEN_MPI)
    seat = hosts.announced()
    assert seat == Seat("10.96.0.1", seat.port, 2, 1, [0])


def test_a_pod_announces_its_workers(announce, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster, cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    # Which has nothing of several slices.
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    announce(POD)
    assert hosts.announced() == Seat("localhost", 8482, 2, 1)


def test_a_pod_without_variables_is_known_by_its_metadata(
    announce, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_holds_tpus", lambda: True)
    monkeypatch.setattr(
        hosts, "_metadata", {"worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2"}.get
    )
    assert hosts._hint() == "worker-network-endpoints"
    monkeypatch.setattr(hosts, "_metadata", {"worker-network-endpoints": "a:b:10.0.0.1"}.get)
    assert hosts._hint() is None


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
def test_one_process_is_alone_and_neither_jax_nor_the_network_is_asked(
    announce, monkeypatch, variables: dict[str, str]
) -> None:
    monkeypatch.setattr(
        hosts, "_as_jax_sees_it", lambda hint: pytest.fail(f"jax was asked for {hint}")
    )
    announce(variables)
    assert hosts.announced() is None


def test_a_kubernetes_job_that_jax_cannot_ask_is_alone(announce) -> None:
    announce(KUBERNETES)  # and no package `kubernetes` is installed here
    assert hosts.announced() is None


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "processes announced by OMPI_COMM_WORLD_SIZE=2 must have a coordinator: got none; set COGI2V_COORDINATOR, ",
        ),
        (
            SLURM | {"SLURM_PROCID": "second"},
            "processes announced by SLURM_NTASKS must be numbered as jax knows it: got invalid literal for int() with base 10: 'second'; ",
        ),
    ],
)
def test_a_cluster_that_jax_cannot_number_is_one_line(
    announce, variables: dict[str, str], line: str
) -> None:
    announce(variables)
    with pytest.raises(
        ValueError, match=r"; set COGI2V_COORDINATOR, .* or COGI2V_PROCESSES=1 to stay alone$"
    ) as caught:
        hosts.announced()
    assert str(caught.value).startswith(line)


def test_metadata_that_nobody_serves_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    assert hosts._metadata("worker-network-endpoints") == ""


def test_joining_alone_costs_nothing(tmp_path: Path) -> None:
    script = "import sys; from cogi2v_jax import hosts; hosts.join(); assert hosts.leads(); hosts.meet('here'); sys.exit('jax' in sys.modules)"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "TPU_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_program_alone_is_as_it_was() -> None:
    @hosts.together
    def program(code: int) -> int:
        """A program."""
        if code < 0:
            raise KeyError(code)
        return code

    assert program.__doc__ == "A program."
    assert [program(0), program(code=3)] == [0, 3]
    with pytest.raises(KeyError):
        program(-1)


def test_joining_needs_somebody_who_ends_the_program(
    announce, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(BY_HAND)
    monkeypatch.setattr(hosts, "_under_together", False)
    with pytest.raises(
        RuntimeError, match=r"^join must be called by a program under hosts\.together"
    ):
        hosts.join()

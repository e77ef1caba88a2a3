"""Several hosts: one run as many processes, each with devices of its own. Process 0 leads: it alone
writes files and prints results. jax's distributed service connects the processes and ends all of
them when one is lost.

jax finds the processes of a TPU pod, SLURM, Open MPI and Kubernetes itself. Anywhere else, set

    COGI2V_COORDINATOR=HOST:PORT   where process 0 listens
    COGI2V_PROCESSES=N             the number of processes; 1 ignores what else is announced
    COGI2V_PROCESS=K               the number of this process, from 0
"""

import functools
import importlib.util
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from ..disk import at_end, first_line

VARIABLES = COORDINATOR, PROCESSES, PROCESS = (
    "COGI2V_COORDINATOR",
    "COGI2V_PROCESSES",
    "COGI2V_PROCESS",
)
ARRIVAL = 100  # seconds within which all processes must have started
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
LATER = 60  # more seconds that jax has for it
HEARTBEAT = 30  # seconds without a heartbeat after which a process is lost
LINGER = 1.0  # seconds from process 0's failure to its exit
MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")

_joined = False
_process = 0


def announced() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` for the processes that the environment announces:
    {} where jax detects them itself. None if there is only this process. Only machines with TPU
    chips ask the network. Raises ValueError for values that are not valid."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get(PROCESSES) == "1":
        return None
    if not given:
        return {} if _detectable() else None
    if len(given) < len(VARIABLES):
        got = " ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{', '.join(VARIABLES)} must be set together: got only {got}")
    coordinator, *numbers = given.values()
    processes, process = map(_number, numbers)
    last = processes - 1
    if processes < 1:
        raise ValueError(f"{PROCESSES} must be a number from 1: got {numbers[0]!r}")
    if not 0 <= process <= last:
        raise ValueError(f"{PROCESS} must be a number from 0 to {last}: got {numbers[1]!r}")
    host, _, port = coordinator.rpartition(":")
    if not host or not 0 < _number(port) < 2**16:
        raise ValueError(f"{COORDINATOR} must be HOST:PORT: got {coordinator!r}")
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _number(text: str | None) -> int:
    """-1 for what is not a number."""
    return int(text) if text and text.isascii() and text.isdigit() else -1


def _detectable() -> bool:
    """Whether the environment announces several processes that jax can detect."""
    environ = os.environ
    # A batch script and a login are steps of one task, whatever the whole allocation has.
    single = environ.get("SLURM_STEP_NUM_TASKS") == "1" or "SLURM_STEP_NODELIST" not in environ
    if _number(environ.get("SLURM_NTASKS")) > 1 and not single:
        return True
    if _number(environ.get("OMPI_COMM_WORLD_SIZE")) > 1:
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys() and (
        importlib.util.find_spec("kubernetes")
    ):
        return True
    if not has_tpu():
        return False
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if workers is None and "TPU_SKIP_MDS_QUERY" not in environ:
        workers = _metadata("worker-network-endpoints")
    return "," in (workers or "") or _number(environ.get("MEGASCALE_NUM_SLICES")) > 1


def has_tpu() -> bool:
    """Whether this machine has TPU chips that jax may use, by their device files: jax and the chips
    are not started."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return bool(chips) and any(path.read_text().strip() == "0x1ae0" for path in vendors)


def host_memory() -> int:
    """Bytes of memory that this host has, or its container where that is given less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    given = MEMORY_MAX.read_text().strip() if MEMORY_MAX.is_file() else "max"
    return min(host, int(given)) if given.isdecimal() else host


def start_devices() -> None:
    """Starts jax's devices. Raises OSError in one line where there are none."""
    import jax

    if not has_tpu():
        # A libtpu that finds no chip looks for its host in the cloud, and prints six lines.
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that some platform works
        asked = os.environ.get("JAX_PLATFORMS") or "any platform"
        why = f": {first_line(error)}" if str(error) else ""
        raise OSError(f"jax finds no device of {asked}{why}") from None


def _metadata(key: str) -> str:
    """An attribute of this machine from the cloud's metadata server; "" where there is none."""
    # The server's number, so that no name server is waited for.
    server = os.environ.get("GCE_METADATA_IP", "169.254.169.254")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=2.0) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def join(heartbeat: int = HEARTBEAT, preemption: bool = False, arrival: float = ARRIVAL) -> None:
    """Joins the other processes if the environment announces any. Call it before jax is first used,
    in a program under `distributed`. Without a heartbeat for `heartbeat` seconds a process is lost.
    With `preemption`, SIGTERM is for jax's service, by which the processes agree on the step that
    they stop at. Raises ValueError or OSError in one line. Where not all processes have started
    within `arrival` seconds, it ends this one, with a line."""
    global _joined, _process
    arguments = announced()
    if arguments is None or _joined:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The preemption service catches SIGTERM: a program that does not ask it would go on.
    jax.config.update("jax_enable_preemption_service", preemption)
    # gRPC must not reach the other hosts through a proxy; an empty variable means none.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112 (gRPC reads no other spelling)
    jax.config.update("jax_check_proxy_envs", False)
    # jax's client aborts the process with a stack when jax's own time is over.
    late = threading.Timer(arrival, _give_up, [arrival])
    late.daemon = True
    late.start()
    settings: Any = {"initialization_timeout": int(arrival) + LATER}
    settings["heartbeat_timeout_seconds"] = heartbeat
    try:
        jax.distributed.initialize(**arguments, **settings)
    except Exception as error:  # of the network, of Kubernetes' client, of malformed numbers
        raise OSError(_cannot_join(first_line(error))) from None
    finally:
        late.cancel()
    _joined = True
    _process = jax.process_index()  # starts the devices, which may fail


def _cannot_join(why: str) -> str:
    ways = f"set {', '.join(VARIABLES)}, or {PROCESSES}=1 to run alone"
    return f"cannot join the other processes: {why}; {ways}"


def _give_up(seconds: float) -> None:
    """Ends this process, whose main thread waits in jax."""
    line = _cannot_join(f"not all of them have started within {seconds:g} s")
    print(f"cogi2v: {line}", file=sys.stderr, flush=True)
    at_end.close()
    os._exit(1)


def leads() -> bool:
    """Whether this process writes files and prints results: process 0, or the only one."""
    return _process == 0


def alone() -> bool:
    """Whether no other process takes part."""
    return not _joined


def meet(where: str) -> None:
    """Waits until all processes are at this place of the program."""
    if _joined:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


def share(text: str) -> str:
    """What process 0 calls it with, on all processes; each of them must call it."""
    if not _joined:
        return text
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(data))))
    data = data if leads() else np.zeros(size, np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(data))).decode() if size else ""


def distributed(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a program that may `join`. After success all processes end together. After a failure
    this process exits at once, without jax's own shutdown, which would wait for processes that wait
    for this one; the missing heartbeats end them. Neither leaves the interpreter to end by itself:
    there, after some runs of a hundred, jax's CPU client waits for ever for one of its own threads.
    A program that runs alone is not changed."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        code = _exit_code(main, *args, **kwargs)
        if _joined and not code:
            code = _exit_code(_end_together)
        if _joined:
            sys.stdout.flush()
            sys.stderr.flush()
            # Without process 0 jax aborts the others, which may be about to print the same error.
            time.sleep(LINGER * (leads() and bool(code)))
            at_end.close()
            os._exit(code)
        return code

    return run


def _exit_code(program: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """Calls a program. Where it raises after joining, prints what Python prints of an exception
    that ends it, and returns its exit code."""
    try:
        return program(*args, **kwargs)
    except BaseException as error:
        if not _joined:
            raise
        if isinstance(error, KeyboardInterrupt):
            return 130
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
            return 1
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1


def _end_together() -> int:
    """Waits for all processes and leaves jax's service. Raises SystemExit with one line."""
    import jax
    from jax.experimental.multihost_utils import sync_global_devices

    try:
        # A client of the service waits in its shutdown for 5 minutes and then aborts, whatever
        # `shutdown_timeout_seconds` the service has. Process 0 may encode videos for longer.
        sync_global_devices("end")
        jax.distributed.shutdown()
    except Exception as error:
        raise SystemExit(f"cannot end with the other processes: {first_line(error)}") from None
    return 0

"""Several hosts: one run as many processes, each with devices of its own. Process 0 writes and
speaks.

The environment announces them: a TPU pod, SLURM, Open MPI or Kubernetes as jax knows them, or, by
hand and in any place,

    COGI2V_COORDINATOR=HOST:PORT   where process 0 listens
    COGI2V_PROCESSES=N             how many there are; 1 stays alone whatever else is announced
    COGI2V_PROCESS=K               which one this is, from 0
"""

import functools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.request import ProxyHandler, Request, build_opener

from . import watch

COORDINATOR, PROCESSES, PROCESS = VARIABLES = (
    "COGI2V_COORDINATOR",
    "COGI2V_PROCESSES",
    "COGI2V_PROCESS",
)
GRACE = 10.0  # seconds in which the watch may explain a failed collective
HEARTBEATS = 600  # seconds: jax's own alarm, which is not to come before the watch's

_watch: watch.Watch | None = None
_process = 0
_under_together = False


class Seat(NamedTuple):
    """This process's place among all."""

    host: str  # of process 0
    port: int
    processes: int
    process: int
    # This process's share of its machine's devices; None takes all.
    devices: Sequence[int] | None = None


def announced() -> Seat | None:
    """What the environment says of other processes; None if there are none. Asks the network on
    machines that hold TPU chips alone. Raises ValueError for what it can't mean."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get(PROCESSES) == "1":
        return None
    if given:
        return _by_hand(given)
    hint = _hint()
    return _as_jax_sees_it(hint) if hint else None


def _by_hand(given: dict[str, str]) -> Seat:
    if len(given) < len(VARIABLES):
        got = " ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{', '.join(VARIABLES)} must be set together: got only {got}")
    numbers = [
        int(given[name]) if given[name].isascii() and given[name].isdigit() else -1
        for name in (PROCESSES, PROCESS)
    ]
    processes, process = numbers
    if processes < 1:
        raise ValueError(f"{PROCESSES} must be a number from 1: got {given[PROCESSES]!r}")
    if not 0 <= process < processes:
        raise ValueError(
            f"{PROCESS} must be a number from 0 to {processes - 1}: got {given[PROCESS]!r}"
        )
    return Seat(*_address(given[COORDINATOR], COORDINATOR), processes, process)


def _address(text: str, name: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise ValueError(f"{name} must be HOST:PORT: got {text!r}")
    return host.strip("[]"), int(port)  # brackets are around IPv6 addresses


def _hint() -> str | None:
    """The variable that makes it worth importing jax and asking what it knows of clusters, cheaply
    found."""

    def many(name: str, least: int = 2) -> bool:
        value = os.environ.get(name, "")
        return value.isdigit() and int(value) >= least

    # A batch script's or a login's own step has one task, whatever the whole allocation has.
    if (
        many("SLURM_NTASKS")
        and "SLURM_STEP_NODELIST" in os.environ
        and os.environ.get("SLURM_STEP_NUM_TASKS") != "1"
    ):
        return "SLURM_NTASKS"
    if many("OMPI_COMM_WORLD_SIZE"):
        return "OMPI_COMM_WORLD_SIZE"
    workers = [
        name for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES") if name in os.environ
    ]
    if workers and "," in os.environ[workers[0]]:
        return workers[0]
    if many("MEGASCALE_NUM_SLICES"):
        return "MEGASCALE_NUM_SLICES"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return "JOB_COMPLETION_INDEX"
    if (
        not workers
        and "TPU_SKIP_MDS_QUERY" not in os.environ
        and _holds_tpus()
        and "," in _metadata("worker-network-endpoints")
    ):
        return "worker-network-endpoints"
    return None


def _holds_tpus() -> bool:
    """Whether this is a machine of Google's with accelerators that jax may use."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and any(
        path.read_text().strip() == "0x1ae0"
        for path in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _metadata(key: str) -> str:
    """What a cloud machine's own server says of it; nothing where there is none."""
    # By number, so that no name server is waited for.
    server = os.environ.get("GCE_METADATA_IP", "169.254.169.254")
    request = Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=2.0) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _as_jax_sees_it(hint: str) -> Seat | None:
    # Jax.distributed.initialize finds the same, but tells nobody.
    from jax._src.clusters import ClusterEnv

    detect = ClusterEnv.auto_detect_unset_distributed_params
    by_hand = f"set {', '.join(VARIABLES)}, or {PROCESSES}=1 to stay alone"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that a cluster of another kind would need
            address, processes, process, devices = detect(
                None, None, None, None, None, int(watch.ARRIVAL)
            )
    except Exception as error:  # of the network, of Kubernetes' client, of numbers that are none
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"processes announced by {hint} must be numbered as jax knows it: got {said}; {by_hand}"
        ) from None
    if address is None or processes is None or process is None:
        if hint == "OMPI_COMM_WORLD_SIZE":  # a launcher that jax knows not all releases of
            raise ValueError(
                f"processes announced by {hint}={os.environ[hint]} must have a coordinator: got none; {by_hand}"
            )
        return None
    return Seat(*_address(address, hint), processes, process, devices) if processes > 1 else None


def join(silence: float = watch.SILENCE) -> None:
    """Joins the other processes, if the environment announces any: before jax is first used, and
    under `together`. They reach process 0 on the announced port and on one it picks. `silence` is
    how long (seconds) another one may give no sign of life. Raises ValueError or OSError in one
    line."""
    global _watch, _process
    seat = announced()
    if seat is None or _watch is not None:
        return
    if not _under_together:
        raise RuntimeError(
            "join must be called by a program under hosts.together, which ends it so that the others know"
        )
    if seat.process == 0:
        service = watch.free_port()
        links, hosts = watch.gather(seat.port, seat.processes, service)
        local = service
    else:
        links, hosts, service = watch.come((seat.host, seat.port), seat.process, seat.processes)
        local = watch.shield((seat.host, service))
    _watch, _process = watch.Watch(seat.process, links, hosts, silence), seat.process
    _hush()
    # Every process's service is at its own machine now: a proxy for the world outside must not
    # stand between.
    around = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")  # noqa: SIM112 (gRPC reads no other spelling)
    os.environ["no_grpc_proxy"] = f"{around},127.0.0.1" if around else "127.0.0.1"  # noqa: SIM112

    import jax

    jax.config.update("jax_check_proxy_envs", False)
    # It would take SIGTERM for itself, and not end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{local}",
        seat.processes,
        seat.process,
        local_device_ids=seat.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(watch.ARRIVAL),
        heartbeat_timeout_seconds=HEARTBEATS,
        shutdown_timeout_seconds=30,
    )


def _hush() -> None:
    """Silences what libraries print (gloo does), and on all processes but 0 results too. Errors go
    to stderr, which stays."""
    sys.stdout.flush()
    if leads() and sys.stdout is sys.__stdout__:
        sys.stdout = os.fdopen(
            os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
        )
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def leads() -> bool:
    """Whether this process writes files and says what was done: process 0 of several, or the only
    one."""
    return _process == 0


def meet(name: str) -> None:
    """Waits until every process has come to the meeting of this name. It is about hosts: devices
    may still be at work."""
    if _watch is not None:
        _watch.meet(name)


def together(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a program that may `join`, and ends it as one of several: after success all leave
    together; after anything else this process ends at once, which stops the others. Alone, the
    program is as it was."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        global _under_together
        _under_together = True
        try:
            code = main(*args, **kwargs)
        except BaseException as error:
            if _watch is None:
                raise
            _fail(error)
        if _watch is not None:
            if code != 0:
                _exit(code)
            _leave(_watch)
        return code

    return run


def _leave(alive: watch.Watch) -> None:
    global _watch
    import jax

    alive.leave()
    _watch = None
    jax.distributed.shutdown()


def _fail(error: BaseException) -> NoReturn:
    import jax

    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        _exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        # A collective fails when another process is gone, a little before the watch knows and stops
        # this one.
        time.sleep(GRACE)
    traceback.print_exception(error)
    _exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _exit(code: int) -> NoReturn:
    """Past jax's own end, which would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""One of several processes, for the tests of hosts: `python member.py STEPS FAULT WHO`. A loop of
collectives stands in for sampling."""

import atexit
import sys
import time

import numpy as np

from cogi2v_jax.devices import hosts
from cogi2v_jax.disk import process_folder

HEARTBEAT = 10  # seconds
EVERYONE = 99


def say(line: str) -> None:
    if hosts.leads():
        print(line, flush=True)


def loop(steps: int, fault: str, who: int) -> None:
    import jax

    from cogi2v_jax.devices.mesh import Sizes, make_mesh
    from cogi2v_jax.devices.sharding import put, split, to_host

    sharding = split(make_mesh(Sizes(data=jax.device_count()), jax.devices()), "video")
    values = np.arange(8.0 * jax.device_count(), dtype=np.float32).reshape(-1, 4)
    roll = jax.jit(
        lambda x: jax.numpy.roll(x, 1, axis=0) - x.mean(0), out_shardings=sharding, donate_argnums=0
    )
    x, expected = put(values, sharding), values
    for step in range(steps):
        x, expected = roll(x), np.roll(expected, 1, axis=0) - expected.mean(0)
        jax.block_until_ready(x)
        say(f"step {step}")
        if step == 3 and who in (jax.process_index(), EVERYONE):
            time.sleep(0.3 * (who == EVERYONE and not hosts.leads()))  # process 0 fails first
            match fault:
                case "raise":
                    raise ValueError("image must be an image")
                case "exit":
                    sys.exit(3)
                case "return":
                    raise InterruptedError
    np.testing.assert_allclose(to_host(x), expected, atol=1e-4)
    time.sleep(0.5 * hosts.leads())  # as if it wrote a file
    say(f"process 0 of {jax.process_count()} with {jax.device_count()} devices")


@hosts.distributed
def main(steps: str, fault: str = "", who: str = "-1") -> int:
    process_folder()
    try:
        hosts.join(HEARTBEAT)
    except (ValueError, OSError) as error:
        print(f"cogi2v: {error}", file=sys.stderr)
        return 1
    try:
        loop(int(steps), fault, int(who))
    except InterruptedError:
        return 4
    return 0


if __name__ == "__main__":
    atexit.register(time.sleep, 10**6)  # as jax's client may wait where the interpreter ends
    sys.exit(main(*sys.argv[1:]))

"""TPUs to compile for, on a machine without one."""

import os
from typing import Any

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

AXES = ("data", "pair", "context")
ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}  # older libtpus assume a larger host
# In this configuration a v4 chip is one device; by default it is listed as two cores.
NAMES: dict[str, dict[str, Any]] = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5e": {"topology_name": "v5e:1x1", **ONE_CHIP},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:1x1", **ONE_CHIP},
    "v5e-8": {"topology_name": "v5e:2x4"},
    "v5e-16": {"topology_name": "v5e:4x4"},
}


def chip(name: str) -> Mesh:
    """A mesh of one chip, only to compile for. Skips the test if libtpu is not installed."""
    return Mesh(np.array(chips(name)[:1]).reshape(1, 1, 1), AXES)


def chips(name: str) -> list[Any]:
    """All chips of one of NAMES, likewise."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (Linux, x86-64)")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    for variable, value in {**settings, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    return list(topologies.get_topology_desc(platform="tpu", **NAMES[name]).devices)

"""TPUs to compile for on a machine that has none."""

import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

AXES = ("data", "pair", "context")


def chip(name: str) -> Mesh:
    """A mesh of one chip that nothing can run on: `v5e`. Skips the test where libtpu is not to be had."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (Linux, x86-64)")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    for variable, value in {**settings, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:1x1")
    return Mesh(np.array(topology.devices).reshape(1, 1, 1), AXES)

"""TPUs that are not there: devices that programs can be compiled for, and not run on."""

from __future__ import annotations

import importlib.util
import os

import jax
from jax.experimental import topologies

# Without these, libtpu asks a cloud for TPUs of this machine, or waits for another process's.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a topology KIND:SHAPE, such as v5e:4x4, as programs are compiled for them.

    Nothing is asked of a TPU of this machine. Raises RuntimeError without libtpu, and ValueError
    for a topology that there is not.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "to compile for a topology takes the package libtpu: pip install 'samjax[plan]'"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # JAX would else look for the TPU that libtpu is for.
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"no topology {name!r} ({reason}): give KIND:SHAPE, such as v5e:4x4, v5e:16x16 or "
            "v4:2x2x4"
        ) from None

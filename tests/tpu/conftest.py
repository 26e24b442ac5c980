"""The compiler of TPUs, ready, in place of devices."""

import jax
import pytest

from videochat_flash_jax.benchmarks import ahead_of_time


@pytest.fixture(scope="module", autouse=True)
def compiler():
  with pytest.MonkeyPatch.context() as patch:
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
      patch.setenv(name, "")  # put back afterwards
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
      patch.setenv(name, "")
    ahead_of_time.prepare()
    yield


@pytest.fixture(scope="module")
def in_haste():
  """The compiler does not look for the fastest program; it has the same products."""
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  yield
  jax.config.update("jax_exec_time_optimization_effort", 0.0)

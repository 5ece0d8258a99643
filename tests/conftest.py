"""Eight CPU devices for every test, and the persistent compilation cache."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
  os.environ["XLA_FLAGS"] = (
    f"{_FLAGS} --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
  ).strip()

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def micro_runs(tmp_path_factory):
  """A root with every stage trained for a few steps at width 16.

  `root / "model"` is a complete model directory, `root / "codes"` its caches.
  """
  from tests import micro

  return micro.train_all(tmp_path_factory.mktemp("micro"))

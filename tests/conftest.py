"""Eight CPU devices for every test, and the persistent compilation cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
  os.environ["XLA_FLAGS"] = (
    f"{_FLAGS} --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
  ).strip()

# The same small programs are compiled again and again, in processes of tests
# too; kept between runs in pytest's own cache folder.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import filelock  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_MAX_RESIDENT = 3e9  # bytes


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
  """Slow tests first, to any process; those of a file to one and the same.

  What a file's tests share, fixtures and compiled programs, is then made once;
  and no process is left alone with the slow ones at the end.
  """
  is_slow = lambda item: item.get_closest_marker("slow") is not None
  items.sort(key=is_slow, reverse=True)
  for item in items:
    if not is_slow(item) and not item.get_closest_marker("xdist_group"):
      item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Lets compiled programs go where a process has grown large.

  All that the suite compiles takes 7 GB, nearly all of it never used again.
  """
  yield
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():  # elsewhere than on Linux nothing is let go
    pages = int(statm.read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > _MAX_RESIDENT:
      jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _quickly(request):
  """Programs of a file marked `quick` are hardly optimized."""
  if request.node.get_closest_marker("quick") is None:
    yield
    return
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def micro_runs(tmp_path_factory, worker_id):
  """A root with every stage trained for a few steps at width 16.

  `root / "model"` is a complete model directory, `root / "codes"` its caches.
  Trained once, by the first process of pytest-xdist that asks for it.
  """
  from tests import micro

  shared = tmp_path_factory.getbasetemp()
  if worker_id != "master":
    shared = shared.parent  # of all workers
  root = shared / "micro"
  with filelock.FileLock(shared / "micro.lock"):
    if not (shared / "micro.done").exists():
      micro.train_all(root)
      (shared / "micro.done").touch()
  return root

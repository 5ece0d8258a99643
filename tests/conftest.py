"""What every test runs with: eight CPU devices, a cache of their programs."""

import gc
import importlib.metadata
import os
import pathlib
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
  flags = [
    _FLAGS,
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_cpu_opt_preset=FAST_COMPILE",
    "--xla_cpu_parallel_codegen_split_count=1",  # the other cores have tests
  ]
  # Its older emitters of loops compile in less; jaxlib 0.12 has the others
  # alone, so that the lane of the newest versions runs those.
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# The same small programs are compiled again and again, in processes of tests
# too; kept between runs in pytest's own cache folder.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Nearly all of them are compiled for longer than they run.
_QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"

# And so are programs for TPUs, which never run here: a fifth of the time. The
# first is the setting of JAX up to 0.11, the second that of later ones.
os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")

import filelock
import jax
import pytest

_MAX_RESIDENT = 3e9  # bytes


@pytest.hookimpl(tryfirst=True)  # before -m chooses among them
def pytest_collection_modifyitems(items):
  """Files with slow tests first: no process is left alone with them at the end.

  All tests of a file run in one process (pytest-xdist's loadfile): what they
  share, fixtures and compiled programs, is made once. Files that want the
  trained `micro_runs` come after those that do not, but for one, whose process
  trains them in the meantime: no other waits for it. They are slow, too.
  """
  for item in items:
    if "micro_runs" in item.fixturenames:
      item.add_marker(pytest.mark.slow)
  is_slow = lambda item: item.get_closest_marker("slow") is not None
  slow = {item.path for item in items if is_slow(item)}
  trained = {item.path for item in items if "micro_codes" in item.fixturenames}
  first = min(slow & trained, default=None)
  items.sort(
    key=lambda item: (
      item.path != first,
      item.path not in slow,
      item.path in trained,
      not is_slow(item),
    )
  )


def pytest_runtest_setup(item):
  """Skips what needs the shared folder where there is none, as for a user."""
  if item.get_closest_marker("shared") and not os.environ.get("LAVIT_SHARED"):
    pytest.skip("needs LAVIT_SHARED, the folder with the full data")


def pytest_collection_finish():
  """What the imports made stays: the collector need not look at it again.

  Nor as often as by default, which a suite that traces programs feels.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


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
def _optimized(request):
  """Programs of a file marked `optimized` are, in its processes too."""
  if request.node.get_closest_marker("optimized") is None:
    yield
    return
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
  jax.config.update("jax_disable_most_optimizations", _QUICK)


@pytest.fixture
def shared_programs():
  """Runs of one config share their programs: see `tests/train/programs.py`."""
  from tests.train import programs

  with programs.shared():
    yield


@pytest.fixture(scope="session")
def micro_codes(tmp_path_factory, worker_id):
  """A root with an encoder and a tokenizer at width 16, and caches of codes.

  `root / "model"` has these two parts; `root / "codes"` the caches. Trained for
  a few steps, once, by the first process of pytest-xdist that asks for them.
  """
  from tests import micro

  return _once(tmp_path_factory, worker_id, "codes", micro.train_tokenizer)


@pytest.fixture(scope="session")
def micro_runs(micro_codes, tmp_path_factory, worker_id):
  """The same with the other stages: `root / "model"` is complete."""
  from tests import micro

  def go_on(root):
    shutil.copytree(micro_codes, root)
    micro.train_all(root)

  return _once(tmp_path_factory, worker_id, "runs", go_on)


def _once(tmp_path_factory, worker_id, name, make):
  """A folder of all processes that the first of them makes."""
  shared = tmp_path_factory.getbasetemp()
  if worker_id != "master":
    shared = shared.parent  # of all workers
  root = shared / f"micro_{name}"
  done = root.with_suffix(".done")
  with filelock.FileLock(root.with_suffix(".lock")):
    if not done.exists():
      make(root)
      done.touch()
  return root

"""What `lavit compile --cache` keeps is what a run looks for."""

import pytest

from lavit_jax import sharding
from lavit_jax.commands import compile as command
from lavit_jax.train import boundaries, loop, phases, program
from lavit_jax.train import compile as ahead
from tests import micro


@pytest.fixture
def cache(tmp_path):
  """A folder where JAX keeps programs during a test, as `--cache` tells it."""
  with micro.own_cache():
    command.keep_in(str(tmp_path / "compiled"))
    yield tmp_path / "compiled"


def _steps(folder):
  return {path.name for path in folder.glob("jit_step-*-cache")}


def test_a_run_finds_the_program_that_was_compiled_ahead(
  cache, micro_runs, tmp_path
):
  """Down to the key of the cache, compiled where its model is not."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  sizes = {"data": -1, "fsdp": 2, "context": 1, "tensor": 1}
  cfg = micro.config("pretrain", root, mesh=sizes)
  elsewhere = micro.assuming(cfg)
  objective = ahead.objective_of(elsewhere)
  assert objective.stored.outline
  (phase,) = phases.phases_of(cfg)
  with micro.devices(2):
    mesh = sharding.make_mesh(sizes)
    lowered, _ = program.lower(objective, elsewhere, phase, mesh)
    lowered.compile()
    kept = _steps(cache)
    assert len(kept) == 1
    loop.train(cfg, root / "run", quiet=True)
    assert _steps(cache) == kept


def test_a_run_finds_what_was_compiled_for_between_its_phases(
  cache, micro_runs, tmp_path
):
  """Mean features and k-means, before one phase; and its moments."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  sizes = {"data": -1, "fsdp": 2, "context": 1, "tensor": 1}
  cfg = micro.config("tokenizer", root, mesh=sizes, schedule=("codes",))
  elsewhere = micro.assuming(cfg)
  objective = ahead.objective_of(elsewhere)
  (phase,) = phases.phases_of(cfg)
  with micro.devices(2):
    mesh = sharding.make_mesh(sizes)
    _, given = program.lower(objective, elsewhere, phase, mesh)
    with sharding.use(mesh):
      made = boundaries.lower(objective, phase, *given, mesh)
    for lowered in made.values():
      lowered.compile()
    kept = _between(cache)
    assert len(kept) == len(made) == 5
    loop.train(cfg, root / "run", quiet=True)
    assert _between(cache) == kept


def _between(folder):
  names = ("feature_mean_add", "feature_mean_finish", "kmeans_add")
  names += ("kmeans_finish", "moments")
  return {
    path.name for name in names for path in folder.glob(f"jit_{name}-*-cache")
  }

"""Frozen networks lie where they belong, and nowhere else."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import lora
from lavit_jax.train import loop, lowering, objectives, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import abstract_params, branches
from tests import micro
from tests.train import latent_micro

pytestmark = pytest.mark.slow

_MESH = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
_SLACK = 4096  # bytes a device: metrics, keys, constants of programs


# Reading ----------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
  """A part with two branches of numbers."""
  rows = np.arange(32, dtype=np.float32).reshape(8, 4)
  tree = {"params": {"a": {"kernel": rows}, "b": {"kernel": rows + 100}}}
  checkpoints.save_part(tmp_path, "tokenizer", tree, {})
  return tmp_path


def _shape(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def test_a_branch_is_read_alone_in_its_shares_and_its_dtype(model):
  mesh = sharding.make_mesh({"fsdp": 8})
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  found = branches.load(
    {"net": {"b": branches.Branch(model, "tokenizer", "params/b")}},
    {"net": {"b": {"kernel": _shape(8, 4, dtype="bfloat16")}}},
    {"net": {"b": {"kernel": place}}},
  )
  (kernel,) = jax.tree.leaves(found)
  assert kernel.sharding == place
  assert kernel.dtype == jnp.bfloat16
  for shard in kernel.addressable_shards:
    assert shard.data.shape == (1, 4)
  np.testing.assert_array_equal(
    np.asarray(found["net"]["b"]["kernel"], np.float32),
    100 + np.arange(32).reshape(8, 4),
  )


@pytest.mark.parametrize(
  ("top", "name", "shape", "message"),
  [
    ("params/b", "bias", (8, 4), r"params/b/bias: None there, \(8, 4\) here"),
    ("params/a", "kernel", (4, 8), r"params/a/kernel: \(8, 4\) there"),
    ("params/ab", "kernel", (8, 4), r"params/ab/kernel: None there"),
  ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(
  top, name, shape, message, model, monkeypatch
):
  monkeypatch.setattr(checkpoints, "load_arrays", None)
  branch = {"net": branches.Branch(model, "tokenizer", top)}
  with pytest.raises(errors.CheckpointError, match=message):
    branches.load(branch, {"net": {name: _shape(*shape)}})


def test_a_branch_is_there_by_whole_names(model):
  there = lambda top: branches.is_there(
    branches.Branch(model, "tokenizer", top)
  )
  assert [there(top) for top in ("", "params", "params/a")] == [True] * 3
  assert not any(there(top) for top in ("param", "params/", "params/aa", "b"))


# What lives through a run -----------------------------------------------------


class _SeenError(Exception):
  """Raised once what lives has been counted."""


def _alive(before) -> dict:
  """Bytes of the buffers of every device that were not there before."""
  gc.collect()
  found = {}
  for x in jax.live_arrays():
    if id(x) in before or x.is_deleted():
      continue
    for shard in x.addressable_shards:
      place = shard.device.id, shard.data.unsafe_buffer_pointer()
      found[place] = shard.data.nbytes
  made = dict.fromkeys(range(8), 0)
  for (device, _), size in found.items():
    made[device] += size
  return made


def _count(monkeypatch, cfg, workdir, *, run):
  """Bytes alive by device in the first step of a run.

  With `run` after the step, else when it is called: what it takes and all
  that is held beside it are there already, and nothing has to compile.
  """
  before = {id(x): x for x in jax.live_arrays()}
  make, seen = step_lib.jit_step, {}

  def counted(*args):
    real = make(*args)

    def step(*arguments):
      if run:
        state, metrics = real(*arguments)
        jax.block_until_ready(metrics)
        arguments = state, *arguments[1:]
      seen["alive"] = _alive(before)
      raise _SeenError

    return step

  monkeypatch.setattr(step_lib, "jit_step", counted)
  monkeypatch.setattr(checkpoints, "load_part", None)  # onto one device
  with pytest.raises(_SeenError):
    loop.train(cfg, workdir, quiet=True)
  monkeypatch.undo()
  return seen["alive"]


def _config(stage, root, tmp_path):
  if stage == "latents":
    latent_micro.save_model(tmp_path / "model", ("lowres",))
    model = tmp_path / "start"
    shutil.copytree(tmp_path / "model", model)
    return latent_micro.config("lowres", tmp_path, start_from=str(model))
  if stage == "lora":
    cfg = micro.config("pretrain", root, start_from=str(root / "model"))
    cfg.model.lora = dict(rank=2, alpha=4.0)
    cfg.optimizer.groups = dict(lora=1.0, visual=1.0)
    cfg.phases.train.train = dict(lora="lora", merger="visual")
    return cfg
  return micro.config(stage, root)


@pytest.mark.parametrize(
  "stage", ["tokenizer", "pixels", "pretrain", "lora", "latents"]
)
def test_a_run_holds_what_its_step_needs_on_every_device_and_no_more(
  stage, micro_runs, tmp_path, monkeypatch
):
  cfg = _config(stage, micro_runs, tmp_path)
  cfg.mesh = _MESH
  alive = _count(monkeypatch, cfg, tmp_path / "run", run=stage == "tokenizer")
  objective = objectives.build(cfg)
  mesh = sharding.make_mesh(cfg.mesh.to_dict())
  phase = phases.phases_of(cfg)[0]
  arguments = lowering.arguments(objective, cfg, phase, mesh)
  need = sharding.bytes_per_device(arguments)  # as `lavit compile` lowers it
  assert all(need <= found <= need + _SLACK for found in alive.values()), (
    need,
    alive,
  )
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[1]))
  assert whole > 2 * _SLACK, "a copy of it would not be seen"


def test_a_lora_is_merged_in_the_shares_of_its_mesh(micro_runs, tmp_path):
  cfg = _config("lora", micro_runs, tmp_path)
  objective = objectives.build(cfg)
  mesh = sharding.make_mesh(_MESH)
  rng = np.random.default_rng(0)
  with sharding.use(mesh):
    boxed, _ = jax.eval_shape(objective.init, jax.random.key(0))
    params = jax.tree.map(
      lambda x, place: jax.device_put(
        rng.normal(size=x.shape).astype(np.float32), place
      ),
      sharding.unbox(boxed),
      sharding.param_shardings(boxed, mesh),
    )
    low = jax.device_get(params["lora"])
    made = objective.export(params, {})["llm"][0]["llm"]
    wanted = sharding.param_shardings(
      abstract_params.llm(objective.llama_config), mesh
    )
  split = []
  for (path, x), place in zip(
    jax.tree_util.tree_leaves_with_path(made),
    jax.tree.leaves(wanted),
    strict=True,
  ):
    assert x.dtype == jnp.float32
    assert x.sharding.is_equivalent_to(place, x.ndim), path
    split.append(not x.sharding.is_fully_replicated)
  assert any(split)
  whole = checkpoints.load_part(cfg.start_from, "llm").params["llm"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.device_get(made),
    jax.device_get(lora.merge(whole, low, objective.lora_scale)),
  )

"""What is computed between phases, on one device, on eight, and by shapes."""

import dataclasses
import functools
import importlib
import types
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.models.tokenizer import quantizer
from lavit_jax.train import boundaries, objectives, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import artifacts
from tests import micro


def _random(rng, tree):
  """Arrays in place of shapes."""
  leaves, form = jax.tree.flatten(tree)
  keys = jax.random.split(rng, len(leaves))
  made = [
    0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(form, made)


@pytest.fixture(scope="module")
def run():
  """A tokenizer with a random encoder, its first state, its batches.

  Of one phase, before which both its folds are computed.
  """
  cfg = micro.assumed_tokenizer()
  cfg.schedule = ("codes",)
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  shapes = sharding.unbox(objective.frozen_shapes())
  frozen = _random(jax.random.key(1), shapes)
  init = step_lib.init_fn(objective, 0)
  state = jax.jit(lambda: sharding.unbox(init()))()

  def batch_at(index):
    rng = np.random.default_rng(index)
    shapes = objective.batch_shapes()
    valid = np.ones(cfg.batch_size, np.float32)
    valid[index % cfg.batch_size] = 0.0
    return {
      "image": rng.integers(0, 255, shapes["image"].shape, np.uint8),
      "valid": valid,
      "index": np.arange(cfg.batch_size),
    }

  return types.SimpleNamespace(
    config=cfg,
    objective=objective,
    frozen=frozen,
    state=state,
    batch_at=batch_at,
    phase=phases.phases_of(cfg)[0],
  )


def _begin(run, sizes, devices, opt_state=None):
  """The state that the phase begins with, on a mesh."""
  mesh = sharding.make_mesh(sizes, devices)
  with sharding.use(mesh):
    boxed = jax.eval_shape(step_lib.init_fn(run.objective, 0))
    layout = sharding.layout_of(sharding.abstract(boxed, mesh))
    state = jax.device_put(run.state, layout).replace(opt_state=opt_state)
    frozen = sharding.abstract(run.objective.frozen_shapes(), mesh)
    frozen = jax.device_put(run.frozen, sharding.layout_of(frozen))
    put = functools.partial(sharding.put_batch, mesh=mesh)
    return boundaries.begin(
      run.objective,
      run.phase,
      state,
      frozen,
      lambda index: put(run.batch_at(index)),
      mesh,
    )


@pytest.fixture(scope="module")
def begun(run):
  """The state that the phase begins with, on one device."""
  return _begin(run, {}, jax.devices()[:1])


def _features(run, index):
  """(float[B, N, D], float[B]) of a batch, by the objective's encoder."""
  batch = run.batch_at(index)
  encode = jax.jit(run.objective._features)
  return encode(run.frozen["encoder"], batch["image"]), batch["valid"]


def test_shapes_of_a_first_state_are_those_of_what_is_drawn(run):
  drawn = jax.eval_shape(step_lib.init_fn(run.objective, 0))
  assert step_lib.abstract_state(run.objective) == drawn


def test_the_first_phase_begins_with_the_mean_features_of_whole_images(
  run, begun
):
  found = [_features(run, index) for index in range(8)]
  kept = [np.asarray(x)[valid > 0] for x, valid in found]
  mean = np.concatenate(kept).mean(0)
  np.testing.assert_allclose(begun.extra["feature_mean"], mean, atol=1e-5)


def test_codes_begin_with_kmeans_of_the_kept_tokens_of_whole_images(run, begun):
  phase, params = run.phase, run.state.params

  @jax.jit
  def project(features):
    mask = run.objective._mask("expected", params, features, {})[0]
    return run.objective._project_compact(params, features, mask)

  z, weights = [], []
  for index in range(phase["kmeans_batches"]):
    features, whole = _features(run, phase.start + index)
    vectors, valid = project(features)
    z.append(vectors)
    weights.append(valid * whole[:, None])
  config = run.objective.model_config.quantizer
  kmeans = jax.jit(quantizer.kmeans_init, static_argnums=(3, 4))
  codebook = kmeans(
    jax.random.fold_in(
      jax.random.wrap_key_data(run.state.rng), phase.start + 1
    ),
    jnp.concatenate(z).reshape(-1, config.code_dim),
    jnp.concatenate(weights).reshape(-1),
    config.num_codes,
    phase["kmeans_iters"],
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    begun.extra["codebook"],
    codebook,
  )


def test_a_phase_begins_on_eight_devices_as_on_one(run, begun):
  eight = _begin(run, {"data": 4, "fsdp": 2}, jax.devices()[:8])
  assert jax.tree.leaves(eight.opt_state)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), begun, eight
  )


def test_the_moments_of_the_phase_before_are_gone_while_codes_are_made(
  run, monkeypatch
):
  moment, noted_values = jnp.ones(3), []
  folds = type(run.objective).folds

  def watched(objective, phase):
    noted_values.append(moment.is_deleted())
    return folds(objective, phase)[:0]  # nothing to compile

  monkeypatch.setattr(type(run.objective), "folds", watched)
  _begin(run, {}, jax.devices()[:1], opt_state=(moment,))
  assert noted_values == [True]


_PARAMS, _CARRIED, _BATCH = 1 << 18, 1 << 19, 1 << 17  # bytes
_SMALL = 1 << 14


class _Replacing:
  """A stage whose phase begins with weights read to the host, and a fold."""

  config = ml_collections.ConfigDict(
    dict(
      seed=0,
      optimizer=dict(
        b1=0.9, b2=0.9, weight_decay=0.0, clip_norm=1.0, groups=dict(base=1.0)
      ),
    )
  )
  labels = base.Objective.labels
  init_shapes = base.Objective.init_shapes

  def __init__(self):
    self.read = None  # a weak reference to what was read

  def init(self, rng):
    box = nn.LogicallyPartitioned(
      jnp.ones((256, _PARAMS // 1024)), ("embed", "mlp")
    )
    return {"net": box}, {"sum": jnp.zeros(())}

  def begin_phase(self, phase, state):
    # JAX cannot take float64 as it is: the host's copy is one.
    read = np.full(state.params["net"].shape, 2.0)
    self.read = weakref.ref(read)
    return {"net": read}, state.extra

  def folds(self, phase):
    def start():
      whole = jnp.zeros((8, _CARRIED // 32))
      return nn.LogicallyPartitioned(whole, ("act_batch", None))

    def add(carried, number, state, frozen, batch):
      return carried + batch["x"].mean() * state.params["net"].mean()

    def finish(carried, state):
      return {"sum": carried[0, 0] + state.extra["sum"]}

    return (
      base.Fold(name="sum", batches=3, start=start, add=add, finish=finish),
    )


def _live():
  """Bytes of all arrays on all devices."""
  return sum(
    np.prod(x.sharding.shard_shape(x.shape))
    * x.dtype.itemsize
    * len(x.sharding.device_set)
    for x in jax.live_arrays()
  )


def test_what_a_phase_replaces_is_gone_while_it_is_begun(monkeypatch):
  """On eight devices, though who calls holds the state; nor is it on the host.

  Before the moments are made, what folds carry and their batches are gone too.
  """
  objective = _Replacing()
  phase = phases.Phase(
    name="train", start=0, stop=4, lr=0.1, train={"all": "base"}
  )
  mesh, noted_values = sharding.make_mesh({"fsdp": 8}), []
  note = lambda: noted_values.append(
    (_live() - before, objective.read() is None)
  )
  moments = boundaries._moments

  def watched(*args):
    init = moments(*args)

    def noted(*args):
      note()
      return init(*args)

    return noted

  def batch_at(index):
    note()
    return sharding.put_batch({"x": np.ones((8, _BATCH // 32), "f4")}, mesh)

  monkeypatch.setattr(boundaries, "_moments", watched)
  before = _live()
  with sharding.use(mesh):
    init = step_lib.init_fn(objective, 0)
    layout = sharding.layout_of(sharding.abstract(jax.eval_shape(init), mesh))
    state = jax.jit(lambda: sharding.unbox(init()), out_shardings=layout)()
    begun = boundaries.begin(objective, phase, state, {}, batch_at, mesh)
  assert begun.extra["sum"] == 3 * 2.0
  (*folds, last) = noted_values
  assert len(folds) == 3
  for bytes_, gone in folds:
    assert gone
    assert bytes_ < _PARAMS + _CARRIED + _SMALL
  assert last[1]
  assert _PARAMS <= last[0] < _PARAMS + _SMALL


def test_what_is_carried_may_be_whole_on_every_device(monkeypatch):
  """On a mesh of `tensor` alone batches are; a parameter may not."""
  monkeypatch.setattr(sharding, "_LARGE", _CARRIED - 1)
  mesh = sharding.make_mesh({"tensor": -1})
  objective = _Replacing()
  (fold,) = objective.folds(None)
  boxed = jax.eval_shape(step_lib.init_fn(objective, 0))
  with sharding.use(mesh):
    state = sharding.abstract(boxed, mesh)
    made = boundaries._programs(objective, fold, state, mesh)
    assert made.carry.sharding.is_fully_replicated
    with pytest.raises(errors.ConfigError, match=r"Array .* whole on"):
      sharding.abstract(jax.eval_shape(fold.start), mesh)


def test_no_array_before_a_full_size_phase_is_larger_than_a_block():
  """Mean features: encoder's; k-means: a batch's vectors x a block of codes."""
  module = importlib.import_module("lavit_jax.configs.lavit_7b.tokenizer")
  cfg = module.get_config()
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  boxed = jax.eval_shape(step_lib.init_fn(objective, 0))
  state = sharding.unbox(boxed)
  first, *_, last = phases.phases_of(cfg)
  (mean,) = objective.folds(first)
  (kmeans,) = objective.folds(last)
  assert not objective.folds(dataclasses.replace(first, start=1))
  carried = sharding.unbox(jax.eval_shape(kmeans.start))
  jaxpr = jax.make_jaxpr(kmeans.finish)(carried, state)
  vectors = cfg.batch_size * cfg.data.capacity
  assert micro.largest_array(jaxpr) == vectors * quantizer._BLOCK
  number = jax.ShapeDtypeStruct((), jnp.int32)
  frozen = sharding.unbox(objective.frozen_shapes())
  batch = objective.batch_shapes()
  vit = objective.model_config.vit
  # The widest of the encoder: hidden layer, or attention of every head.
  tokens = vit.num_patches + 1
  widest = max(vit.mlp_dim, vit.num_heads * tokens)
  for fold in (mean, kmeans):
    carried = sharding.unbox(jax.eval_shape(fold.start))
    jaxpr = jax.make_jaxpr(fold.add)(carried, number, state, frozen, batch)
    assert micro.largest_array(jaxpr) <= cfg.batch_size * tokens * widest

"""One step on 8 devices equals one step on one, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lavit_jax.configs.tiny import autoencoder

from lavit_jax.core import errors, sharding
from lavit_jax.train import objectives, optimizer
from lavit_jax.train import phases as phases_lib
from lavit_jax.train import step as step_lib
from tests import micro
from tests.train import drawn

pytestmark = pytest.mark.slow

_MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
_LONG = {"fsdp": 4, "context": 2}
_PRETRAIN = (
  {"data": 8},
  {"fsdp": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 4, "context": 2},
  {"fsdp": 2, "context": 4},
  {"data": 2, "context": 2, "tensor": 2},
  _MIXED,
)
_OTHERS = (
  ("encoder", "train"),
  ("tokenizer", "joint"),
  ("tokenizer", "codes"),
  ("pixels", "train"),
  ("autoencoder", "train"),
)


def stage_config(stage, root):
  """The micro config of a stage; of the autoencoder, which has no other."""
  if stage != "autoencoder":
    return micro.config(stage, root)
  cfg = autoencoder.get_config()
  cfg.batch_size = 8
  cfg.data.train_size = cfg.data.held_out_size = 8
  cfg.data.threads = 0
  cfg.model.vae.update(channels=(8, 16), groups=4, layers_per_block=1)
  return cfg


class _Case:
  """A phase of a stage: its first batch and step on one device."""

  def __init__(self, stage, name, root, start=0):
    cfg = stage_config(stage, root)
    self.objective = objectives.build(cfg)
    self.phase = next(p for p in phases_lib.phases_of(cfg) if p.name == name)
    self.batch = next(self.objective.batches(start))
    init = step_lib.init_fn(self.objective, 0)
    self.boxed = jax.eval_shape(init)
    extra = jax.jit(lambda: sharding.unbox(init()).extra)()
    self.first = step_lib.TrainState(
      step=np.int32(3),
      params=drawn.draw(self.boxed.params),
      opt_state=None,
      extra=jax.device_get(extra),
      rng=np.array([0, 7], np.uint32),
    )
    self.labels = self.objective.labels(self.phase, self.first.params)
    self.one, _ = self.step({}, 1)

  def step(self, sizes, count=8):
    """((loss, (extra, metrics)), gradients), and the parameters' layout."""
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    with sharding.use(mesh):
      layout = sharding.param_shardings(self.boxed, mesh)
      state = jax.device_put(self.first, layout)
      whole = sharding.replicated(mesh)
      frozen = jax.device_put(self.objective.load_frozen(), whole)
      batch = sharding.put_batch(self.batch, mesh)
      out = jax.jit(self._differentiate)(state, frozen, batch)
      return jax.device_get(out), jax.tree.leaves(layout.params)

  def _differentiate(self, state, frozen, batch):
    rng = step_lib.step_rng(state)

    def loss(trainable):
      params = optimizer.merge(trainable, state.params)
      return self.objective.loss(
        self.phase, params, frozen, state.extra, batch, rng
      )

    trainable = optimizer.select(state.params, self.labels)
    return jax.value_and_grad(loss, has_aux=True)(trainable)

  def assert_same_on(self, sizes):
    """Eight devices give what one gives; parameters are split if asked."""
    eight, layout = self.step(sizes)
    split = not all(x.is_fully_replicated for x in layout)
    assert split == bool({"fsdp", "tensor"} & set(sizes))
    jax.tree_util.tree_map_with_path(_assert_close, self.one, eight)
    return eight


def _assert_close(path, a, b):
  scale = max(np.abs(a).max(), 1e-3)
  name = jax.tree_util.keystr(path)
  np.testing.assert_allclose(b, a, atol=2e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def pretrain(micro_codes):
  """Packed rows with images that are read."""
  case = _Case("pretrain", "train", micro_codes)
  assert (case.batch["image_index"] >= 0).any()
  assert case.batch["segments"].max() > 1
  (loss, _), grads = case.one
  assert loss > 0
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["merger"]))
  return case


@pytest.mark.parametrize("sizes", _PRETRAIN, ids=str)
def test_pretrain_on_any_mesh_equals_one_device(sizes, pretrain):
  pretrain.assert_same_on(sizes)


@pytest.mark.parametrize(("stage", "name"), _OTHERS)
def test_every_stage_on_two_meshes_equals_one_device(stage, name, micro_codes):
  case = _Case(stage, name, micro_codes)
  # latents_test has U-Nets on the other mesh, and larger ones.
  for sizes in (_MIXED,) if stage == "pixels" else (_MIXED, _LONG):
    case.assert_same_on(sizes)


def test_the_codebook_update_counts_every_device(micro_codes):
  """The codes phase on 8 devices moves the codebook as on one."""
  case = _Case("tokenizer", "codes", micro_codes, start=3)
  eight = case.assert_same_on(_MIXED)
  left, right = case.one[0][1][0]["codebook"], eight[0][1][0]["codebook"]
  np.testing.assert_allclose(left["counts"], right["counts"], atol=1e-5)
  np.testing.assert_allclose(left["codes"], right["codes"], atol=1e-4)
  assert left["counts"].sum() > 0


def test_mesh_errors_say_what_to_change():
  with pytest.raises(errors.ConfigError, match="'model'"):
    sharding.make_mesh({"model": 2})
  with pytest.raises(errors.ConfigError, match="-1"):
    sharding.make_mesh({"data": 3})


def test_a_logical_axis_without_a_rule_is_an_error():
  import flax.linen as nn

  box = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((4, 4), jnp.float32), ("embed", "colour")
  )
  mesh = sharding.make_mesh({"data": -1})
  with pytest.raises(errors.ConfigError, match="colour"):
    sharding.param_shardings({"w": box}, mesh)


def test_a_dimension_that_does_not_divide_is_an_error():
  import flax.linen as nn

  box = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((6, 5), jnp.float32), ("embed", "mlp")
  )
  mesh = sharding.make_mesh({"data": 2, "tensor": 4})
  with pytest.raises(errors.ConfigError, match="5 % 4"):
    sharding.param_shardings({"w": box}, mesh)


def test_a_batch_that_does_not_divide_is_an_error():
  mesh = sharding.make_mesh({"data": -1})
  with pytest.raises(errors.ConfigError, match=r"config\.batch_size"):
    sharding.put_batch({"x": np.zeros((6, 2))}, mesh)

"""The pixels stage."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from lavit_jax.core import averages, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import denoising, schedules
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import pixel_decoder, unet
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.train.objectives import pixels as objective_lib

pytestmark = pytest.mark.slow

_TOKENIZER = tokenizer.TokenizerConfig(
  vit=vision.ViTConfig(
    image_size=32, patch_size=16, width=8, depth=1, num_heads=2, mlp_dim=8
  ),
  selector=selector.SelectorConfig(width=8),
  merger=dataclasses.replace(
    merger.TINY, width=8, depth=1, num_heads=2, mlp_dim=8
  ),
  quantizer=dataclasses.replace(
    quantizer.TINY, width=8, num_codes=16, code_dim=4
  ),
  decoder=dataclasses.replace(
    decoder.TINY,
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=8,
    num_patches=4,
    code_dim=4,
    out_dim=8,
  ),
)
_DECODER = pixel_decoder.PixelDecoderConfig(
  image_size=32,
  patch=8,
  num_patches=4,
  feature_dim=8,
  grid_channels=8,
  unet=unet.UNetConfig(
    in_channels=200,
    out_channels=192,
    channels=(16,),
    layers_per_block=1,
    attention=(True,),
    transformer_layers=(1,),
    num_heads=(2,),
    cross_dim=8,
    mid_attention=False,
    groups=4,
    ff_mult=1,
  ),
)
# Quick to compile; these programs are too small for optimizing to pay.
_QUICK = {"xla_backend_optimization_level": 0}
_PHASE = {
  "steps": 10,
  "lr": 1e-3,
  "train": {"all": "base"},
  "condition_dropout": 0.1,
  "weighting": "picture",
  "min_snr": 5.0,
  "draws": 1,
  "ema_decay": 0.9,
}


def _config(model_dir):
  config = ml_collections.ConfigDict()
  config.stage, config.seed, config.batch_size = "pixels", 0, 8
  config.model_dir = str(model_dir)
  config.data = {
    "kind": "shapes",
    "image_size": 32,
    "seed": 0,
    "train_size": 64,
    "held_out_size": 16,
    "threads": 0,
  }
  config.eval = {"batches": 1}
  config.schedule = ("train",)
  config.phases = {"train": _PHASE}
  config.model = {
    "pixels": dataclasses.asdict(_DECODER),
    "schedule": dataclasses.asdict(schedules.PIXELS),
  }
  return config


def _save_parts(model_dir):
  model = tokenizer.DynamicVisualTokenizer(_TOKENIZER)
  features = jnp.zeros((1, 4, 8))
  made = jax.jit(model.init, compiler_options=_QUICK)(
    jax.random.key(0), features, jnp.ones((1, 4))
  )
  variables = nn.meta.unbox(made)
  vit = jax.jit(vision.EvaVit(_TOKENIZER.vit).init, compiler_options=_QUICK)(
    jax.random.key(1), jnp.zeros((1, 32, 32, 3))
  )
  encoder = nn.meta.unbox(vit)["params"]
  meta = {"vit": dataclasses.asdict(_TOKENIZER.vit)}
  checkpoints.save_part(model_dir, "encoder", encoder, meta)
  stored = dict(variables) | {"feature_mean": jnp.zeros((4, 8))}
  meta = {"tokenizer": dataclasses.asdict(_TOKENIZER)}
  checkpoints.save_part(model_dir, "tokenizer", stored, meta)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  """(objective, params, state, batch) of the tiny stage."""
  model_dir = tmp_path_factory.mktemp("model")
  _save_parts(model_dir)
  objective = objective_lib.PixelsObjective(_config(model_dir))
  params, state = jax.jit(objective.init, compiler_options=_QUICK)(
    jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    "valid": np.ones(8, np.float32),
  }
  return objective, params, state, batch


def _step(objective, phase):
  """value_and_grad of the loss, compiled."""

  def loss(params, frozen, state, batch, rng):
    return objective.loss(phase, params, frozen, state, batch, rng)

  return jax.jit(
    jax.value_and_grad(loss, has_aux=True), compiler_options=_QUICK
  )


@pytest.fixture(scope="module")
def step(stage):
  return _step(stage[0], stage[0].last_phase)


def test_an_invalid_image_changes_nothing(stage, step):
  objective, params, state, batch = stage
  args = (nn.meta.unbox(params), objective.load_frozen(), nn.meta.unbox(state))
  batch = batch | {"valid": np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)}
  other = batch | {"image": batch["image"].copy()}
  other["image"][3] = 0
  (a, _), grad_a = step(*args, batch, jax.random.key(3))
  (b, _), grad_b = step(*args, other, jax.random.key(3))
  np.testing.assert_allclose(a, b, rtol=1e-6)
  norms = jax.jit(
    lambda a, b: (optax.tree.norm(optax.tree.sub(a, b)), optax.tree.norm(a))
  )
  difference, norm = norms(grad_a, grad_b)
  assert difference <= 1e-5 * norm
  other["image"][2] = 0
  (c, _), _ = step(*args, other, jax.random.key(3))
  assert abs(float(a - c)) > 1e-5


def test_training_on_one_batch_lowers_the_loss(stage, step):
  objective, params, state, batch = stage
  params, state = nn.meta.unbox(params), nn.meta.unbox(state)
  frozen, tx = objective.load_frozen(), optax.adam(3e-3)

  @jax.jit
  def update(grads, moments, params):
    updates, moments = tx.update(grads, moments)
    return optax.apply_updates(params, updates), moments

  moments, seen = tx.init(params), []
  for i in range(60):
    key = jax.random.key(i % 4)
    (loss, (state, _)), grads = step(params, frozen, state, batch, key)
    params, moments = update(grads, moments, params)
    seen.append(float(loss))
  assert np.mean(seen[-4:]) < 0.7 * np.mean(seen[:4])
  assert int(state["updates"]) == 60


def test_eight_devices_give_the_loss_and_gradient_of_one(stage, step):
  objective, params, state, batch = stage
  rng = jax.random.key(5)
  args = (nn.meta.unbox(params), objective.load_frozen(), nn.meta.unbox(state))
  (one, _), grads_one = step(*args, batch, rng)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  layout = sharding.param_shardings(params, mesh)
  whole = sharding.replicated(mesh)
  with sharding.use(mesh):
    (many, _), grads_many = _step(objective, objective.last_phase)(
      jax.device_put(args[0], layout),
      jax.device_put(args[1], whole),
      jax.device_put(args[2], sharding.param_shardings(state, mesh)),
      sharding.put_batch(batch, mesh),
      jax.device_put(rng, whole),
    )
  np.testing.assert_allclose(one, many, rtol=1e-5)
  grads_many = jax.device_get(grads_many)
  worst = optax.tree.norm(optax.tree.sub(grads_many, grads_one))
  assert worst <= 1e-4 * optax.tree.norm(grads_one)


def test_the_exponential_mean_is_what_gets_exported(stage):
  objective, params, state, _ = stage
  params, state = nn.meta.unbox(params), nn.meta.unbox(state)
  later = jax.tree.map(lambda x: x + 1.0, params)
  after = denoising.update_ema(state, later, 0.999)
  shift = jax.tree.map(
    lambda a, b: np.asarray(a - b).mean(dtype=np.float64), after["ema"], params
  )
  # First update: decay min(0.999, 1 / 10).
  np.testing.assert_allclose(jax.tree.leaves(shift), 0.9, atol=1e-5)
  ((exported, meta),) = objective.export(params, after).values()
  assert exported is after["ema"]
  assert pixel_decoder.PixelDecoderConfig(**meta["pixels"]) == _DECODER
  assert schedules.NoiseSchedule(**meta["schedule"]) == schedules.PIXELS


def test_held_out_metrics_do_not_depend_on_the_order_of_training(stage):
  objective, params, state, batch = stage
  state = nn.meta.unbox(state)
  measure = jax.jit(objective.held_out_metrics, compiler_options=_QUICK)
  args = (objective.load_frozen(), state, batch)
  first = measure(nn.meta.unbox(params), *args)
  again = measure(jax.tree.map(jnp.zeros_like, nn.meta.unbox(params)), *args)
  assert set(first) == {"eps_mse", "eps_mse_noisy", "picture_mse", "loss"}
  for name, value in first.items():
    assert np.isfinite(averages.value(value))
    # Of the mean weights alone.
    assert averages.value(value) == averages.value(again[name])


def test_a_decoder_of_another_width_is_refused(stage):
  objective = stage[0]
  config = _config(objective.config.model_dir)
  config.model.pixels.feature_dim = 9
  with pytest.raises(ValueError, match=r"model\.pixels\.feature_dim=8"):
    objective_lib.PixelsObjective(config)


def test_a_weighting_without_bound_is_refused(stage):
  config = _config(stage[0].config.model_dir)
  config.model.schedule.prediction = "epsilon"
  with pytest.raises(ValueError, match="sample"):
    objective_lib.PixelsObjective(config)

"""Every step lowers for GPU and TPU on a machine that has neither."""

import contextlib
import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import sharding
from lavit_jax.diffusion import sampling, schedules
from lavit_jax.infer.decoding import decode
from lavit_jax.models import blocks, layers, llama
from lavit_jax.models.attention import gpu
from lavit_jax.models.pixels import unet, unet_blocks
from lavit_jax.models.tokenizer import merger, tokenizer
from lavit_jax.train import objectives, optimizer, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import artifacts
from tests import micro
from tests.train import latent_micro, sharding_test

pytestmark = pytest.mark.slow

_CUDNN = [
  f"__cudnn$fmha{bias}Softmax{phase}"
  for bias in ("", "ScaleBias")
  for phase in ("", "Backward")
]
_KERNEL = {"cuda": "__cudnn$fmha", "tpu": "tpu_custom_call"}
_NOWHERE = "a folder that is not there"
_PLATFORMS = pytest.mark.parametrize("platform", ["cuda", "tpu"])


@contextlib.contextmanager
def _chip(platform):
  """A mesh of one device that is not here."""
  family = {"cuda": "gpu"}.get(platform, platform)
  mesh = jax.sharding.AbstractMesh(
    (1,) * len(sharding.MESH_AXES),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.MESH_AXES),
    abstract_device=jax.sharding.AbstractDevice(family, None, family),
  )
  rules = nn.logical_axis_rules(sharding.RULES)
  with jax.sharding.use_abstract_mesh(mesh), rules:
    yield


def _lower(function, platform, *args):
  """A function of (abstract) arrays, exported."""
  abstract = jax.eval_shape(lambda x: x, args)
  unchecked = map(jax.export.DisabledSafetyCheck.custom_call, _CUDNN)
  with _chip(platform):
    exported = jax.export.export(
      jax.jit(function), platforms=[platform], disabled_checks=[*unchecked]
    )(*abstract)
  assert exported.platforms == (platform,)
  assert exported.nr_devices == 1
  return exported


def _kinds(avals):
  """Shapes and dtypes."""
  return [(aval.shape, aval.dtype) for aval in avals]


def _tokenizer():
  """The micro tokenizer, with its encoder, as a dict."""
  parts = micro.config("tokenizer", _NOWHERE).model.tokenizer.to_dict()
  return parts | {"vit": micro.config("encoder", _NOWHERE).model.vit.to_dict()}


@pytest.fixture(autouse=True)
def _no_text(monkeypatch):
  """Only the number of pieces of text matters to a shape."""
  pieces = lambda *unused: types.SimpleNamespace(size=300)
  monkeypatch.setattr(artifacts.Artifacts, "text_tokenizer", pieces)


def _lower_step(cfg, name, platform):
  """(train step of a phase, exported; number of arrays in its state)."""
  cfg.assumed = {"tokenizer": _tokenizer(), "text_size": 300, "capacity": 16}
  if cfg.stage == "latents":  # its outlines have the official sizes
    cfg.assumed.tokenizer = dataclasses.asdict(tokenizer.LAVIT_7B)
    cfg.data.image_size = 224
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  phase = next(p for p in phases.phases_of(cfg) if p.name == name)
  boxed = jax.eval_shape(step_lib.init_fn(objective, 0))
  state = sharding.unbox(boxed)
  labels = objective.labels(phase, state.params)
  tx = optimizer.make(cfg.optimizer, phase, labels, boxed.params)
  trainable = optimizer.select(state.params, labels)
  state = state.replace(opt_state=jax.eval_shape(tx.init, trainable))
  step = step_lib.make_step(objective, phase, labels, tx)
  frozen = sharding.unbox(objective.frozen_shapes())
  made = _lower(step, platform, state, frozen, objective.batch_shapes())
  return made, len(jax.tree.leaves(state))


def _assert_trains(made, size):
  """State comes back as it went in, so that it can be donated, and a loss."""
  assert size > 0
  assert _kinds(made.out_avals[:size]) == _kinds(made.in_avals[:size])
  assert ((), jnp.float32) in _kinds(made.out_avals[size:])


@_PLATFORMS
@pytest.mark.parametrize(
  ("stage", "name"),
  [
    ("encoder", "train"),
    ("tokenizer", "joint"),
    ("tokenizer", "codes"),
    ("pixels", "train"),
    ("autoencoder", "train"),
  ],
)
def test_train_steps_lower(stage, name, platform):
  cfg = sharding_test.stage_config(stage, _NOWHERE)
  _assert_trains(*_lower_step(cfg, name, platform))


def _has_kernel(platform):
  """cuDNN's calls are lowered only where JAX's CUDA plugin is."""
  return platform == "tpu" or gpu._has_cudnn()


@_PLATFORMS
def test_pretrain_lowers_with_the_kernel(platform, caplog):
  """Forward and backward kernels; rows of 128 tokens, heads of 64."""
  layers._warn_of_einsums.cache_clear()
  wide = {"width": 128, "remat": "none", "dtype": "bfloat16"}
  wide = {f"model__llm__{name}": value for name, value in wide.items()}
  cfg = micro.config("pretrain", _NOWHERE, **wide)
  text = _lower_step(cfg, "train", platform)[0].mlir_module()
  if _has_kernel(platform):
    assert text.count(f"@{_KERNEL[platform]}") >= 2
    assert "uses no kernel" not in caplog.text
  layers._warn_of_einsums.cache_clear()
  caplog.clear()
  cfg = micro.config("pretrain", _NOWHERE)  # heads of 8, float32: einsums
  text = _lower_step(cfg, "train", platform)[0].mlir_module()
  assert f"@{_KERNEL[platform]}" not in text
  assert "uses no kernel" in caplog.text


@_PLATFORMS
@pytest.mark.parametrize("kind", ["vit", "unet", "merger"])
def test_attention_to_later_places_lowers_with_the_kernel(
  kind, platform, caplog
):
  """And its gradient; 257 patches of 88 wide heads, maps of 32 x 32."""
  layers._warn_of_einsums.cache_clear()
  net, apply, args = _net_to_later_places(kind)
  init = lambda: net.init(jax.random.key(0), *args)
  params = sharding.unbox(jax.eval_shape(init))
  loss = lambda *args: apply(*args).astype(jnp.float32).sum()
  made = _lower(jax.grad(loss), platform, params, *args)
  count = made.mlir_module().count(f"@{_KERNEL[platform]}")
  assert count >= 2 if _has_kernel(platform) else count == 0
  assert ("uses no kernel" in caplog.text) == (count == 0)


def _net_to_later_places(kind):
  """(module, function of its variables and arrays, these arrays)."""
  if kind == "vit":
    net = blocks.SelfAttention(2, key_bias=False, dtype="bfloat16")
    return net, net.apply, [jnp.zeros((2, 257, 176))]
  if kind == "unet":
    net = unet_blocks.Attention(2, "bfloat16")
    return net, net.apply, [jnp.zeros((2, 1024, 80))]
  config = merger.MergerConfig(
    width=176, depth=1, num_heads=2, mlp_dim=8, dtype="bfloat16"
  )
  net = merger.TokenMerger(config)
  apply = functools.partial(net.apply, capacity=192, method="compact")
  arrays = [jnp.zeros((2, 256, 176)), jnp.zeros((2, 256))]
  return net, lambda *args: apply(*args)[0], arrays


@pytest.mark.parametrize(
  ("kind", "platform"), [("lowres", "cuda"), ("highres", "tpu")]
)
def test_latents_lower(kind, platform):
  cfg = latent_micro.config(kind, _NOWHERE, start_from="")
  _assert_trains(*_lower_step(cfg, "train", platform))


@_PLATFORMS
def test_prefill_and_decode_lower(platform):
  config = llama.LlamaConfig(
    vocab_size=300, width=128, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=64
  )
  model = llama.Llama(config)
  tokens = jnp.zeros((2, 128), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
  params = sharding.unbox(params)["params"]
  prompt = {"tokens": tokens, "mask": jnp.ones((2, 128), bool)}
  prefill = functools.partial(decode.prefill, model, max_new_tokens=8)
  logits = (2, config.padded_vocab), jnp.float32
  made = _lower(prefill, platform, params, prompt)
  assert _kinds(made.out_avals)[0] == logits
  cache = llama.init_cache(config, 2, 136)
  advance = functools.partial(decode.advance, model)
  ids = jnp.zeros((2,), jnp.int32)
  made = _lower(advance, platform, params, ids, cache)
  assert _kinds(made.out_avals)[0] == logits
  after = _kinds(made.out_avals)[1:]
  assert after == _kinds(jax.tree.leaves(cache))


@_PLATFORMS
@pytest.mark.parametrize("kind", ["lowres", "highres"])
def test_sampling_steps_of_the_unet_lower(kind, platform):
  net = unet.UNet(latent_micro.unet_config(kind))
  sizes = latent_micro.SIZES[kind]
  init = lambda: latent_micro.latent_parts.init_unet(net, jax.random.key(0))
  params = sharding.unbox(jax.eval_shape(init))
  tokens = np.zeros((2, 5, sum(sizes["dims"])), np.float32)
  given = {}
  if pooled := sizes["pooled"]:
    given = {"pooled": jnp.zeros((2, pooled)), "sizes": jnp.zeros((2, 6))}

  def draw(params, tokens, seeds):
    def denoise(z, t, tokens):
      return net.apply({"params": params}, z, t, tokens, **given)

    return sampling.sample(
      denoise,
      schedules.STABLE_DIFFUSION,
      tokens,
      seeds=seeds,
      shape=(16, 16, 4),
      steps=3,
    )

  seeds = np.zeros((2,), np.uint32)
  made = _lower(draw, platform, params, tokens, seeds)
  assert _kinds(made.out_avals) == [((2, 16, 16, 4), jnp.float32)]

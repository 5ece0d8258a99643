"""FLOPs by formula against what XLA counts in the compiled programs.

XLA counts element-wise work too, one FLOP an element: the widths here are
large enough for it to stay below the tolerance. Loops are unrolled, for it
counts their bodies once.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.core import sharding
from lavit_jax.cost import networks as net
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import pixel_decoder, unet, vae
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.train import objectives, optimizer
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import artifacts, latent_parts
from lavit_jax.train.telemetry import flops
from tests.train import plain_losses

_TOLERANCE = 0.05
_LLAMA = llama.LlamaConfig(
  vocab_size=1000,
  width=256,
  depth=1,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=512,
)
_VIT = vision.ViTConfig(
  image_size=56,
  patch_size=14,
  width=256,
  depth=1,
  num_heads=4,
  mlp_dim=512,
)
_MERGER = merger.MergerConfig(width=256, depth=1, num_heads=4, mlp_dim=512)
_DECODER = decoder.DecoderConfig(
  width=256,
  depth=1,
  num_heads=4,
  mlp_dim=512,
  num_patches=64,
  code_dim=32,
  out_dim=256,
)
_UNET = unet.UNetConfig(
  in_channels=4,
  out_channels=4,
  channels=(64, 128),
  layers_per_block=(1, 2),
  attention=(False, True),
  transformer_layers=(1, 2),
  num_heads=(4, 4),
  cross_dim=96,
  details=unet.DiffusersQuirks(added_dim=96 + 6 * 32, added_time_dim=32),
)
_VAE = vae.VaeConfig(channels=(32, 64), layers_per_block=2, groups=8)


def _counted(function, *args):
  """What XLA counts in a program, by shapes alone."""
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.cost_analysis()["flops"]


def _params(module, *args, **kwargs):
  made = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
  return sharding.unbox(made)["params"]


def _assert_agrees(counted, formula, tolerance=_TOLERANCE):
  assert formula == pytest.approx(counted, rel=tolerance)


def _assert_both_ways(function, params, cost, *inputs, frozen=False):
  """Holds `forward` and `trained` to XLA's counts, with `frozen` `passed` too.

  The gradients are those of `params` and of the first input, and of that
  input alone.
  """
  loss = lambda p, *xs: jnp.square(function(p, *xs)).sum()
  _assert_agrees(_counted(function, params, *inputs), cost.forward)
  both = jax.value_and_grad(loss, argnums=(0, 1))
  _assert_agrees(_counted(both, params, *inputs), cost.trained)
  if not frozen:
    return
  passed = jax.value_and_grad(loss, argnums=1)
  _assert_agrees(_counted(passed, params, *inputs), cost.passed)


def _float(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_llama():
  model, length = llama.Llama(_LLAMA), 64
  params = _params(model, jnp.zeros((2, length), jnp.int32))

  def run(params, x):
    return model.apply(
      {"params": params}, x, None, None, None, None, method="hidden"
    )[0]

  # Here all keys are computed, twice what causal attention sees.
  whole = net.llama_layers(_LLAMA, 2 * length, 2 * length - 1)
  _assert_both_ways(run, params, whole, _float(2, length, 256), frozen=True)


def test_the_head():
  def run(head, hidden):
    targets = jnp.zeros((2, 64), jnp.int32)
    weights = jnp.ones((2, 64))
    return plain_losses.next_token(hidden, head, targets, weights)[0]

  cost = net.llama_head(_LLAMA, 128)
  _assert_both_ways(run, _float(1000, 256), cost, _float(2, 64, 256))


def test_attention_counts_the_keys_that_a_token_sees():
  alone = net.llama_layers(_LLAMA, 8, 1)
  four = net.llama_layers(_LLAMA, 8, 4)
  assert alone.weights == four.weights
  seen = 1 + 2 + 3 + 4  # of a document of four tokens
  per_pair = 2 * 2 * _LLAMA.width * _LLAMA.depth  # logits and values
  assert four.products == 2 * seen * per_pair
  assert alone.products == 8 * per_pair


def test_the_encoder():
  model, pixels_shape = vision.EvaVit(_VIT), (2, 56, 56, 3)
  params = _params(model, jnp.zeros(pixels_shape))
  run = lambda p, x: model.apply({"params": p}, x)
  _assert_both_ways(run, params, net.vit(_VIT, 2), _float(*pixels_shape))


@pytest.mark.parametrize("form", ["reference", "compact"])
def test_the_merger(form):
  model, num, kept = merger.TokenMerger(_MERGER), 64, 24
  params = _params(model, jnp.zeros((2, num, 256)), jnp.ones((2, num)))

  def run(params, features):
    variables, mask = {"params": params}, jnp.arange(num) % 3 == 0
    mask = jnp.broadcast_to(mask, (2, num))
    if form == "reference":
      return model.apply(variables, features, mask)
    return model.apply(variables, features, mask, kept, method="compact")[0]

  cost = net.merge(_MERGER, 2, num, kept, form)
  if form == "compact":  # all keys are computed
    rows = 2 * kept * _MERGER.depth
    cost += net.Cost(0.0, 4.0 * rows * 256 * (kept - (kept + 1) / 2))
  _assert_both_ways(run, params, cost, _float(2, num, 256))


def test_selector_and_quantizer():
  model = selector.TokenSelector(selector.SelectorConfig(width=2048))
  x = _float(2, 64, 2048)
  params = _params(model, jnp.zeros(x.shape))
  run = lambda p, x: model.apply({"params": p}, x)
  _assert_agrees(
    _counted(run, params, x), net.select(model.config, 128).forward
  )
  x = _float(2, 64, 256)
  config = quantizer.QuantizerConfig(width=256, num_codes=512, code_dim=32)
  model = quantizer.VectorQuantizer(config)
  params = _params(model, jnp.zeros(x.shape))
  run = lambda p, x: model.apply({"params": p}, x)
  _assert_both_ways(run, params, net.quantize(config, 128), x)
  found = _counted(quantizer.lookup, _float(128, 256), _float(512, 256))
  config = dataclasses.replace(config, code_dim=256)
  _assert_agrees(found, net.lookup(config, 128).forward)


def test_semantic_decoders():
  keys, valid = 24, jnp.ones((2, 24), bool)
  vectors = _float(2, keys, 32)

  def runs(model):
    params = _params(model, jnp.zeros(vectors.shape), valid)

    def run(params, vectors):
      out = model.apply({"params": params}, vectors, valid)
      return jnp.concatenate([x.ravel() for x in jax.tree.leaves(out)])

    return run, params

  cost = net.decode(_DECODER, 2, keys)
  run, params = runs(decoder.SemanticDecoder(_DECODER))
  _assert_both_ways(run, params, cost, vectors)
  for model in (
    decoder.LowresDecoder(_DECODER, 128),
    decoder.HighresDecoder(_DECODER, (64, 96), 160),
  ):
    run, params = runs(model)
    whole = cost + net.condition(model, 2)
    _assert_agrees(_counted(run, params, vectors), whole.forward)


def test_the_unet_with_odd_sides():
  net_, (height, width), tokens = unet.UNet(_UNET), (30, 25), 16
  params = sharding.unbox(
    jax.eval_shape(lambda: latent_parts.init_unet(net_, jax.random.key(0)))
  )

  def run(params, x, condition):
    given = {"pooled": jnp.ones((2, 96)), "sizes": jnp.ones((2, 6))}
    return net_.apply({"params": params}, x, jnp.ones((2,)), condition, **given)

  cost = 2 * net.denoise(_UNET, height, width, tokens)
  inputs = _float(2, height, width, 4), _float(2, tokens, 96)
  # XLA leaves out the zeros round the edge and counts what is element-wise.
  _assert_agrees(_counted(run, params, *inputs), cost.forward, 0.08)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_autoencoder(way):
  model = vae.AutoencoderKL(_VAE)
  params = _params(model, jnp.zeros((1, 48, 32, 3)))
  run = lambda p, x: model.apply({"params": p}, x, method=way)
  x = _float(1, 48, 32, 3) if way == "encode" else _float(1, 24, 16, 4)
  cost = getattr(net, f"vae_{way}")(_VAE, 48, 32)
  _assert_agrees(_counted(run, params, x), cost.forward, 0.08)


def test_the_condition_of_the_pixel_decoder():
  shape = dataclasses.replace(pixel_decoder.TINY, feature_dim=128)
  model = pixel_decoder.PixelDecoder(shape)
  cost = net.pixel_condition(shape, 2)
  cost += 2 * net.denoise(shape.unet, 12, 12, 36)
  inputs = _float(2, 48, 48, 3), _float(2, 36, 128)
  t = jnp.ones((2,), jnp.int32)
  params = _params(
    model, jnp.zeros(inputs[0].shape), t, jnp.zeros((2, 36, 128))
  )
  run = lambda p, x, y: model.apply({"params": p}, x, t, y)
  _assert_agrees(_counted(run, params, *inputs), cost.forward, 0.15)


def _outline(stage, **changes):
  """An objective of shapes alone, its networks wide enough to be counted."""
  module = importlib.import_module(f"lavit_jax.configs.tiny.{stage}")
  cfg = module.get_config()
  small = dict(width=256, depth=1, num_heads=4, mlp_dim=512)
  deep = small | dict(depth=2, unroll=2)
  words = tokenizer.TokenizerConfig(
    vit=dataclasses.replace(vision.TINY, **small),
    selector=selector.SelectorConfig(width=256),
    merger=merger.MergerConfig(**deep),
    quantizer=quantizer.QuantizerConfig(width=256, num_codes=64, code_dim=32),
    decoder=dataclasses.replace(decoder.TINY, **deep, out_dim=256),
  )
  cfg.assumed = dict(
    tokenizer=dataclasses.asdict(words), text_size=400, capacity=20
  )
  cfg.batch_size = 2
  cfg.data.threads = 0
  if stage == "tokenizer":
    parts = dataclasses.asdict(words)
    cfg.model.tokenizer = {k: v for k, v in parts.items() if k != "vit"}
  if stage == "pretrain":
    cfg.model.llm.update(small | {"num_kv_heads": 4, "unroll": 1})
    cfg.data.length, cfg.data.slots = 96, 3
  for path, value in changes.items():
    node, last = cfg, path
    if "__" in path:
      first, last = path.split("__")
      node = cfg[first]
    node[last] = value
  return objectives.build(cfg, artifacts.AbstractArtifacts(cfg))


def _counted_step(objective, phase):
  """What XLA counts in loss and gradients of a stage."""
  init = step_lib.init_fn(objective, 0)
  state = sharding.unbox(jax.eval_shape(init))
  labels = objective.labels(phase, state.params)

  def grads(params, frozen, extra, batch):
    def loss(chosen):
      whole = optimizer.merge(chosen, params)
      key = jax.random.key(0)
      return objective.loss(phase, whole, frozen, extra, batch, key)[0]

    return jax.value_and_grad(loss)(optimizer.select(params, labels))

  batch = objective.batch_shapes()
  return _counted(grads, state.params, objective.frozen, state.extra, batch)


@pytest.mark.parametrize("name", ["select", "codes"])
def test_a_step_of_the_tokenizer(name):
  objective = _outline("tokenizer")
  phase = objective.config.phases[name].to_dict()
  parts = flops.of_step(objective, phase)
  assert set(parts) == {
    "encoder",
    "selector",
    "merger",
    "quantizer",
    "decoder",
  }
  _assert_agrees(_counted_step(objective, phase), sum(parts.values()), 0.12)


def test_a_step_of_pretraining():
  objective = _outline("pretrain")
  phase = objective.last_phase
  config, length = objective.llama_config, objective.config.data.length
  parts = flops.of_step(objective, phase, segment=2 * length - 1)  # all keys
  _assert_agrees(_counted_step(objective, phase), sum(parts.values()), 0.1)
  whole = flops.of_step(objective, phase)
  short = flops.of_step(objective, phase, segment=10)
  per_key = 3 * 4 * config.width * config.depth * 2 * length
  assert parts["llm"] - whole["llm"] == per_key * (length - 1) / 2
  assert whole["llm"] - short["llm"] == per_key * (length - 10) / 2
  # Frozen: one forward pass of all images.
  vit = objective.tokenizer_config.vit
  assert parts["encoder"] == net.vit(vit, 2 * 3).forward


def test_what_lora_changes_gets_gradients_of_its_inputs_alone():
  rank = {"rank": 8, "alpha": 8.0}
  objective = _outline(
    "pretrain", model__lora=rank, model__frozen_dtype="float32"
  )
  train = {"lora": "llm", "merger": "visual", "projection": "visual"}
  phase = objective.last_phase | {"train": train}
  length = objective.config.data.length
  parts = flops.of_step(objective, phase, segment=2 * length - 1)
  _assert_agrees(_counted_step(objective, phase), sum(parts.values()), 0.1)
  config, tokens = objective.llama_config, 2 * length
  assert parts["head"] == 2 * net.llama_head(config, tokens).forward


def test_full_size_networks():
  config, tokens = llama.LLAMA2_7B, 4096
  kernels = 6_476_005_376  # parameters of 32 layers, norms apart
  cost = net.llama_layers(config, tokens, tokens)
  assert cost.weights == 2 * kernels * tokens
  assert cost.trained / (6 * kernels * tokens) == pytest.approx(1.083, abs=2e-3)
  # timm's table: eva_giant_patch14_224 takes 267 G multiply-adds.
  giant = net.vit(vision.EVA_VIT_G14, 1).forward
  assert giant / 2e9 == pytest.approx(267, rel=0.005)


@pytest.mark.parametrize("name", ["pretrain", "pixels_sd15", "pixels_sdxl"])
def test_steps_of_the_full_size_configs(name):
  module = importlib.import_module(f"lavit_jax.configs.lavit_7b.{name}")
  cfg = module.get_config()
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  parts = flops.of_step(objective, objective.last_phase)
  trained = {"pretrain": "llm"}.get(name, "unet")
  assert max(parts, key=parts.get) == trained
  assert parts["encoder"] < sum(parts.values())

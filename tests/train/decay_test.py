"""Which parameters weight decay pulls on: all of them, stage by stage."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet
from lavit_jax.models.tokenizer import decoder
from lavit_jax.train import optimizer, phases
from lavit_jax.train.objectives.frozen import latent_parts
from tests.train import drawn, latent_micro, outlines

# Every parameter by the last name of its path. A new name has to be put here.
_MATRICES = {"kernel", "qkv_kernel", "head"}
_TABLES = {"embedding"}
_LORA = {"a", "b"}
_NEVER = {
  *("bias", "qkv_bias", "q_bias", "v_bias", "scale", "log_scale"),
  *("pos_embed", "positional_embedding", "query_embed", "cls_token"),
  *("mask_token", "uncond", "uncond_embeddings"),
}
_RANK = {"model__lora": {"rank": 2, "alpha": 4.0}}


def _params(objective):
  return jax.eval_shape(objective.init, jax.random.key(0))[0]


def _latents(kind):
  """Parameters of stage `latents`: the U-Net, or its LoRA; projections."""
  scan = kind == "highres"
  net = unet.UNet(latent_micro.unet_config(kind, scan=scan))
  boxed = jax.eval_shape(lambda: latent_parts.init_unet(net, jax.random.key(0)))
  low = jax.eval_shape(lambda: lora.init(jax.random.key(0), boxed, 2))
  config, sizes = latent_micro.TOKENIZER.decoder, latent_micro.SIZES[kind]
  if scan:
    model = decoder.HighresDecoder(config, sizes["dims"], sizes["pooled"])
  else:
    model = decoder.LowresDecoder(config, *sizes["dims"])
  made = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 16, 8)), jnp.ones((1, 16), bool)
    )
  )
  return {"unet": boxed, "lora": low, "projection": made["params"]}


CASES = {
  **{
    stage: lambda stage=stage: _params(outlines.build(stage))
    for stage in ("encoder", "tokenizer", "autoencoder", "pixels", "pretrain")
  },
  "LoRA": lambda: _params(outlines.build("pretrain", **_RANK)),
  "lowres": lambda: _latents("lowres"),
  "highres": lambda: _latents("highres"),
}


@pytest.mark.parametrize("name", CASES)
def test_matrices_decay_and_nothing_else_in_every_stage(name):
  boxed = CASES[name]()
  for chosen, more in (
    ({}, set()),
    ({"decay_embeddings": True}, _TABLES),
    ({"decay_lora": True}, _LORA),
  ):
    found = optimizer.decay_mask(chosen, boxed)
    for path, decays in jax.tree_util.tree_leaves_with_path(found):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      last = re.split(r"[./]", name)[-1]
      assert last in _MATRICES | _TABLES | _LORA | _NEVER, name
      assert decays == (last in _MATRICES | more), name
  leaves = jax.tree.leaves(optimizer.decay_mask({}, boxed))
  assert any(leaves)
  assert not all(leaves)


def test_an_update_decays_matrices_alone():
  """With no gradient what decays shrinks by rate times decay, in its group."""
  objective = outlines.build("pretrain")
  boxed = _params(objective)
  params = drawn.draw(boxed)
  labels = jax.tree.map(lambda _: "base", params)
  labels["merger"] = jax.tree.map(lambda _: optimizer.FROZEN, params["merger"])
  config = dict(
    b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0, groups={"base": 2.0}
  )
  phase = phases.Phase(name="train", start=0, stop=10, lr=0.05)
  tx = optimizer.make(config, phase, labels, boxed)
  trained = optimizer.select(params, labels)

  @jax.jit
  def update(trained):
    zeros = jax.tree.map(jnp.zeros_like, trained)
    return tx.update(zeros, tx.init(trained), trained)[0]

  decayed = optimizer.decay_mask(config, boxed)
  moved = optimizer.merge(update(trained), jax.tree.map(np.zeros_like, params))
  rate = 2.0 * 0.05 * 0.1

  def check(path, decays, label, value, update):
    expected = -rate * value if decays and label == "base" else 0 * value
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)

  jax.tree_util.tree_map_with_path(check, decayed, labels, params, moved)


def test_the_reported_learning_rate_is_the_one_that_is_used():
  """Of the updates that were made, not of the steps that went by."""
  params = {"w": np.ones((2, 2), np.float32)}
  boxed = {"w": nn.LogicallyPartitioned(params["w"], ("embed", "mlp"))}
  config = dict(
    b1=0.0, b2=0.0, weight_decay=0.0, clip_norm=9.0, groups={"base": 1.0}
  )
  phase = phases.Phase(name="train", start=0, stop=10, lr=0.5, end_factor=0.0)
  tx = optimizer.make(config, phase, {"w": "base"}, boxed)
  state = tx.init(params)
  for step in range(8):
    rate = optimizer.learning_rate(phase, state)
    updates, new = tx.update(params, state, params)
    np.testing.assert_allclose(-updates["w"], rate, rtol=1e-5)
    if step % 2:  # every other one is left out
      state = new
  np.testing.assert_allclose(rate, optimizer.lr_schedule(phase)(3), rtol=1e-6)


def test_a_parameter_without_axes_is_an_error():
  with pytest.raises(errors.ConfigError, match="llm/head has no logical axes"):
    optimizer.decay_mask({}, {"llm": {"head": jnp.zeros((2, 2))}})


def test_the_state_of_the_optimizer_does_not_depend_on_what_decays():
  """So that a run goes on from a checkpoint of another choice."""
  params = sharding.unbox(CASES["LoRA"]())
  labels = jax.tree.map(lambda _: "base", params)
  config = dict(
    b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1.0, groups={"base": 1.0}
  )
  phase = phases.Phase(name="train", start=0, stop=9, lr=1.0)
  made = []
  for more in ({}, {"decay_lora": True}):
    tx = optimizer.make(config | more, phase, labels, CASES["LoRA"]())
    made.append(jax.eval_shape(tx.init, params))
  assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])

"""Low-rank changes of a frozen network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models import layers, lora
from lavit_jax.train.objectives.frozen import latent_parts
from tests.train import latent_micro


class _Net(nn.Module):
  """Two projections of the names that are changed, and one that is not."""

  @nn.compact
  def __call__(self, x):
    for name in ("to_q", "to_v", "proj"):
      dense = layers.dense(6, ("embed", "heads"), name=name)
      x = jnp.tanh(dense(x))
    return x


@pytest.fixture(scope="module")
def case():
  """(network, its parameters, its boxed parameters, an input)."""
  x = jax.random.normal(jax.random.key(0), (3, 6))
  boxed = _Net().init(jax.random.key(1), x)["params"]
  return _Net(), nn.meta.unbox(boxed), boxed, x


def _tree(boxed, rank=2, seed=0):
  """A LoRA whose `b` is not zero any more."""
  tree = nn.meta.unbox(lora.init(jax.random.key(seed), boxed, rank))
  return jax.tree.map(
    lambda v: v + jax.random.normal(jax.random.key(v.size), v.shape), tree
  )


def _apply(net, params, x, tree=None, scale=0.5):
  with lora.applied(tree, scale):
    return net.apply({"params": params}, x)


def test_a_new_lora_changes_nothing(case):
  net, params, boxed, x = case
  tree = nn.meta.unbox(lora.init(jax.random.key(0), boxed, 2))
  assert set(tree) == {"to_q", "to_v"}
  base = _apply(net, params, x)
  np.testing.assert_array_equal(_apply(net, params, x, tree), base)
  merged = lora.merge(params, tree, 0.5)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merged_weights_equal_network_and_lora_together(case):
  net, params, boxed, x = case
  tree = _tree(boxed)
  both = _apply(net, params, x, tree)
  alone = _apply(net, lora.merge(params, tree, 0.5), x)
  np.testing.assert_allclose(alone, both, atol=1e-6)
  assert np.abs(both - _apply(net, params, x)).max() > 0.05


def test_merged_kernels_are_kernel_plus_scaled_product(case):
  _, params, boxed, _ = case
  tree = _tree(boxed)
  merged = lora.merge(params, tree, 0.25)
  q = tree["to_q"]
  expected = params["to_q"]["kernel"] + 0.25 * np.asarray(q["a"]) @ q["b"]
  np.testing.assert_allclose(merged["to_q"]["kernel"], expected, rtol=1e-6)
  half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
  assert lora.merge(half, tree, 1.0)["to_q"]["kernel"].dtype == jnp.bfloat16


def test_gradients_reach_the_lora_as_they_reach_the_kernel(case):
  """Of b it is scale A^T times that of the merged kernel."""
  net, params, boxed, x = case
  tree = _tree(boxed)
  total = lambda tree: _apply(net, params, x, tree).sum()
  whole = lambda params: _apply(net, params, x).sum()
  low = jax.grad(total)(tree)["to_q"]["b"]
  full = jax.grad(whole)(lora.merge(params, tree, 0.5))["to_q"]["kernel"]
  np.testing.assert_allclose(low, 0.5 * tree["to_q"]["a"].T @ full, atol=1e-5)


def test_outside_of_the_block_the_network_is_unchanged(case):
  net, params, boxed, x = case
  base = _apply(net, params, x)
  _apply(net, params, x, _tree(boxed))
  np.testing.assert_array_equal(_apply(net, params, x), base)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_and_networks_that_make_no_sense_are_refused(case, rank):
  boxed = case[2]
  with pytest.raises(errors.ConfigError, match=r"model\.lora"):
    lora.init(jax.random.key(0), boxed, rank)
  with pytest.raises(errors.ConfigError, match=r"model\.lora"):
    lora.init(jax.random.key(0), {"proj": boxed["proj"]}, 2)


def test_a_lora_of_another_network_is_refused(case):
  _, params, boxed, _ = case
  with pytest.raises(errors.UsageError, match="another network"):
    lora.merge({"to_q": params["to_q"]}, _tree(boxed), 1.0)


def test_every_attention_of_a_u_net_is_adapted():
  config = latent_micro.unet_config("lowres")
  config = dataclasses.replace(config, transformer_layers=(1, 2))
  net = latent_parts.unet.UNet(config)
  boxed = jax.eval_shape(
    lambda key: latent_parts.init_unet(net, key), jax.random.key(0)
  )
  tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), boxed, 2))
  found = jax.tree_util.tree_leaves_with_path(tree)
  blocks = {jax.tree_util.keystr(path[:-3]) for path, _ in found}
  # Down 1, middle 1, up 2 of two layers, each with self- and cross-attention.
  assert len(blocks) == 16
  assert len(found) == 16 * 4 * 2

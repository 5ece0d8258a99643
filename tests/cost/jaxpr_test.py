"""FLOPs that are counted in a jaxpr, by hand, by JAX's gradients and by XLA."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lavit_jax.core import sharding
from lavit_jax.cost import jaxpr
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import vae

_X, _W = jnp.zeros((8, 4)), jnp.zeros((4, 6))
_FLOPS = 2 * 8 * 4 * 6  # of _X @ _W


def _total(function, *args, trained=None):
  return sum(jaxpr.count(function, *args, trained=trained).values())


def _shapes(module, *args):
  made = jax.eval_shape(module.init, jax.random.key(0), *args)
  return sharding.unbox(made)["params"]


def test_a_product_is_two_flops_a_pair():
  assert _total(jnp.matmul, _X, _W) == _FLOPS
  batched = jnp.zeros((3, 8, 4)), jnp.zeros((3, 4, 6))
  assert _total(jnp.matmul, *batched) == 3 * _FLOPS


def test_a_convolution_is_a_product_at_every_position():
  x = jnp.zeros((2, 10, 10, 4))

  def conv(groups, stride):
    kernel = jnp.zeros((3, 3, 4 // groups, 6))
    run = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(stride, stride),
      padding="SAME",
      feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return run, kernel

  run, kernel = conv(1, 1)
  assert _total(run, x, kernel) == 2 * 2 * 100 * 6 * 9 * 4
  run, kernel = conv(2, 1)
  assert _total(run, x, kernel) == 2 * 2 * 100 * 6 * 9 * 2
  run, kernel = conv(1, 2)
  forward = 2 * 2 * 25 * 6 * 9 * 4
  assert _total(run, x, kernel) == forward
  # The gradient's own zeros between the strides are no work.
  grads = jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1))
  assert _total(grads, x, kernel) == 2 * forward


def test_the_body_of_a_scan_counts_once_a_step():
  weights = jnp.zeros((5, 4, 4))

  def run(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  assert _total(run, weights, _X) == 5 * 2 * 8 * 4 * 4
  # The first layer's input is no parameter, those of the others are.
  assert _total(run, weights, _X, trained=True) == 3 * 5 * 2 * 8 * 4 * 4


def test_of_a_choice_the_most_expensive_or_the_default_counts():
  one, two = lambda x, w: x @ w, lambda x, w: x @ w + (x + 1) @ w
  run = lambda i, x, w: jax.lax.cond(i, two, one, x, w)
  assert _total(run, jnp.array(True), _X, _W) == 2 * _FLOPS
  run = functools.partial(jax.lax.platform_dependent, cpu=two, default=one)
  assert _total(run, _X, _W) == _FLOPS


def test_a_gradient_costs_a_product_for_each_trained_factor():
  loss = lambda factors: (factors["x"] @ factors["w"]).sum()
  args = {"x": _X, "w": _W}
  count = lambda x, w: _total(loss, args, trained={"x": x, "w": w})
  assert count(x=False, w=False) == _FLOPS
  assert count(x=True, w=False) == count(x=False, w=True) == 2 * _FLOPS
  assert count(x=True, w=True) == 3 * _FLOPS


@pytest.mark.parametrize(
  "cut", [jax.lax.stop_gradient, lambda y: y > 0, jnp.round]
)
def test_no_gradient_passes_what_has_none(cut):
  loss = lambda w, x: (cut(x @ w) * (x @ w)).sum()
  assert _total(loss, _W, _X, trained=True) == (1 + 2) * _FLOPS


def test_what_the_result_does_not_need_is_not_counted():
  def loss(w, x):
    unused = (x @ w) @ w.T
    return jnp.where(unused.shape[0] > 0, (x @ w).sum(), 0.0)

  assert _total(loss, _W, _X, trained=True) == 2 * _FLOPS


def test_a_gradient_by_hand_counts_as_any_other():
  @jax.custom_vjp
  def product(x, w):
    rounded = jnp.round(x).astype(jnp.int8)  # JAX's own gradient ends here
    return rounded.astype(x.dtype) @ w

  product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda *_: (_X, _W))
  loss = lambda factors: product(*factors).sum()
  assert _total(loss, (_X, _W), trained=(True, True)) == 3 * _FLOPS


def test_what_a_remat_policy_repeats_is_not_counted():
  sizes = dict(vocab_size=9, width=8, depth=3, num_heads=2, num_kv_heads=1)
  counts = []
  for remat in ("none", "dots", "full"):
    config = llama.LlamaConfig(**sizes, mlp_dim=16, remat=remat)
    model, tokens = llama.Llama(config), jnp.zeros((2, 5), jnp.int32)
    params = _shapes(model, tokens)
    loss = lambda p, t, model=model: model.apply({"params": p}, t).sum()
    trained = jax.tree.map(lambda _: True, params)
    counts.append(jaxpr.count(loss, params, tokens, trained=trained))
  assert counts[0] == counts[1] == counts[2]
  assert _total(jax.grad(loss), params, tokens) > sum(counts[0].values())


def test_scopes_are_the_paths_of_modules():
  config = vision.ViTConfig(
    image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=16
  )
  model, image = vision.EvaVit(config), jnp.zeros((3, 8, 8, 3))
  params = _shapes(model, image)
  found = jaxpr.count(lambda p, x: model.apply({"params": p}, x), params, image)
  rows = 3 * (4 + 1)
  assert found["EvaVit/blocks/mlp/fc1"] == 2 * (2 * rows * 8 * 16)


@pytest.mark.parametrize("kind", ["while", "shard_map"])
def test_products_that_cannot_be_counted_are_an_error(kind):
  def run(x):
    if kind == "while":
      return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)
    mesh = jax.make_mesh((1,), ("rows",))
    spec = jax.sharding.PartitionSpec()
    run = lambda x: x @ x
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(x)

  with pytest.raises(ValueError, match=f"^{kind} in .* multiplies"):
    jaxpr.count(run, jnp.zeros((4, 4)))


def _counted_by_xla(function, *args):
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.cost_analysis()["flops"]


def test_xla_counts_as_many_forward_and_backward():
  """It counts loops once and element-wise work too: unrolled, and wide."""
  config = llama.LlamaConfig(
    vocab_size=1000,
    width=256,
    depth=1,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=512,
  )
  model, tokens = llama.Llama(config), jnp.zeros((2, 64), jnp.int32)
  params = _shapes(model, tokens)
  loss = lambda p, t: jnp.square(model.apply({"params": p}, t)).mean()
  forward = _counted_by_xla(loss, params, tokens)
  assert _total(loss, params, tokens) == pytest.approx(forward, rel=0.05)
  trained = jax.tree.map(lambda _: True, params)
  both = _counted_by_xla(jax.value_and_grad(loss), params, tokens)
  found = _total(loss, params, tokens, trained=trained)
  assert found == pytest.approx(both, rel=0.05)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_xla_counts_as_many_in_convolutions(way):
  """It leaves out the zeros round the edge."""
  model = vae.AutoencoderKL(
    vae.VaeConfig(channels=(32, 64), layers_per_block=2, groups=8)
  )
  params = _shapes(model, jnp.zeros((1, 48, 32, 3)))
  shape = (1, 48, 32, 3) if way == "encode" else (1, 24, 16, 4)
  run = lambda p, x: model.apply({"params": p}, x, method=way)
  args = params, jax.ShapeDtypeStruct(shape, jnp.float32)
  assert _total(run, *args) == pytest.approx(
    _counted_by_xla(run, *args), rel=0.08
  )


def test_eva_vit_g_takes_the_multiply_adds_of_timms_table():
  """eva_giant_patch14_224: 267 G."""
  model = vision.EvaVit(vision.EVA_VIT_G14)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  params = _shapes(model, image)
  found = _total(lambda p, x: model.apply({"params": p}, x), params, image)
  assert found / 2e9 == pytest.approx(267, rel=0.005)

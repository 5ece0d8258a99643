"""Next-token losses: the blocked form is the plain one, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import sharding
from lavit_jax.train import losses
from tests.train import plain_losses

B, L, D, V = 2, 11, 8, 128


@pytest.fixture(scope="module")
def data():
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (B, L, D))
  head = jax.random.normal(keys[1], (V, D))
  targets = jax.random.randint(keys[2], (B, L), 0, 100)
  weights = jax.random.uniform(keys[3], (B, L)).at[0, 7:].set(0.0)
  return hidden, head, targets, weights


def _value_and_grad(loss, hidden, head, targets, weights, **kwargs):
  def scalar(hidden, head):
    total, nll = loss(hidden, head, targets, weights, **kwargs)
    return total, nll

  run = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
  return run(hidden, head)


@pytest.mark.parametrize("block", [3, 64])
def test_blocked_loss_and_gradients_equal_the_plain_ones(data, block):
  plain = _value_and_grad(plain_losses.next_token, *data, vocab_size=100)
  blocked = _value_and_grad(
    losses.next_token_blocked, *data, block=block, vocab_size=100
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    blocked,
    plain,
  )


def test_plain_loss_is_the_log_softmax_at_the_target(data):
  hidden, head, targets, weights = data
  total, nll = plain_losses.next_token(*data, vocab_size=100)
  scores = jax.nn.log_softmax((hidden @ head.T)[..., :100])
  expected = -jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, expected * (weights > 0), rtol=1e-5)
  np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-5)


def test_padding_rows_of_the_head_are_no_class(data):
  hidden, head, targets, weights = data
  grown = head.at[100:].set(50.0)
  total, _ = losses.next_token_blocked(
    hidden, grown, targets, weights, block=4, vocab_size=100
  )
  expected, _ = losses.next_token_blocked(
    hidden, head[:100], targets, weights, block=4
  )
  np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_positions_of_weight_zero_count_for_nothing(data):
  hidden, head, targets, weights = data
  other = targets.at[0, 7:].set(5)
  total, nll = losses.next_token_blocked(*data, block=4)
  again, nll_again = losses.next_token_blocked(
    hidden, head, other, weights, block=4
  )
  assert total == again
  np.testing.assert_array_equal(nll, nll_again)
  assert not np.any(nll[0, 7:])
  none, _ = losses.next_token_blocked(
    hidden, head, targets, jnp.zeros_like(weights), block=4
  )
  assert none == 0.0


def test_bfloat16_hidden_states_still_sum_in_float32(data):
  hidden, head, targets, weights = data
  low = hidden.astype(jnp.bfloat16)
  total, nll = losses.next_token_blocked(low, head, targets, weights, block=4)
  exact, _ = plain_losses.next_token(hidden, head, targets, weights)
  assert total.dtype == nll.dtype == jnp.float32
  np.testing.assert_allclose(total, exact, rtol=2e-2)


def _sizes(jaxpr):
  """The number of elements of every array in a jaxpr, inner ones too."""
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      yield int(np.prod(var.aval.shape))
    for value in eqn.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _sizes(inner)


def test_no_buffer_holds_all_the_logits():
  length, vocab = 64, 256
  args = (
    jnp.zeros((B, length, D)),
    jnp.zeros((vocab, D)),
    jnp.zeros((B, length), jnp.int32),
    jnp.ones((B, length)),
  )
  whole = B * length * vocab

  def largest(loss, **kwargs):
    grad = jax.grad(lambda *a: loss(*a, **kwargs)[0], (0, 1))
    compiled = jax.jit(grad).lower(*args).compile().as_text()
    shapes = (f"[{B},{length},{vocab}]", f"[{B * length},{vocab}]")
    return (
      max(_sizes(jax.make_jaxpr(grad)(*args).jaxpr)),
      any(f"f32{shape}" in compiled for shape in shapes),
    )

  assert largest(plain_losses.next_token) == (
    whole,
    True,
  )  # the test can see it
  size, in_hlo = largest(losses.next_token_blocked, block=8)
  assert size <= whole // 8
  assert not in_hlo


def test_loss_and_gradients_are_three_products_with_the_head(data):
  loss = functools.partial(losses.next_token_blocked, block=3)
  grad = jax.grad(lambda *given: loss(*given)[0], (0, 1))
  assert str(jax.make_jaxpr(grad)(*data)).count("dot_general[") == 3
  assert str(jax.make_jaxpr(loss)(*data)).count("dot_general[") == 1


def test_cosine_is_one_for_parallel_and_safe_at_zero():
  a = jnp.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
  b = jnp.array([[6.0, 8.0], [1.0, 0.0], [0.0, 2.0]])
  np.testing.assert_allclose(losses.cosine(a, b), [1.0, 0.0, 0.0], atol=1e-6)
  grad = jax.grad(lambda a: losses.cosine(a, b).sum())(a)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 2, "fsdp": 4},
    {"tensor": 8},
  ],
)
def test_the_vocabulary_may_be_split_over_a_mesh(sizes):
  rows, length = 8, 8
  keys = jax.random.split(jax.random.key(1), 3)
  hidden = jax.random.normal(keys[0], (rows, length, D))
  head = jax.random.normal(keys[1], (V, D))
  targets = jax.random.randint(keys[2], (rows, length), 0, 100)
  weights = jnp.ones((rows, length)).at[3, 2:].set(0.0)
  data = hidden, head, targets, weights
  plain = _value_and_grad(plain_losses.next_token, *data, vocab_size=100)
  loss = functools.partial(losses.next_token_blocked, block=3, vocab_size=100)
  mesh = sharding.make_mesh(sizes)
  with sharding.use(mesh):
    run = jax.jit(functools.partial(_value_and_grad, loss))
    split = run(*data)
    compiled = run.lower(*data).compile().as_text()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
    split,
    plain,
  )
  assert "all-reduce" in compiled or "reduce-scatter" in compiled

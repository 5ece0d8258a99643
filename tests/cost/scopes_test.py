"""Sums of FLOPs by network, and the keys that causal attention sees."""

import functools

import jax.numpy as jnp
import pytest

from lavit_jax.cost import jaxpr, scopes
from lavit_jax.models import layers

_PATTERNS = {"llm": "^Llama/", "head": "logits"}


def test_a_scope_belongs_to_the_first_network_that_matches():
  counts = {"Llama/logits": 1, "Llama/mlp": 2, "loss/logits": 4}
  assert scopes.by_network(counts, _PATTERNS) == {"llm": 3.0, "head": 4.0}
  assert scopes.by_network({"logits": 1}, _PATTERNS) == {"head": 1.0}


def test_a_scope_of_no_network_is_an_error():
  with pytest.raises(ValueError, match="'UNet/conv' multiplies matrices"):
    scopes.by_network({"UNet/conv": 1}, _PATTERNS)


@pytest.mark.parametrize("groups", [4, 2])
def test_causal_attention_counts_the_keys_that_a_token_sees(groups):
  length, heads, dim = 12, 4, 8
  query = jnp.zeros((3, length, heads, dim))
  key = jnp.zeros((3, length, groups, dim))

  def count(segment=None, **kwargs):
    run = lambda *args: layers.attention(*args, **kwargs)
    found = jaxpr.count(run, query, key, key)
    return sum(n * scopes.visible(s, segment) for s, n in found.items())

  pair = 2 * 2 * dim * heads  # a logit and a mixed value
  whole = 3 * length * length * pair
  assert count() == whole
  assert count(segment=4) == whole
  causal = functools.partial(count, causal=True)
  assert causal() == pytest.approx(3 * sum(range(1, length + 1)) * pair)
  # Three documents of four tokens a row.
  assert causal(segment=4) == pytest.approx(3 * 3 * (1 + 2 + 3 + 4) * pair)
  assert causal(segment=1) == pytest.approx(3 * length * pair)

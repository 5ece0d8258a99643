"""Replaces some visual tokens of the LLM's input by random ones.

The model must then predict an image from the prompt, not from the visual tokens
before. (Word dropout, Bowman et al. 2016, arXiv 1511.06349, section 3.1, with
random ids for unk.)
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lavit_jax.core import vocabulary


def draws(
  vocab: vocabulary.Vocabulary,
  shape: tuple[int, ...],
  share: float,
  rng: jax.Array,
) -> dict[str, jax.Array]:
  """Draws the random numbers that `apply` takes.

  Args:
    vocab: the ids.
    shape: (B, L).
    share: of the visual tokens that are replaced, in [0, 1].
    rng: a key.

  Returns:
    {"chosen": bool[B, L], "ids": int32[B, L], random codes}.
  """
  chosen_rng, id_rng = jax.random.split(rng)
  first, end = vocab.code_offset, vocab.size
  return {
    "chosen": jax.random.bernoulli(chosen_rng, share, shape),
    "ids": jax.random.randint(id_rng, shape, first, end, jnp.int32),
  }


def apply(
  vocab: vocabulary.Vocabulary,
  tokens: jax.Array,
  drawn: Mapping[str, jax.Array],
) -> jax.Array:
  """Replaces the chosen tokens that are visual; the targets stay.

  Args:
    vocab: the ids.
    tokens: int[B, L], input of the LLM.
    drawn: of `draws`, for these rows.

  Returns:
    int[B, L]; text and image marks are unchanged.
  """
  visual = (tokens >= vocab.code_offset) & (tokens < vocab.size)
  ids = drawn["ids"].astype(tokens.dtype)
  return jnp.where(drawn["chosen"] & visual, ids, tokens)

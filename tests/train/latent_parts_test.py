"""What a U-Net is told, with and without a condition."""

import jax.numpy as jnp
import numpy as np

from lavit_jax.infer import latents
from lavit_jax.train import latent_parts


def _told(kind):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  told = {"tokens": draw(3, 5, 4)}
  if kind == "highres":
    told |= {"pooled": draw(3, 2), "sizes": draw(3, 6)}
  return told, draw(2, 4)


def test_lowres_without_a_condition_sees_the_unconditional_tokens_alone():
  told, uncond = _told("lowres")
  drop = jnp.array([False, True, False])
  given = latent_parts.tell("lowres", told, uncond, drop)
  rest, seen = latents.pad_uncond(uncond, told["tokens"])
  assert given["condition_mask"].tolist() == [
    [True] * 5,
    [True, True, False, False, False],
    [True] * 5,
  ]
  np.testing.assert_array_equal(given["condition_mask"][1], seen[1])
  np.testing.assert_array_equal(given["condition"][1], rest[1])
  np.testing.assert_array_equal(given["condition"][0], told["tokens"][0])


def test_highres_without_a_condition_sees_zeros_and_its_sizes():
  told, _ = _told("highres")
  drop = jnp.array([False, True, False])
  given = latent_parts.tell("highres", told, None, drop)
  assert set(given) == {"condition", "pooled", "sizes"}
  assert not given["condition"][1].any()
  assert not given["pooled"][1].any()
  np.testing.assert_array_equal(given["sizes"], told["sizes"])
  for name, value in (("condition", "tokens"), ("pooled", "pooled")):
    np.testing.assert_array_equal(given[name][2], told[value][2])

"""Images scaled as torch's bicubic interpolation scales them."""

import numpy as np
import pytest

from lavit_jax.core import image_io
from lavit_jax.infer.presets import official_pixels


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ((90, 75), (56, 56)),
    ((20, 31), (56, 40)),
    ((1, 2), (5, 7)),
    ((8, 8), (8, 8)),
  ],
)
def test_bicubic_is_that_of_torch(before, after):
  torch = pytest.importorskip("torch", reason="the interpolation's origin")
  x = np.random.default_rng(0).random((2, *before, 3), np.float32)
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(x).permute(0, 3, 1, 2), after, mode="bicubic"
  ).permute(0, 2, 3, 1)
  ours = official_pixels.bicubic(x, after)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_flat_image_stays_flat_and_is_normalised():
  x = np.full((1, 9, 5, 3), 0.25, np.float32)
  found = official_pixels.clip_pixels(x, 4)
  wanted = image_io.normalize(np.full((1, 4, 4, 3), 0.25, np.float32))
  np.testing.assert_allclose(found, wanted, atol=1e-6)

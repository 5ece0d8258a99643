import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.evaluate import suite
from tests.data import fakes


def test_images_that_cannot_be_read_end_no_evaluation():
  source = fakes.Source({}, num_images=6, bad=(0, 3))
  indices, images = suite._readable(source, 3)
  assert indices == [1, 2, 4]
  np.testing.assert_array_equal(images[:, 0, 0, 0], [1, 2, 4])


@pytest.mark.parametrize("count", [0, 4])
def test_no_image_to_evaluate_on_is_said(count):
  source = fakes.Source({}, num_images=count, bad=range(4))
  with pytest.raises(errors.DataError, match="No image of fake to evaluate"):
    suite._readable(source, 3)

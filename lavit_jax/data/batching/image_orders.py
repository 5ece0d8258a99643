"""The endless order of the images of a source, or of a mixture of sources."""

import dataclasses

import numpy as np

from lavit_jax.data import examples
from lavit_jax.data.batching import mixtures, orders
from lavit_jax.data.sources import mixed


def of(source: examples.Source, seed: int) -> "Order":
  """Returns the endless order of a source's usable images.

  Those of a mixture of sources come by the weights of its parts.

  Args:
    source: an examples.Source.
    seed: of the order.
  """
  if not isinstance(source, mixed.MixedSource):
    usable = examples.usable(source)
    order = orders.Permutation(len(usable), orders.make_seed(seed))
    return OneOrder(order, usable)
  images, start = [], 0
  for part in source.parts:
    images.append(examples.usable(part.source) + start)
    start += part.source.num_images
  counts = [len(some) for some in images]
  weights = [
    part.weight if n else 0
    for part, n in zip(source.parts, counts, strict=True)
  ]
  names = [f"epoch/{part.name}" for part in source.parts]
  return Orders(mixtures.Mixture(counts, weights, seed), images, names)


@dataclasses.dataclass(frozen=True)
class OneOrder:
  """The images of a source in an endless order."""

  order: orders.Permutation
  images: np.ndarray

  def __getitem__(self, k: int) -> int:
    return int(self.images[self.order[k]])

  def epochs(self, k: int) -> dict[str, float]:
    """Returns how often all images were gone through before item k."""
    return {"epoch": k / len(self.images)}


@dataclasses.dataclass(frozen=True)
class Orders:
  """The images of several sources, in the order of a stream."""

  stream: mixtures.Mixture
  images: list[np.ndarray]  # of each part
  names: list[str]  # of each part's epochs, for logs

  def __getitem__(self, k: int) -> int:
    part, number = self.stream.document(k)
    return int(self.images[part][number])

  def epochs(self, k: int) -> dict[str, float]:
    """Returns how often each part was gone through before item k."""
    return dict(zip(self.names, self.stream.epochs(k).tolist(), strict=True))


Order = OneOrder | Orders

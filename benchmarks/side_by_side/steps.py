"""What is trained in the comparisons of training steps, and on what.

Neither JAX nor PyTorch is imported here: both sides read this.
"""

import dataclasses
import pathlib

import numpy as np

OPTIMIZER = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip_norm": 1.0}
LR = 1e-4
STEPS = 3  # whose losses are compared, beside the first
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
  """What `pytorch_side_by_side.measure` asks of a case."""

  name: str
  unit: str
  count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama:
  """A language model and its rows; the defaults have 101 M parameters."""

  width: int = 640
  depth: int = 12
  num_heads: int = 10
  mlp_dim: int = 1728
  vocab_size: int = 32000
  length: int = 256
  dtype: str = "float32"  # of the computation; parameters are float32

  def case(self) -> Case:
    """The step; `count` is of a row."""
    return Case("pretrain step", "tokens", self.length)

  def batch(self, count: int) -> dict[str, np.ndarray]:
    """Ids and the ids that follow them, int32[B, L] both."""
    rng = np.random.default_rng(_SEED)
    ids = rng.integers(0, self.vocab_size, (count, self.length + 1), np.int32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A frozen ViT, and selector, merger, quantizer, decoder of one width."""

  image_size: int = 224
  patch_size: int = 16
  width: int = 384
  num_heads: int = 6
  vit_depth: int = 12
  merger_depth: int = 4
  decoder_depth: int = 4
  num_codes: int = 4096
  code_dim: int = 32
  capacity: int = 128  # of 196 patches; half are expected at the start
  detail_weight: float = 1.0
  commitment: float = 0.25
  decay: float = 0.99
  dtype: str = "float32"

  @property
  def mlp_dim(self) -> int:
    """Hidden width of every MLP."""
    return 4 * self.width

  @property
  def num_patches(self) -> int:
    """N, patches of an image."""
    return (self.image_size // self.patch_size) ** 2

  def case(self) -> Case:
    """The step; `count` is of an image."""
    return Case("tokenizer step", "images", 1)

  def batch(self, count: int) -> dict[str, np.ndarray]:
    """Images uint8[B, H, W, 3], smooth and noisy."""
    rng = np.random.default_rng(_SEED)
    coarse = rng.integers(0, 256, (count, 7, 7, 3)).astype(np.float32)
    times = -(-self.image_size // 7)
    image = coarse.repeat(times, 1).repeat(times, 2)
    image = image[:, : self.image_size, : self.image_size]
    image = 0.8 * image + 0.2 * rng.integers(0, 256, image.shape)
    return {"image": image.astype(np.uint8)}


def weights_path(folder) -> pathlib.Path:
  """Where the parameters lie that both sides start from."""
  return pathlib.Path(folder) / "weights.npz"


def read(folder) -> dict:
  """The parameters as nested dictionaries of numpy arrays."""
  tree = {}
  with np.load(weights_path(folder)) as stored:
    for name in stored.files:
      node = tree
      *parents, last = name.split("/")
      for parent in parents:
        node = node.setdefault(parent, {})
      node[last] = stored[name]
  return tree

"""How an image is painted: the options that all pixel decoders share."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from lavit_jax.core import errors
from lavit_jax.diffusion import solvers

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelOptions:
  """Options of painting; None is what the pixel decoder does by default.

  Attributes:
    decoder: "highres", "lowres" or "pixels", see `pixels/decoders.py`.
    steps: of denoising (25 in latents, 20 without).
    solver: "ddim", or "dpm++" for few steps (10 to 20).
    decoder_guidance_scale: how closely pixels follow the visual words; 1 is
      off and takes half the time (highres 7, lowres 5, pixels 1).
    ratio: a name of `latents.RATIOS`, width to height.
    size: height and width, instead of a ratio; multiples of the pixels of a
      latent place (8).
    original_size: height and width that a highres decoder is told the image
      had before it was scaled; by default its own.
    crop: top and left that it is told were cut off.
    tile: decode latents in tiles with so many pixels a side, in less memory.
  """

  decoder: str | None = None
  steps: int | None = None
  solver: str = "ddim"
  decoder_guidance_scale: float | None = None
  ratio: str | None = None
  size: tuple[int, int] | None = None
  original_size: tuple[int, int] | None = None
  crop: tuple[int, int] = (0, 0)
  tile: int | None = None

  def __post_init__(self):
    solvers.named(self.solver)  # raises where there is none
    if self.steps is not None and self.steps < 1:
      raise errors.UsageError(f"steps={self.steps}: expected 1 or more.")
    if self.ratio is not None and self.size is not None:
      raise errors.UsageError(
        f"ratio={self.ratio!r} and size={self.size} were both given: a ratio"
        " tells the size. Leave one of them out."
      )
    for name in ("size", "original_size", "crop"):
      if (value := getattr(self, name)) is not None:
        object.__setattr__(self, name, _pair(name, value))

  def only_for(self, kind: str, takes: tuple[str, ...]) -> None:
    """UsageError where an option is given that a decoder does not take."""
    for field in dataclasses.fields(self):
      given = getattr(self, field.name)
      if field.name not in takes and given != field.default:
        raise errors.UsageError(
          f"{field.name}={given!r}: the pixel decoder {kind!r} does not take"
          f" it. It takes {', '.join(takes)}."
        )


def _pair(name, value) -> tuple[int, int]:
  """Two whole numbers; UsageError for anything else."""
  least = 0 if name == "crop" else 1
  try:
    first, second = (int(number) for number in value)
    if min(first, second) < least or (first, second) != tuple(value):
      raise ValueError
  except (TypeError, ValueError):
    raise errors.UsageError(
      f"{name}={value!r}: expected two whole numbers of at least {least},"
      f" {'top and left' if name == 'crop' else 'height and width'}."
    ) from None
  return first, second


class Listener:
  """A fixed callable that compiled programs call; it tells who listens now.

  A program is compiled for one callable. This one stays the same, whoever
  wants to know how far a drawing is.
  """

  def __init__(self):
    self._tell: Progress | None = None

  def __call__(self, done: int, steps: int) -> None:
    if self._tell is not None:
      self._tell(done, steps)

  @contextlib.contextmanager
  def telling(self, tell: Progress | None) -> Iterator[Progress | None]:
    """Gives what a program shall call, None where nobody listens."""
    self._tell = tell
    try:
      yield None if tell is None else self
    finally:
      self._tell = None

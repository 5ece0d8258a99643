"""Options of decoding an image, shared by all pixel decoders."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator

from lavit_jax.core import errors
from lavit_jax.diffusion import solvers
from lavit_jax.infer import ranges

Progress = Callable[[int, int], None]  # takes (steps done, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelOptions:
  """Options of decoding; None is the default of the pixel decoder.

  Attributes:
    decoder: "highres", "lowres" or "pixels", see `pixels/decoders.py`.
    steps: denoising steps (25 in latents, 20 without).
    solver: "ddim", or "dpm++" for few steps (10 to 20).
    decoder_guidance_scale: how closely pixels follow the visual tokens; 1 is
      off and takes half the time (highres 7, lowres 5, pixels 1).
    ratio: width to height, a name of `stable_diffusion.RATIOS`.
    size: height and width in pixels, instead of a ratio; multiples of the
      pixels per latent position (8).
    original_size: conditions a highres decoder on the height and width of the
      image before scaling; by default those of the image itself.
    crop: conditions a highres decoder on the pixels cut at the top and left.
    tile: decode latents in tiles of so many pixels a side, in less memory.
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
    for name in ("steps", "tile"):
      if getattr(self, name) is not None:
        ranges.replace(self, ranges.check_integer, name, 1)
    if self.decoder_guidance_scale is not None:
      ranges.replace(self, ranges.check_number, "decoder_guidance_scale")
    if not isinstance(self.decoder, str | None):
      raise errors.UsageError(
        f"decoder={self.decoder!r}: expected the name of a pixel decoder."
      )
    if self.ratio is not None and self.size is not None:
      raise errors.UsageError(
        f"ratio={self.ratio!r} and size={self.size}: a ratio already sets the"
        " size. Leave one of them out."
      )
    for name in ("size", "original_size", "crop"):
      if (value := getattr(self, name)) is not None:
        object.__setattr__(self, name, _pair(name, value))

  def require_only(self, kind: str, names: Collection[str]) -> None:
    """Checks that no other options are set than those of a decoder.

    Args:
      kind: of the decoder.
      names: of the options that it takes.

    Raises:
      errors.UsageError: another option differs from its default.
    """
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in names and value != field.default:
        raise errors.UsageError(
          f"{field.name}={value!r}: the pixel decoder {kind!r} does not take"
          f" this option. It takes {', '.join(names)}."
        )


def _pair(name, value) -> tuple[int, int]:
  """Returns two integers, or raises UsageError."""
  least = 0 if name == "crop" else 1
  try:
    first, second = (int(number) for number in value)
    if min(first, second) < least or (first, second) != tuple(value):
      raise ValueError
  except (TypeError, ValueError, OverflowError):
    raise errors.UsageError(
      f"{name}={value!r}: expected two whole numbers of at least {least},"
      f" {'top and left' if name == 'crop' else 'height and width'}."
    ) from None
  return first, second


class Listener:
  """A callback that stays the same object while its target changes.

  A program is compiled for one callback. This one forwards to whoever wants
  to know the progress of a call.
  """

  def __init__(self) -> None:
    """Makes a callback without a target."""
    self._target: Progress | None = None

  def __call__(self, done: int, steps: int) -> None:
    """Forwards the progress to the target, if there is one."""
    if self._target is not None:
      self._target(done, steps)

  @contextlib.contextmanager
  def forwarding(self, target: Progress | None) -> Iterator[Progress | None]:
    """Forwards to a target; yields the callback of a program, or None."""
    self._target = target
    try:
      yield None if target is None else self
    finally:
      self._target = None

"""A `jax.profiler` trace of some steps of a run."""

import jax

from lavit_jax.core import errors

FOLDER = "profile"


class Tracer:
  """Traces steps `first` to `last` of config.log.profile, both included.

  TensorBoard's profile plugin and xprof open what it writes to
  WORKDIR/profile. No such field, or an empty one: nothing is traced.
  """

  def __init__(self, config, workdir):
    """Raises ConfigError unless first and last are steps in order."""
    steps = tuple(config.log.get("profile", ()) or ())
    self._folder = workdir / FOLDER
    self._first, self._last = steps if len(steps) == 2 else (0, -1)
    self._running = False
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
      raise errors.ConfigError(
        f"log.profile={steps}: expected the first and the last step to trace,"
        " such as (10, 12), or () for none."
      )

  def before(self, step: int) -> None:
    """Called before every step."""
    if not self._running and self._first <= step <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, outputs) -> None:
    """Called after every step with some of its outputs."""
    if self._running and step >= self._last:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    """Ends a trace that is not over."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

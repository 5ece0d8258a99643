"""Errors that a user can fix; the command line prints them without a trace."""


class LavitError(ValueError):
  """An error whose message says what was given, expected, and can be done."""

  exit_status = 2  # of the command


class UsageError(LavitError):
  """A command or function was called with arguments that do not fit."""


class ConfigError(LavitError):
  """A config field is unknown, missing, or contradicts another one."""


class CheckpointError(LavitError):
  """A checkpoint is missing, damaged, or belongs to another model."""


class DataError(LavitError):
  """Data on disk cannot be used as requested."""


class Preempted(LavitError):
  """The run had to stop and has saved: the same command continues it."""

  exit_status = 75  # EX_TEMPFAIL, on which launchers start the run again


class Unreachable(LavitError):
  """Another machine did not answer; a later try may succeed."""

  exit_status = 69  # EX_UNAVAILABLE


class PeerLost(Unreachable):
  """Another process of this run has died, which ended the run."""

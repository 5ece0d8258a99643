"""Errors that are the user's to mend: the CLI prints them as one paragraph."""


class LavitError(ValueError):
  """What was given, what was expected, and what to do, in one paragraph."""

  exit_status = 2  # of the command


class UsageError(LavitError):
  """A command or function was called with arguments that do not fit."""


class ConfigError(LavitError):
  """A config field is unknown, missing or contradicts another."""


class CheckpointError(LavitError):
  """A checkpoint is missing, damaged or belongs to another model."""


class DataError(LavitError):
  """Data on disk cannot be used as asked."""


class Preempted(LavitError):
  """The run was asked to stop and has saved: give the same command again."""

  exit_status = 75  # EX_TEMPFAIL, by which launchers know to start it again


class Unreachable(LavitError):
  """Another machine did not answer: it may be there on the next try."""

  exit_status = 69  # EX_UNAVAILABLE


class PeerLost(Unreachable):
  """Another process of this run has died, and with it the run."""

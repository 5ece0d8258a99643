"""Errors that are the user's to mend: the CLI prints them as one paragraph."""


class LavitError(ValueError):
  """What was given, what was expected, and what to do, in one paragraph."""


class UsageError(LavitError):
  """A command or function was called with arguments that do not fit."""


class ConfigError(LavitError):
  """A config field is unknown, missing or contradicts another."""


class CheckpointError(LavitError):
  """A checkpoint is missing, damaged or belongs to another model."""


class DataError(LavitError):
  """Data on disk cannot be used as asked."""

"""What a run depends on, as fingerprints: data, caches, frozen weights.

They are kept in every checkpoint, and in part.json of what a run makes. A run
that goes on must find the same: else "the same batches, the same numbers" does
not hold. Only the first process reads and compares; if it fails, all do.
"""

import logging
from collections.abc import Mapping

from lavit_jax.core import agreement, errors, hosts

_LOG = logging.getLogger(__name__)


def of(objective) -> dict[str, str]:
  """{name: fingerprint} of all that a run takes; {} but on the first process.

  Names are those that `config.accept` takes: train_data, held_out_data,
  train_cache, held_out_cache, text_tokenizer, and of frozen weights encoder,
  tokenizer, semantic_decoder, autoencoder, llm, unet.
  """
  return objective.made_of() if hosts.is_lead() else {}


def check(found, ours: Mapping[str, str], config) -> None:
  """Whether a run goes on with what its checkpoint was made of.

  Args:
    found: the checkpoint, a `run_checkpoints.Restored`.
    ours: what `of` gives now.
    config: of the run; `accept` names what may differ.

  Raises:
    errors.DataError: something differs, and is not accepted.
  """
  if not ours:  # another process compares
    return
  what = f"What the checkpoint of step {found.step} was made of"
  if not (stored := found.meta.get("made_of")):
    _LOG.warning(
      "%s cannot be told: an earlier version wrote it. Whether data or frozen"
      " weights have changed since is not known",
      what,
    )
    return
  way_out = (
    "go on with what the run began with, or begin another in a new --workdir"
  )
  agreement.settle(
    agreement.prints(stored, ours, way_out),
    agreement.accepted(config),
    what=what,
    error=errors.DataError,
  )

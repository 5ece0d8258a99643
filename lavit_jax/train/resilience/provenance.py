"""Fingerprints of a run's inputs: data, caches, frozen weights.

They are kept in every checkpoint, and in part.json of what a run writes. A run
that goes on must find the same inputs: else "the same batches, the same
numbers" does not hold. Only the lead process reads and compares; if it fails,
all do.
"""

import logging
from collections.abc import Mapping

import ml_collections

from lavit_jax.core import agreement, errors, hosts
from lavit_jax.train.objectives import base
from lavit_jax.train.resilience import run_checkpoints

_LOG = logging.getLogger(__name__)


def of(objective: base.Objective) -> dict[str, str]:
  """Returns {name: fingerprint} of a run's inputs; {} but on the lead process.

  Names are those that `config.accept` takes: train_data, held_out_data,
  train_cache, held_out_cache, text_tokenizer, and of frozen weights encoder,
  tokenizer, semantic_decoder, autoencoder, llm, unet.
  """
  return objective.provenance() if hosts.is_lead() else {}


def check(
  restored: run_checkpoints.Restored,
  current: Mapping[str, str],
  config: ml_collections.ConfigDict,
) -> None:
  """Checks that a run goes on with the inputs of its checkpoint.

  Args:
    restored: the checkpoint.
    current: what `of` returns now.
    config: of the run; `accept` names what may differ.

  Raises:
    errors.DataError: something differs, and is not accepted.
  """
  if not current:  # the lead process compares
    return
  what = f"What the checkpoint of step {restored.step} was made of"
  if not (stored := restored.meta.get("made_of")):
    _LOG.warning(
      "%s is not known, because an earlier version wrote it. Data or frozen"
      " weights may have changed since",
      what,
    )
    return
  way_out = (
    "go on with what the run began with, or begin another in a new --workdir"
  )
  agreement.settle(
    agreement.fingerprints(stored, current, way_out),
    agreement.accepted(config),
    what=what,
    error=errors.DataError,
  )

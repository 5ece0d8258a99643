"""Checks that the parts of a model directory were trained together.

The metadata field `made_of` of a part has the fingerprints of the parts that it
was trained with. Weights of the right shapes always load, but the codes of a
tokenizer that was trained again mean nothing to an LLM.
"""

import os

from lavit_jax.core import agreement, errors
from lavit_jax.core.storage import checkpoints, files, fingerprints

_PRINTS = {
  "encoder": lambda folder: fingerprints.of_part(folder, "encoder"),
  "tokenizer": fingerprints.of_tokenizer,  # of both, as caches know them
}
# The parts that each part depends on, if not all of _PRINTS. `parts.py` checks
# the text tokenizer of an LLM.
_NEEDS = {"tokenizer": ("encoder",)}


def check_made_of(directory: str | os.PathLike, name: str) -> None:
  """Checks that a part was trained with the encoder and tokenizer beside it.

  A part without `made_of` passes, and nothing is read for it. Parts that the
  directory does not have are not compared.

  Args:
    directory: a model directory.
    name: of a part in it, of checkpoints.PARTS.

  Raises:
    errors.CheckpointError: a fingerprint differs.
  """
  recorded = checkpoints.read_meta(directory, name).get("made_of", {})
  parts = set(checkpoints.parts_in(directory))
  current = {
    other: _PRINTS[other](directory)
    for other in _NEEDS.get(name, tuple(_PRINTS))
    if other in recorded and {"encoder", other} <= parts
  }
  differences = agreement.fingerprints(recorded, current, "")
  if not differences:
    return
  others = " and ".join(one.name for one in differences)
  path = files.input_path(directory) / name / "part.json"
  raise errors.CheckpointError(
    f"{directory}: the part {name} was trained with another {others}:"
    f" {'; '.join(map(str, differences))}. Their visual tokens differ, so that"
    f" its output would mean nothing. Train {name} again with this {others}, or"
    f" restore the {others} that it was trained with. If the difference is"
    f" intended, remove {others} from made_of in {path}."
  )

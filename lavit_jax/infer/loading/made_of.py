"""Whether the parts of a model directory were trained with one another.

A part's `made_of` has the fingerprints of what it was trained with. Weights of
the right shapes load whatever they are; words of a tokenizer that was trained
since mean nothing to an LLM.
"""

from lavit_jax.core import agreement, errors
from lavit_jax.core.storage import checkpoints, files, fingerprints

_PRINTS = {
  "encoder": lambda folder: fingerprints.of_part(folder, "encoder"),
  "tokenizer": fingerprints.of_words,  # of both, as caches know them
}
# What each part stands on; an LLM's text is held to it by `parts.py`.
_NEEDS = {"tokenizer": ("encoder",)}


def check_made_of(directory, name: str) -> None:
  """Refuses a part that was trained with another encoder or tokenizer.

  A part that does not tell passes, and costs no reading; so does what is not
  in the directory.

  Args:
    directory: a model directory.
    name: of checkpoints.PARTS, there.

  Raises:
    errors.CheckpointError: what it was trained with is not what is there.
  """
  told = checkpoints.read_meta(directory, name).get("made_of", {})
  there = checkpoints.parts_in(directory)
  found = {
    other: _PRINTS[other](directory)
    for other in _NEEDS.get(name, tuple(_PRINTS))
    if other in told and {"encoder", other} <= set(there)
  }
  differ = agreement.prints(told, found, "")
  if not differ:
    return
  others = " and ".join(one.name for one in differ)
  path = files.place(directory) / name / "part.json"
  raise errors.CheckpointError(
    f"{directory}: the part {name} was trained with another {others}:"
    f" {'; '.join(map(str, differ))}. Their words differ, so that what it makes"
    f" would mean nothing. Train {name} again on what is there, or put back the"
    f" {others} that it was trained with. If the difference is meant, take"
    f" {others} out of made_of in {path}."
  )

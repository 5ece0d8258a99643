"""class LaVIT: one model that tokenizes, describes, answers and draws.

Loads a model directory (`checkpoints.py`) and offers the tasks of the paper.
Inputs are paths, PIL images or uint8 arrays, one or a list; a single input
gives a single output. Batches are padded to a few sizes and prompts to
multiples of 16, so that each padded shape compiles once.

Where a call leaves an option None, the preset of the model decides
(`presets/rules.py`): a model trained here decodes greedily, one imported from
the official release generates as the official classes do. Where the official
code has a quirk, a call does what is right, and `parity=True` reproduces the
quirk:

  call              parity=True
  all that read     patches are sampled (with seed, or 0) instead of the most
                    probable; orientation and transparency of an image are
                    ignored; "</s>" in a text is the token
  caption, answer   cut at every "." (answers: and ","): "3.14" becomes "3"
  write_codes       <unk>, <s>, </s> and [IMG] may be generated among visual
                    tokens (and are dropped), a negative prompt gets no [IMG],
                    images in a prompt get no [IMG] and [/IMG], and a prompt
                    with an image limits the visual tokens to its own length
"""

import os

from lavit_jax.infer import batches
from lavit_jax.infer.loading import parts
from lavit_jax.infer.tasks import image_tasks, text_tasks

resolve = parts.resolve


class LaVIT(text_tasks.TextTasks, image_tasks.ImageTasks):
  """A loaded model: `LaVIT.load("tiny")`, or a model directory."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    manner: str | None = None,
    max_batch: int = batches.SIZES[-1],
    check_safety: bool = True,
  ):
    """Opens a model directory; the other arguments are those of `load`."""
    super().__init__(
      directory,
      dtype=dtype,
      quantize=quantize,
      manner=manner,
      max_batch=max_batch,
      check_safety=check_safety,
    )

  @classmethod
  def load(
    cls,
    model: str | os.PathLike = "tiny",
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    manner: str | None = None,
    max_batch: int = batches.SIZES[-1],
    check_safety: bool = True,
  ) -> "LaVIT":
    """Opens a model; each part is read when it is first needed.

    Args:
      model: "tiny" (shipped), a model directory, or a quickstart workdir.
      dtype: "float32" or "bfloat16", of weights and computation. Visual
        tokens, and pixels decoded without latents, are float32 in any case.
      quantize: "int8" for the weights of the LLM (`loading/quantize.py`).
      manner: name of a preset, "ours" or "official" (`presets/rules.py`); None
        takes the preset of the model.
      max_batch: images or prompts at once; fewer need less memory.
      check_safety: run the safety checker of the model, if it has one: an
        image that it withholds is black (`safety.is_withheld`).

    Raises:
      errors.CheckpointError: there is no such model.
      errors.UsageError: an argument is out of its range.
    """
    return cls(
      resolve(model),
      dtype=dtype,
      quantize=quantize,
      manner=manner,
      max_batch=max_batch,
      check_safety=check_safety,
    )

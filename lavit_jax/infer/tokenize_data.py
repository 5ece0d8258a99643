"""`lavit tokenize --data`: the visual words of a whole dataset, on disk."""

import hashlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax import checkpoints, files, images, progress
from lavit_jax.data import cache, examples, faults, sources
from lavit_jax.infer import visual

_BATCH = 64


def fingerprint(directory) -> str:
  """Hex digest of the weights that make words: encoder and tokenizer."""
  digest = hashlib.sha256()
  for name in ("encoder", "tokenizer"):
    params = checkpoints.load_part(directory, name, dtype=None).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:32]


def write_cache(
  model,
  data: Mapping[str, Any] | str,
  out,
  *,
  split: str = "train",
  quiet: bool = False,
) -> dict[str, Any]:
  """Writes keep masks and codes of every picture of a dataset.

  Interrupt it anywhere and call it again: it goes on. Pictures that cannot be
  read are marked, counted and named in the log.

  Args:
    model: a model directory with encoder and tokenizer.
    data: config.data, or the path of a jsonl file, or "shapes".
    out: the cache's directory; it appears when it is complete.
    split: "train" or "held_out".
    quiet: no progress bar.

  Returns:
    `pictures`, `bad`, `mean_tokens`, `out`.
  """
  files.require_local(out, "a code cache")
  tokenizer = visual.VisualTokenizer(
    checkpoints.load_part(model, "encoder"),
    checkpoints.load_part(model, "tokenizer"),
  )
  if not isinstance(data, Mapping):
    data = _data_config(str(data), tokenizer.image_size)
  source = sources.build(data, split)
  meta = cache.Meta(
    source=examples.fingerprint(source),
    tokenizer=fingerprint(model),
    num_images=source.num_images,
    num_patches=tokenizer.num_patches,
    num_codes=tokenizer.num_codes,
  )
  log = faults.FaultLog("pictures", 0.2)
  label = f"tokenize {split}"
  with progress.Progress(
    source.num_images,
    start=cache.resume_point(out, meta),
    label=label,
    stream=io.StringIO() if quiet else None,
  ) as bar:
    written = cache.write(
      out, lambda start: _records(source, tokenizer, start, log, bar), meta
    )
  counts = np.asarray(written.counts)
  good = counts[counts >= 0]
  return {
    "pictures": len(counts),
    "bad": int((counts < 0).sum()),
    "mean_tokens": float(good.mean()) if len(good) else 0.0,
    "out": str(pathlib.Path(out)),
  }


def _data_config(data: str, image_size: int) -> dict[str, Any]:
  from lavit_jax.configs.tiny import common

  config = common.get_config("pretrain").data.to_dict()
  config["image_size"] = image_size
  if data != "shapes":
    config |= {"kind": "jsonl", "path": data}
  return config


def _records(source, tokenizer, start, log, bar):
  """(index, keep, codes) from picture `start` on; (index, None, None): bad."""
  for first in range(start, source.num_images, _BATCH):
    indices = range(first, min(first + _BATCH, source.num_images))
    size = (source.image_size, source.image_size, 3)
    batch = np.zeros((_BATCH, *size), np.uint8)
    good = np.zeros(_BATCH, bool)
    for row, index in enumerate(indices):
      try:
        batch[row] = source.image(index)
        good[row] = True
        log.good()
      except images.ImageError as error:
        log.fault(source.image_key(index), error)
    tokens = tokenizer.tokenize(batch, count=len(indices))
    for row, index in enumerate(indices):
      if good[row]:
        yield index, tokens[row]["keep"], tokens[row]["codes"]
      else:
        yield index, None, None
    bar.update(indices[-1] + 1, examples=len(indices))

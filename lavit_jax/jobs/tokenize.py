"""Writes the visual tokens of a dataset to disk (`lavit tokenize --data`)."""

import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax.configs.tiny import common
from lavit_jax.core import image_io, progress
from lavit_jax.core.storage import files, fingerprints
from lavit_jax.data import examples, faults
from lavit_jax.data.caches import codes, shards
from lavit_jax.data.images import image_bytes
from lavit_jax.data.sources import kinds
from lavit_jax.infer.loading import parts, spread
from lavit_jax.jobs import tokens_page

_BATCH = 64  # images a device
_SPLITS = ("train", "held_out")


def write_caches(
  model: str | os.PathLike[str],
  data: Mapping[str, Any] | str,
  out: str | os.PathLike[str],
  *,
  held_out: str = "",
  fields: Mapping[str, Any] | None = None,
  part: tuple[int, int] = (0, 1),
  page: str | os.PathLike[str] = "",
  quiet: bool = False,
) -> dict[str, dict[str, Any]]:
  """Writes the caches that stage pretrain needs: out/train and out/held_out.

  Args:
    model: a model directory with encoder and tokenizer.
    data: config.data, or the path of a jsonl file or of tar archives, or
      "shapes".
    out: the folder of both caches.
    held_out: path of the held-out images, of the same kind, if `data` is one;
      "" holds out a tenth of it, by hash.
    fields: override those of config.data.
    part: (number of this process, number of all) that write one cache.
    page: a page to write about the tokens; of both caches that of training.
    quiet: no progress bar.

  Returns:
    {"train": as returned by `write_cache`, "held_out": likewise}.

  Raises:
    errors.LavitError: see `write_cache`.
  """
  files.require_local(out, "a code cache")
  tokenizer = parts.visual_tokenizer(model)
  config = _data_config(data, tokenizer.image_size, held_out, fields)
  both = dict(zip(_SPLITS, kinds.pair(config), strict=True))
  return {
    split: _write(
      model,
      tokenizer,
      source,
      pathlib.Path(out) / split,
      split=split,
      description=kinds.describe(config, split, source),
      limit_share=faults.share_of(config),
      part=part,
      page=page if split == "train" else "",
      quiet=quiet,
    )
    for split, source in both.items()
  }


def write_cache(
  model: str | os.PathLike[str],
  data: Mapping[str, Any] | str,
  out: str | os.PathLike[str],
  *,
  split: str = "train",
  held_out: str = "",
  fields: Mapping[str, Any] | None = None,
  part: tuple[int, int] = (0, 1),
  page: str | os.PathLike[str] = "",
  quiet: bool = False,
) -> dict[str, Any]:
  """Writes keep masks and codes of all images of one split of a dataset.

  If it is interrupted, the next call resumes. Images that cannot be read are
  marked in the cache, counted and logged.

  Args:
    model: a model directory with encoder and tokenizer.
    data: config.data, or the path of a jsonl file or of tar archives, or
      "shapes".
    out: the cache's directory; it appears when it is complete.
    split: "train" or "held_out".
    held_out: see `write_caches`.
    fields: override those of config.data.
    part: (number of this process, number of all) that write one cache.
    page: a page to write about the tokens.
    quiet: no progress bar.

  Returns:
    `images`, the number of images; `bad`, that of unreadable ones;
    `mean_tokens`, codes an image; `out`, the directory.

  Raises:
    errors.LavitError: the model has no tokenizer, the data cannot be read, or
      the directory holds another cache.
  """
  files.require_local(out, "a code cache")
  tokenizer = parts.visual_tokenizer(model)
  config = _data_config(data, tokenizer.image_size, held_out, fields)
  source = kinds.build(config, split)
  return _write(
    model,
    tokenizer,
    source,
    out,
    split=split,
    description=kinds.describe(config, split, source),
    limit_share=faults.share_of(config),
    part=part,
    page=page,
    quiet=quiet,
  )


def _write(
  model,
  tokenizer,
  source,
  out,
  *,
  split,
  description,
  limit_share,
  part,
  page,
  quiet,
):
  """Writes the cache of one source, or a part of it; returns its summary."""
  meta = codes.Meta(
    source=examples.fingerprint(source),
    tokenizer=fingerprints.of_tokenizer(model),
    num_images=source.num_images,
    num_patches=tokenizer.num_patches,
    num_codes=tokenizer.num_codes,
    data=description,
    model=str(model),
    pictures=image_bytes.of(source),
  )
  log = faults.FaultLog("images", limit_share)
  total, done = meta.size_of(part), codes.resume_point(out, meta, part)
  groups = -(-source.num_images // _BATCH)
  devices = jax.local_devices()[: max(1, groups)]
  with progress.Progress(
    total,
    start=done,
    label=shards.label("tokenize", split, part),
    stream=io.StringIO() if quiet else None,
  ) as bar:
    tokens = spread.Spread(tokenizer, devices)
    reader = _Reader(source, tokens, log, bar, done)
    written = codes.write(
      out,
      reader.records,
      meta,
      part,
      quiet=quiet,
      together=jax.process_count() > 1,
    )
  if written is None:
    return {"images": total, "out": str(pathlib.Path(out)), "part": part[0] + 1}
  if page:
    tokens_page.write(written, source, page)
  counts = np.asarray(written.counts)
  good = counts[counts >= 0]
  return {
    "images": len(counts),
    "bad": int((counts < 0).sum()),
    "mean_tokens": float(good.mean()) if len(good) else 0.0,
    "out": str(pathlib.Path(out)),
  }


def _data_config(data, image_size, held_out, fields) -> dict[str, Any]:
  """Returns config.data of the dataset that the command names."""
  if isinstance(data, Mapping):
    return {**data, **(fields or {})}
  config = common.get_config("pretrain").data.to_dict()
  config["image_size"] = image_size
  if str(data) != "shapes":
    config |= {
      "kind": kinds.kind_of(data),
      "path": str(data),
      "held_out_path": held_out,
    }
  return config | dict(fields or {})


class _Reader:
  """Tokenizes the images of a source, group by group."""

  def __init__(self, source, spread_, log, bar, done):
    self._source, self._spread = source, spread_
    self._log, self._bar, self._done = log, bar, done

  def records(self, start: int, stop: int) -> Iterator[codes.Record]:
    """Yields (index, keep, codes) of images; None for those of a bad one."""
    source, log = self._source, self._log
    step = _BATCH * self._spread.count
    for first in range(start, stop, step):
      indices = range(first, min(first + step, stop))
      size = (source.image_size, source.image_size, 3)
      batch = np.zeros((step, *size), np.uint8)
      good = np.zeros(step, bool)
      for row, index in enumerate(indices):
        try:
          batch[row] = source.image(index)
          good[row] = True
          log.good()
        except image_io.ImageError as error:
          log.fault(source.image_key(index), error)
      if len(indices) == source.num_images:
        log.check()  # there may be too few images for `log.fault` to check
      tokens = self._spread.tokenize(batch, len(indices))
      for row, index in enumerate(indices):
        if good[row]:
          yield index, tokens[row]["keep"], tokens[row]["codes"]
        else:
          yield index, None, None
      self._done += len(indices)
      self._bar.update(self._done, examples=len(indices))

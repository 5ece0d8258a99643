"""Writes tar archives for tests."""

import io
import json
import tarfile
from unittest import mock

import numpy as np
from PIL import Image

from lavit_jax.data.indexes import (
  tar_groups,
  tar_members,
  tar_runs,
  tar_samples,
)


def jpeg(seed=0, size=(24, 16)):
  """Encoded bytes of an image of noise."""
  pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG")
  return file.getvalue()


def write(path, files, format=tarfile.USTAR_FORMAT):
  """Writes (name, bytes) pairs; a TarInfo in place of a name as it is."""
  with tarfile.open(path, "w", format=format) as tar:
    for name, data in files:
      info = name
      if isinstance(name, str):
        info = tarfile.TarInfo(name)
        info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def sample(key, caption=None, *, seed=0, meta=None):
  """Files of a sample: an image, its caption, its json."""
  files = [(f"{key}.jpg", jpeg(seed))]
  if caption is not None:
    files.append((f"{key}.txt", caption.encode()))
  if meta is not None:
    files.append((f"{key}.json", json.dumps(meta).encode()))
  return files


def shards(folder, count, samples=4):
  """Archives 00000.tar …, each of some samples with captions."""
  folder.mkdir(exist_ok=True)
  for s in range(count):
    files = []
    for k in range(samples):
      number = s * samples + k
      files += sample(f"{number:06d}", f"image {number}", seed=number)
    write(folder / f"{s:05d}.tar", files)
  return folder


def found(data):
  """All in the bytes of an archive, found by runs and also one by one."""
  read = lambda start, size: data[start : start + size]
  members = lambda: list(
    tar_members.members(tar_members.Window(read, len(data)))
  )
  by_runs = members()
  empty = np.zeros((0, 100), np.uint8), np.zeros(0, int), np.zeros(0, int)
  no_run = lambda piece, at, length: tar_runs.Run(*empty, at)
  with mock.patch.object(tar_runs, "find", no_run):
    assert members() == by_runs
  return by_runs


def samples(data):
  """The samples in the bytes of an archive, grouped by runs and by files."""
  read = lambda start, size: data[start : start + size]
  by_runs = tar_samples.of(read, len(data))
  with mock.patch.object(tar_groups, "of", return_value=None):
    by_files = tar_samples.of(read, len(data))
  assert by_runs.columns.tolist() == by_files.columns.tolist()
  assert by_runs.names == by_files.names
  assert by_runs.captions == by_files.captions
  assert sorted(by_runs.faults) == sorted(by_files.faults)
  for reason, (count, _) in by_runs.faults.items():
    assert count == by_files.faults[reason][0]
  return by_runs

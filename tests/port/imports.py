"""Imports of small checkpoints, and what tests compare of them."""

import json

import numpy as np
import pytest
import torch
from safetensors import torch as safe

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.port import importing
from tests.port import sources


def imported(source, target, **kwargs):
  return importing.run(source, target, quiet=True, **kwargs)


def params(model, part):
  """Returns the flat arrays of a part as they are stored."""
  loaded = checkpoints.load_part(model, part, dtype=None)
  flat = sources.flatten(loaded.params)
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


def assert_equal(found, wanted):
  assert set(found) == set(wanted)
  for path, value in wanted.items():
    assert found[path].dtype == value.dtype, path
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def refusal(source, tmp_path, **kwargs):
  """Returns the error of a refused import, which leaves no files."""
  before = set(tmp_path.iterdir())
  with pytest.raises(errors.LavitError) as caught:
    imported(source, tmp_path / "model", **kwargs)
  assert set(tmp_path.iterdir()) == before
  return str(caught.value)


def shard(folder, count, safetensors):
  """Splits the LLM of a source into shards with an index."""
  tensors = sources.load(folder / sources.LLM)
  (folder / sources.LLM).unlink()
  suffix = "safetensors" if safetensors else "bin"
  stem = "model" if safetensors else "pytorch_model"
  weight_map = {}
  for i in range(count):
    file = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"
    part = dict(list(tensors.items())[i::count])
    path = folder / "language_model" / file
    if safetensors:
      safe.save_file({k: v.contiguous() for k, v in part.items()}, path)
    else:
      torch.save(part, path)
    weight_map |= dict.fromkeys(part, file)
  index = folder / "language_model" / f"{stem}.{suffix}.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return index, weight_map

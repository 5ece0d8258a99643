import json
import pathlib
import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reads PyTorch files")

from lavit_jax.core import errors
from lavit_jax.port import importing
from lavit_jax.port.formats import tensors
from lavit_jax.port.reading import hub, unsupported
from tests.port import sources


def refusal(place):
  """Returns the error for a path that is no checkpoint."""
  with pytest.raises(errors.CheckpointError) as caught:
    importing._plan(hub.resolve(place), None, None, (), None, 0)
  return str(caught.value)


def names_of(path):
  return set(tensors.open_file(path))


@pytest.mark.parametrize(
  "wrapped",
  [
    "module.{}.{}",
    "_orig_mod.{}.{}",
    "module._orig_mod.{}.{}",
    "_orig_mod.module.{}.{}",
    "_forward_module.{}.{}",
    "{}._orig_mod.{}",
    "_fsdp_wrapped_module.{}._checkpoint_wrapped_module.{}",
  ],
)
def test_prefixes_of_wrappers_are_removed_from_names(tmp_path, wrapped):
  pairs = (("model", "norm.weight"), ("lm_head", "weight"))
  state = {wrapped.format(*pair): torch.ones(2) for pair in pairs}
  sources.save(tmp_path / "w.bin", state)
  assert names_of(tmp_path / "w.bin") == {"model.norm.weight", "lm_head.weight"}


def test_a_wrapped_encoder_is_imported_as_the_bare_one(tmp_path):
  state = sources.state()[sources.FILES["encoder"]]
  sources.save(tmp_path / "bare.bin", state)
  wrapped = {f"module.{name}": value for name, value in state.items()}
  sources.save(tmp_path / "wrapped.bin", wrapped)
  plans = [
    importing._plan(tmp_path / name, None, 3, (), None, 0)
    for name in ("bare.bin", "wrapped.bin")
  ]
  bare, same = (
    {array.path: array.sources for array in p.parts[0].arrays} for p in plans
  )
  assert set(bare) == set(same)
  for path, listed in bare.items():
    for a, b in zip(listed, same[path], strict=True):
      np.testing.assert_array_equal(a.read(), b.read())


def test_an_index_may_name_wrapped_tensors(tmp_path):
  torch.save({"module.a": torch.ones(2)}, tmp_path / "one.bin")
  torch.save({"module.b": torch.ones(3)}, tmp_path / "two.bin")
  weight_map = {"module.a": "one.bin", "module.b": "two.bin"}
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert set(tensors.open_index(index, "x")) == {"a", "b"}


def test_a_prefix_of_only_some_names_stays(tmp_path):
  state = {"module.a": torch.ones(2), "b": torch.ones(2)}
  sources.save(tmp_path / "some.bin", state)
  assert names_of(tmp_path / "some.bin") == set(state)
  state = {"_orig_mod.a": torch.ones(2), "a": torch.zeros(2)}
  sources.save(tmp_path / "twice.bin", state)
  with pytest.raises(
    errors.CheckpointError, match="with and without a wrapper's prefix: a"
  ):
    tensors.open_file(tmp_path / "twice.bin")


SINGLE = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (SINGLE, "single-file checkpoint of Stable Diffusion.*from_single_file"),
    ("control_model.input_blocks.0.0.weight", "ControlNet"),
    ("lora_unet_down_blocks_0.lora_down.weight", "adapter.*merge"),
    ("base_model.model.x.q_proj.lora_A.weight", "adapter.*merge"),
    ("model.layers.0.mlp.up_proj.qweight", "quantized"),
  ],
)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, name, expected):
  state = {name: torch.ones(2, 2), "cond_stage_model.x": torch.ones(2)}
  sources.save(tmp_path / "file.bin", state)
  text = refusal(tmp_path / "file.bin")
  assert "not used" not in text
  assert re.search(expected, text)


def test_tensors_of_official_files_are_not_mistaken_for_other_kinds():
  for state in sources.state().values():
    assert unsupported.describe_names(state) is None


def test_a_file_without_any_expected_name_is_one_line(tmp_path):
  state = {f"student.block_{i}.w": torch.ones(2) for i in range(50)}
  sources.save(tmp_path / "file.bin", state)
  text = refusal(tmp_path / "file.bin")
  assert "none of the tensors that belong there" in text
  assert "50 names, all under 'student', are such as student.block_0.w" in text
  assert len(text) < 500


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({"llama-7b.Q4_K_M.gguf": b"GGUF"}, ["llama-7b.Q4_K_M.gguf", "llama.cpp"]),
    (
      {
        "adapter_config.json": b'{"base_model_name_or_path": "a/base"}',
        "adapter_model.safetensors": b"",
      },
      ["adapter", "merge_and_unload", "a/base"],
    ),
    ({"consolidated.00.pth": b"", "params.json": b"{}"}, ["Meta's own"]),
    ({"v1-5-pruned.ckpt": b""}, ["v1-5-pruned.ckpt", "from_single_file"]),
    (
      {"model_index.json": b'{"_class_name": "FluxPipeline"}'},
      ["without a U-Net", "FluxPipeline"],
    ),
  ],
)
def test_a_folder_of_another_kind_is_named(tmp_path, files, expected):
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  text = refusal(tmp_path)
  assert "looks like" in text
  assert not [part for part in expected if part not in text]
  if len(files) == 1:
    (file,) = tmp_path.iterdir()
    assert ("looks like" in refusal(file)) == (file.suffix != ".json")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_unsupported_pickle_protocol_is_named_as_the_reason(
  tmp_path, protocol, zipped
):
  path = pathlib.Path(tmp_path / "state.bin")
  torch.save(
    {"a": torch.ones(3)},
    path,
    pickle_protocol=protocol,
    _use_new_zipfile_serialization=zipped,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    if protocol < 4:
      assert names_of(path) == {"a"}
      return
    with pytest.raises(errors.CheckpointError) as caught:
      tensors.open_file(path)
  assert f"pickled by protocol {protocol}" in str(caught.value)
  assert "save it again" in str(caught.value)
  assert "names code" not in str(caught.value)

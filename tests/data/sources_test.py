"""config.data becomes a source with every field of it."""

import importlib
import json

import pytest
from PIL import Image

from lavit_jax import errors, quickstart
from lavit_jax.data import sources
from tests.configs_test import CONFIGS

_FIELDS = {"kind": "jsonl", "image_size": 8, "held_out_path": ""}


def _file(tmp_path, rows):
  folder = tmp_path / "lines"
  folder.mkdir()
  Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
  Image.new("RGB", (1, 1)).save(folder / "b.png")
  path = folder / "d.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def test_pictures_outside_the_folder_need_a_field_that_the_error_names(
  tmp_path,
):
  row = {"image": str(tmp_path / "a.png"), "caption": "x"}
  data = _FIELDS | {"path": str(_file(tmp_path, [row])), "held_out_path": ""}
  data["held_out_path"] = data["path"]
  with pytest.raises(errors.DataError, match=r"config\.data\.allow_absolute"):
    sources.build(data, "held_out")
  source = sources.build(data | {"allow_absolute": True}, "held_out")
  assert source.num_images == 1


def test_how_many_lines_may_be_bad_is_a_field_that_the_error_names(tmp_path):
  rows = [{"image": "b.png", "caption": "x"}] * 3 + [{}]
  path = str(_file(tmp_path, rows))
  data = _FIELDS | {"path": path, "held_out_path": path}
  for share in ({}, {"limit_share": 0.2}):
    with pytest.raises(errors.DataError, match=r"config\.data\.limit_share"):
      sources.build(data | share, "train")
  assert sources.build(data | {"limit_share": 0.3}, "train").faults.bad == 1
  with pytest.raises(errors.ConfigError, match="limit_share=7"):
    sources.build(data | {"limit_share": 7}, "train")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_the_fields_that_errors_name(name):
  dotted = name.removesuffix(".py").replace("/", ".")
  data = (
    importlib.import_module(f"lavit_jax.configs.{dotted}").get_config().data
  )
  assert data.limit_share == 0.05
  assert data.allow_absolute is False


def test_quickstart_passes_fields_to_every_stage(tmp_path):
  fields = {"limit_share": 0.3, "allow_absolute": True}
  configs = quickstart._configs(
    tmp_path, quickstart._committed, None, "my.jsonl", fields
  )
  for config in configs.values():
    assert config.data.limit_share == 0.3
    assert config.data.allow_absolute
  assert quickstart._data_of(tmp_path, "my.jsonl", fields)["allow_absolute"]

"""The fields of config.data reach the source."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from lavit_jax import configs
from lavit_jax.core import errors
from lavit_jax.data.sources import kinds

_CONFIGS = sorted(
  f"{path.parent.name}.{path.stem}"
  for path in pathlib.Path(configs.__file__).parent.glob("*/*.py")
  if path.stem not in ("__init__", "common")
)
_FIELDS = {"kind": "jsonl", "image_size": 8, "held_out_path": ""}


def _file(tmp_path, rows):
  folder = tmp_path / "lines"
  folder.mkdir()
  Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
  Image.new("RGB", (1, 1)).save(folder / "b.png")
  path = folder / "d.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


def test_images_outside_the_folder_need_a_field_that_the_error_mentions(
  tmp_path,
):
  row = {"image": str(tmp_path / "a.png"), "caption": "x"}
  data = _FIELDS | {"path": str(_file(tmp_path, [row])), "held_out_path": ""}
  data["held_out_path"] = data["path"]
  with pytest.raises(errors.DataError, match=r"config\.data\.allow_absolute"):
    kinds.build(data, "held_out")
  source = kinds.build(data | {"allow_absolute": True}, "held_out")
  assert source.num_images == 1


def test_a_path_beside_drawn_scenes_is_refused(tmp_path):
  path = _file(tmp_path, [{"image": "b.png", "caption": "x"}])
  data = {"kind": "shapes", "image_size": 32, "seed": 0, "train_size": 4}
  with pytest.raises(errors.ConfigError, match=r"data\.kind=jsonl"):
    kinds.build(data | {"path": str(path)}, "train")
  assert kinds.build(data | {"path": ""}, "train").num_images == 8


def test_fields_of_other_names_are_read_of_a_single_file_too(tmp_path):
  path = _file(tmp_path, [{"image": "b.png", "said": "x"}])
  data = _FIELDS | {"path": str(path), "held_out_path": str(path)}
  assert not kinds.build(data, "train").tasks()
  source = kinds.build(data | {"text_feature": "said"}, "train")
  assert source.captions(0) == ["x"]


@pytest.mark.parametrize("kind", ["webdataset", "arrayrecord"])
def test_names_of_columns_where_there_are_none_are_refused(kind):
  data = {"kind": kind, "path": "x", "image_size": 8, "text_feature": "said"}
  with pytest.raises(errors.ConfigError, match="names a column, and data"):
    kinds.build(data, "train")


def test_errors_of_a_mixture_name_the_source(tmp_path):
  sources = {"mine": {"kind": "nonsense"}}
  data = _FIELDS | {"path": "", "sources": sources}
  with pytest.raises(
    errors.ConfigError, match=r"^config\.data\.sources\.mine:"
  ):
    kinds.build(data, "train")


def test_a_folder_without_data_says_what_is_there_and_which_one_is_meant(
  tmp_path,
):
  (tmp_path / "README.md").write_text("")
  assert kinds.is_empty(tmp_path)
  assert "It holds README.md." in kinds.nothing_in(tmp_path)
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "a.parquet").write_text("")
  said = kinds.nothing_in(tmp_path)
  assert f"Give one of its folders, {tmp_path / 'data'}." in said
  assert not kinds.is_empty(tmp_path / "data")


def _pair(tmp_path, caplog, train, held_out, **more):
  """Returns the warnings of `kinds.pair` for two files, (path, rows) each."""
  data = _FIELDS | more
  for field, (name, rows) in {
    "path": train,
    "held_out_path": held_out,
  }.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    data[field] = str(path)
  caplog.clear()
  kinds.pair(data)
  return [r.getMessage() for r in caplog.records if "held-out" in r.msg]


def _images(folder, names):
  folder.mkdir(exist_ok=True, parents=True)
  for name in names:
    Image.new("RGB", (1, 1)).save(folder / name)


def _rows(names):
  return [{"image": name, "caption": "x"} for name in names]


def test_images_that_two_files_share_are_counted(tmp_path, caplog):
  names = [f"{i}.png" for i in range(12)]
  _images(tmp_path / "a", names)
  (tmp_path / "linked").symlink_to(tmp_path / "a")
  (tmp_path / "files").mkdir()
  for name in names[:3]:
    (tmp_path / "files" / f"of_{name}").symlink_to(f"../a/{name}")
  train = ("a/train.jsonl", _rows(names[2:]))
  up = {"allow_absolute": True}
  for held_out, shared in (
    (("a/held.jsonl", _rows(names[:5])), "3 of 5"),
    (("linked/held.jsonl", _rows(names[:4])), "2 of 4"),
    (("b/held.jsonl", _rows([f"../a/{n}" for n in names])), "10 of 12"),
    (("files/held.jsonl", _rows([f"of_{n}" for n in names[:3]])), "1 of 3"),
  ):
    (said,) = _pair(tmp_path, caplog, train, held_out, **up)
    assert f"{shared} held-out images are in the training data too" in said
  assert not _pair(tmp_path, caplog, train, ("a/h.jsonl", _rows(names[:2])))


def test_images_of_one_name_in_two_folders_are_not_shared(tmp_path, caplog):
  rows = _rows(["0.png"])
  for folder in "ab":
    _images(tmp_path / folder, ["0.png"])
  assert not _pair(tmp_path, caplog, ("a/d.jsonl", rows), ("b/d.jsonl", rows))


def test_held_out_texts_of_the_training_file_are_warned_of(tmp_path, caplog):
  one = ("d.jsonl", [{"text": f"words {i}"} for i in range(4)])
  (said,) = _pair(tmp_path, caplog, one, one)
  assert "4 of 4 held-out examples" in said


def test_the_limit_of_bad_lines_is_a_field_that_the_error_mentions(tmp_path):
  rows = [{"image": "b.png", "caption": "x"}] * 3 + [{}]
  path = str(_file(tmp_path, rows))
  data = _FIELDS | {"path": path, "held_out_path": path}
  for share in ({}, {"limit_share": 0.2}):
    with pytest.raises(errors.DataError, match=r"config\.data\.limit_share"):
      kinds.build(data | share, "train")
  assert kinds.build(data | {"limit_share": 0.3}, "train").faults.bad == 1
  with pytest.raises(errors.ConfigError, match="limit_share=7"):
    kinds.build(data | {"limit_share": 7}, "train")


@pytest.mark.parametrize("name", _CONFIGS)
def test_every_config_has_the_fields_that_errors_mention(name):
  dotted = name.removesuffix(".py").replace("/", ".")
  data = (
    importlib.import_module(f"lavit_jax.configs.{dotted}").get_config().data
  )
  assert data.limit_share == 0.05
  assert data.allow_absolute is False


def test_a_jsonl_source_without_a_path_is_refused():
  with pytest.raises(errors.ConfigError, match=r"--config\.data\.path="):
    kinds.build(_FIELDS | {"path": ""}, "train")


def test_datasets_of_other_kinds_do_not_import_tfds():
  code = (
    "import sys; from lavit_jax.data.sources import kinds;"
    "assert 'tensorflow_datasets' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"image_size": 0}, "image_size=0: expected pixels"),
    ({"image_size": "x"}, "image_size='x': expected pixels"),
    ({"image_size": -3}, "image_size=-3: expected pixels"),
    ({"limit_share": "x"}, "limit_share='x': expected a share"),
    ({"reweighted": [1]}, r"reweighted=\[1\]: expected weights"),
    ({"sources": {"a": {"weight": 0.0}}}, "all have weight 0"),
  ],
)
def test_numbers_that_are_none_are_told(tmp_path, fields, says):
  path = str(_file(tmp_path, [{"text": "words"}]))
  data = _FIELDS | {"path": path, "held_out_path": path}
  if "reweighted" in fields:
    data |= {"sources": {"a": {}}}
  with pytest.raises(errors.ConfigError, match=says):
    kinds.build(data | fields, "train")

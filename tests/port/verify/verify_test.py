import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from lavit_jax.core import errors

pytest.importorskip("torch", reason="imports PyTorch files")

from lavit_jax.commands import main
from lavit_jax.port import importing
from lavit_jax.port.verify import verify

pytestmark = [
  pytest.mark.slow,
  pytest.mark.shared,
  pytest.mark.skipif(
    not os.environ.get("LAVIT_SHARED"),
    reason="needs LAVIT_SHARED, the folder with the recordings",
  ),
]


@pytest.fixture(scope="module")
def golden():
  return pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden" / "a"


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
  directory = tmp_path_factory.mktemp("verify") / "model"
  importing.run(golden / "checkpoint", directory, quiet=True)
  return directory


@pytest.fixture(scope="module")
def rows(model, golden):
  return verify.run(model, golden)


def test_every_array_of_every_recording_passes(rows, golden):
  wrong = [row for row in rows if row.status != "pass"]
  assert not wrong, "\n".join(map(str, wrong))
  passed = {(row.file, row.array) for row in rows}
  files = sorted(golden.glob("*.npz"))
  assert len(files) > 15
  for path in files:
    with np.load(path) as arrays:
      wanted = {(path.name, n) for n in arrays if n.startswith("out_")}
    assert wanted <= passed
  older = {row.array for row in rows if row.file.startswith("extra/")}
  assert older == {"out_mean_sd", "out_logvar_sd", "out_decoded_sd"}


def test_numbers_are_within_the_tolerances_and_ids_equal(rows):
  numbers = [row for row in rows if row.tolerance]
  images = [row for row in numbers if row.tolerance == 2 / 255]
  levels = [row for row in numbers if "uint8" in row.array]
  assert len(images) == len(levels) == 5
  assert max(row.max_abs for row in images) <= 2 / 255
  assert max(row.max_abs for row in levels) <= 2
  assert len(numbers) > 100
  others = [row for row in numbers if row not in images + levels]
  assert max(row.max_rel for row in others) <= 2e-4
  exact = [row for row in rows if row.tolerance == 0.0 and row.max_abs]
  assert not exact


def test_unknown_and_wrong_arrays_fail(model, golden, tmp_path):
  for name in ("selector.npz", "questions.json"):
    shutil.copy(golden / name, tmp_path / name)
  with np.load(tmp_path / "selector.npz") as file:
    arrays = dict(file)
  arrays["out_logprobs"] = arrays["out_logprobs"] + 1e-2
  arrays["out_other"] = arrays["in_other"] = np.zeros(3)
  np.savez(tmp_path / "selector.npz", **arrays)
  np.savez(tmp_path / "new.npz", in_x=np.zeros(3))
  questions = json.loads((tmp_path / "questions.json").read_text("utf-8"))
  questions["max_words_5"][0]["output"] += "!"
  (tmp_path / "questions.json").write_text(json.dumps(questions), "utf-8")
  (tmp_path / "notes.txt").write_text("?", "utf-8")
  found = {(row.file, row.array): row for row in verify.run(model, tmp_path)}
  failed = {key for key, row in found.items() if row.status == "fail"}
  assert failed == {
    ("selector.npz", "out_logprobs"),
    ("selector.npz", "out_other"),
    ("selector.npz", "in_other"),
    ("new.npz", "*"),
    ("notes.txt", "*"),
    ("questions.json", "max_words_5"),
  }
  note = found["questions.json", "max_words_5"].note
  assert note.startswith("entry 0 of ")


def test_arrays_without_their_json_fail(model, golden, tmp_path):
  shutil.copy(golden / "caption.npz", tmp_path)
  (row,) = verify.run(model, tmp_path)
  assert (row.file, row.status) == ("caption.npz", "fail")
  assert "caption.json" in row.note


def test_a_changed_weight_is_noticed(model, golden, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(golden / "checkpoint", source / "checkpoint")
  for path in source.rglob("*"):
    path.chmod(0o755)
  shutil.copy(golden / "variant_config.json", source)
  import torch

  path = source / "checkpoint/visual_tokenizer/tokenizer_encoder.bin"
  state = torch.load(path, weights_only=True)
  name = "token_predictor.out_conv.0.weight"
  state[name] = state[name] + 0.1
  torch.save(state, path)
  importing.run(source / "checkpoint", tmp_path / "model", quiet=True)
  some = tmp_path / "recordings"
  some.mkdir()
  shutil.copy(golden / "selector.npz", some)
  rows = {row.array: row for row in verify.run(tmp_path / "model", some)}
  assert rows["out_logprobs"].status == "fail"
  assert rows["out_logprobs"].max_rel > 1e-3


def test_a_part_that_is_missing_fails_its_files(golden, tmp_path):
  only = ["encoder", "tokenizer"]
  importing.run(golden / "checkpoint", tmp_path / "m", only=only, quiet=True)
  some = tmp_path / "recordings"
  some.mkdir()
  for name in ("encoder.npz", "llm.npz"):
    shutil.copy(golden / name, some)
  rows = verify.run(tmp_path / "m", some)
  assert {r.file for r in rows if r.status == "fail"} == {"llm.npz"}
  assert "no part 'llm'" in next(r.note for r in rows if r.file == "llm.npz")


def test_the_command_exits_1_when_anything_fails(
  model, golden, tmp_path, capsys
):
  shutil.copy(golden / "questions.json", tmp_path / "questions.json")
  shutil.copy(golden / "quantizer.npz", tmp_path / "quantizer.npz")
  arguments = ["port", "verify", str(model), str(tmp_path), "--json"]
  assert main.main(arguments) == 0
  document = json.loads(capsys.readouterr().out)
  assert document["fail"] == 0
  assert document["pass"] == len(document["rows"])
  (tmp_path / "else.npz").write_bytes((tmp_path / "quantizer.npz").read_bytes())
  assert main.main(arguments[:-1]) == 1
  assert "1 fail" in capsys.readouterr().out


def test_a_folder_without_recordings_is_refused(model, tmp_path):
  with pytest.raises(errors.UsageError, match=r"encoder\.npz"):
    verify.run(model, tmp_path)


def test_images_may_differ_by_two_levels_and_no_more():
  kinds = {"image": 1 / 255, "levels": 1}
  for kind, level in kinds.items():
    theirs = np.zeros((2, 3), np.float32)
    for off, status in ((1.99, "pass"), (2.01, "fail")):
      ours = theirs + off * level
      row = verify._compare("f", "out_image", ours, kind, theirs)
      assert row.status == status


def test_unknown_folders_in_extra_fail(model, golden, tmp_path):
  shutil.copytree(golden / "extra", tmp_path / "extra")
  (tmp_path / "extra" / "more").mkdir()
  np.savez(tmp_path / "new.npz", in_x=np.zeros(3))
  found = {row.file: row for row in verify.run(model, tmp_path)}
  assert all(row.status == "fail" for row in found.values())
  assert "vae.npz" in found["extra/vae_deprecated_names"].note
  assert "extra/more" in found

"""Commands that draw: generate, synthesize, reconstruct."""

import io
import json
import pathlib
import shlex

import pytest
from PIL import Image

from lavit_jax.infer.prompts import prompts
from tests.commands import fakes
from tests.train import fake_gcs

pytestmark = pytest.mark.usefixtures("nothing_kept")


def test_generate_hands_on_the_options_that_are_given(model, capsys, tmp_path):
  status, out, _ = fakes.run(
    capsys, "generate", "a red circle", "--out", "x/y.png"
  )
  assert (status, out) == (0, "x/y.png\n")
  assert model.called == ("synthesize_batch", ["a red circle"], {})
  assert Image.open(tmp_path / "x" / "y.png").size == (4, 4)
  options = shlex.split(
    "--seed 7 --steps 9 --guidance 2.5 --decoder-guidance 1.5 --top-k 9"
    " --temperature 0 --negative night --parity --size 48x64 --solver dpm++"
    " --decoder lowres --tile 32"
  )
  fakes.run(capsys, "generate", "one", *options)
  assert model.called[-1] == {
    "seed": 7,
    "steps": 9,
    "guidance_scale": 2.5,
    "decoder_guidance_scale": 1.5,
    "top_k": 9,
    "temperature": 0.0,
    "negative_prompts": "night",
    "parity": True,
    "size": (48, 64),
    "solver": "dpm++",
    "decoder": "lowres",
    "tile": 32,
  }


def test_a_withheld_drawing_is_named_and_the_check_can_be_left_out(
  model, capsys
):
  _, out, err = fakes.run(capsys, "generate", "star", "nude", "--json")
  assert [row["withheld"] for row in json.loads(out)] == [False, True]
  assert "drawing  50%" in err  # how far it is
  _, out, _ = fakes.run(capsys, "generate", "nude")
  assert out == "generated.png (withheld by the safety checker, black)\n"
  assert model.checked
  fakes.run(capsys, "reconstruct", "a.png", "--no-safety-check")
  assert not model.checked


def test_ids_are_printed_instead_of_drawn(model, capsys, tmp_path):
  argv = ("generate", "one", "two", "--ids", "--seed", "3", "--steps", "9")
  _, out, _ = fakes.run(capsys, *argv)
  assert out == "5 301\n5 302\n"
  assert model.called == ("write_codes", ["one", "two"], {"seed": 3})
  assert not list(tmp_path.glob("generated*"))
  _, out, _ = fakes.run(capsys, "synthesize", "a.png", "red", "--ids", "--json")
  assert json.loads(out) == [{"parts": ["a.png", "red"], "codes": [5, 301]}]


def test_several_drawings_are_numbered_in_order(model, capsys, tmp_path):
  argv = ("generate", "one", "two", "--count", "6", "--out", "d.png", "--json")
  _, out, _ = fakes.run(capsys, *argv)
  rows = json.loads(out)
  assert [row["prompt"] for row in rows] == ["one"] * 6 + ["two"] * 6
  assert rows[0]["file"] == "d_00.png"
  assert rows[11]["file"] == "d_11.png"
  for i, row in enumerate(rows):
    assert Image.open(tmp_path / row["file"]).getpixel((0, 0)) == (i, 0, 0)


def test_synthesize_tells_images_from_texts(model, capsys, tmp_path):
  fakes.run(capsys, "synthesize", "b c.png", "make it red", "--out", "e.png")
  parts = [pathlib.Path("b c.png"), "make it red"]
  assert model.called == ("synthesize_batch", [parts], {})
  assert Image.open(tmp_path / "e.png").size == (4, 4)


def test_images_and_words_may_be_in_a_bucket(model, capsys, monkeypatch):
  with fake_gcs.serving(monkeypatch) as store:
    there = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 0, 77)).save(there, format="PNG")
    store.pipe_file("gs://b/a.png", there.getvalue())
    store.pipe_file("gs://b/w.json", b'[{"codes": [5, 301]}]')
    for argv in (
      ("synthesize", "gs://b/a.png", "make it red"),
      ("caption", "gs://b/a.png", "--count", "3"),
    ):
      fakes.run(capsys, *argv)
      ((image, *_),) = model.called[1]
      # A text would be a str; this is read as the pipeline reads an image.
      assert not isinstance(image, str)
      read = prompts.sized(image, 4, False)
      assert read[0, 0].tolist() == [0, 0, 77]
    for argv in (
      ("tokenize", "gs://b/a.png", "--overlay", "o.png"),
      ("reconstruct", "gs://b/a.png"),
      ("answer", "gs://b/a.png", "What?"),
    ):
      assert fakes.run(capsys, *argv)[0] == 0
    fakes.run(capsys, "reconstruct", "--codes", "gs://b/w.json")
    assert model.called == ("draw_codes", [[5, 301]], {})
    err = fakes.failed(capsys, "generate", "gs://b/a.png")
    assert "gs://b/a.png is an image" in err
    err = fakes.failed(capsys, "synthesize", "gs://b/missing.png", "red")
    assert "gs://b/missing.png" in err


def test_a_misspelt_image_is_not_taken_for_text(model, capsys):
  err = fakes.failed(capsys, "synthesize", "a.pgn.PNG", "make it red")
  assert "a.pgn.PNG" in err
  assert model.loaded is None


def test_reconstruct_draws_each_image(model, capsys, tmp_path):
  _, out, _ = fakes.run(
    capsys, "reconstruct", "a.png", "b c.png", "--steps", "3"
  )
  assert out.split() == ["reconstructed_0.png", "reconstructed_1.png"]
  assert model.called == ("reconstruct", ["a.png", "b c.png"], {"steps": 3})
  image = Image.open(tmp_path / "reconstructed_1.png")
  assert image.getpixel((0, 0)) == (1, 0, 0)


def test_words_that_were_printed_are_drawn_again(model, capsys, tmp_path):
  for argv in ("tokenize a.png", "generate one two --ids"):
    _, out, _ = fakes.run(capsys, *argv.split(), "--json")
    (tmp_path / "words.json").write_text(out)
    rows = json.loads(out)
    argv = "reconstruct --codes words.json --steps 3 --json"
    _, out, _ = fakes.run(capsys, *argv.split())
    codes = [row["codes"] for row in rows]
    assert model.called == ("draw_codes", codes, {"steps": 3})
    assert len(json.loads(out)) == len(rows)
  assert [row["prompt"] for row in json.loads(out)] == ["one", "two"]
  for text, place in (
    ("[]", "it holds []"),
    ("{}", "it holds {}"),
    ("[1]", "row 1"),
    ('[{"codes": [3]}, {"codes": ["a"]}]', "row 2 has a code 'a'"),
    ('[{"codes": [3, true]}]', "row 1 has a code True"),
    ('[{"codes": [-1]}]', "row 1 has a code -1"),
    ('[{"codes": []}]', "row 1 has no codes"),
    ("nonsense", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("[[]]", "row 1 has no codes"),
  ):
    (tmp_path / "words.json").write_text(text)
    said = fakes.failed(capsys, "reconstruct", "--codes", "words.json")
    assert "JSON list" in said
    assert place in said


def test_ids_need_no_file_to_write(model, capsys, tmp_path):
  (tmp_path / "generated.png").mkdir()
  assert fakes.run(capsys, "generate", "x", "--ids")[:2] == (0, "5 301\n")

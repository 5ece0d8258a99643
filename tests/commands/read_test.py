"""Commands that read images: caption, answer, tokenize."""

import json
import pathlib
import shlex

import pytest
from PIL import Image

from lavit_jax.commands import common, read
from tests.commands import fakes

pytestmark = pytest.mark.usefixtures("nothing_kept")


def test_one_caption_is_printed_alone(model, capsys):
  assert fakes.run(capsys, "caption", "a.png") == (0, "an image 0\n", "")
  assert model.called == ("caption", ["a.png"], {})
  assert model.loaded == "tiny"


def test_several_captions_are_printed_with_their_names(model, capsys):
  argv = ("caption", "a.png", "b c.png", "--model", "m", "--prompt", "a photo")
  _, out, _ = fakes.run(capsys, *argv)
  assert out == "a.png: an image 0\nb c.png: an image 1\n"
  assert model.called[-1] == {"prompt": "a photo"}
  assert model.loaded == "m"
  _, out, _ = fakes.run(capsys, *argv, "--json")
  assert json.loads(out)[1] == {"image": "b c.png", "caption": "an image 1"}


def test_every_question_is_asked_of_the_image(model, capsys):
  status, out, _ = fakes.run(
    capsys, "answer", "a.png", "How many?", "Is it red?"
  )
  assert (status, out) == (0, "How many? H\nIs it red? I\n")
  questions = ["How many?", "Is it red?"]
  assert model.called == ("answer", "a.png", questions, {})
  _, out, _ = fakes.run(capsys, "answer", "a.png", "Why?", "--json")
  assert json.loads(out) == [
    {"image": "a.png", "question": "Why?", "answer": "W"}
  ]


def test_beams_are_handed_on_and_several_texts_scored(model, capsys):
  options = shlex.split("--beams 5 --max-tokens 9 --length-penalty 0 --seed 1")
  loaded = ("--dtype", "bfloat16", "--quantize", "int8")
  fakes.run(capsys, "caption", "a.png", *options, *loaded)
  expected = dict(num_beams=5, max_new_tokens=9, length_penalty=0.0, seed=1)
  assert model.called[-1] == expected
  assert model.how == ("bfloat16", "int8")
  fakes.run(capsys, "answer", "a.png", "Why?", *options, "--answerable-first")
  assert model.called[-1] == expected | {"answerable_first": True}
  argv = ("caption", "a.png", "--count", "2", "--prompt", "a photo of")
  _, out, _ = fakes.run(capsys, *argv)
  assert out == "a.png: 1.0000 text 0\na.png: 0.0000 text 1\n"
  (prompt,) = model.called[1]
  assert prompt == [pathlib.Path("a.png"), "a photo of"]


def test_tokenize_prints_what_is_kept(model, capsys):
  _, out, _ = fakes.run(capsys, "tokenize", "a.png", "--budget", "2")
  assert out == "a.png: 2 of 4 patches kept, codes 5 301\n"
  assert model.called == ("tokenize", ["a.png"], {"budget": 2})
  _, out, _ = fakes.run(capsys, "tokenize", "a.png", "--json")
  assert json.loads(out) == [
    {"image": "a.png", "keep": [1, 0, 0, 1], "codes": [5, 301]}
  ]


def test_tokenize_draws_kept_and_dropped_patches(model, capsys, tmp_path):
  fakes.run(capsys, "tokenize", "a.png", "--overlay", "one.png")
  one = Image.open(tmp_path / "one.png")
  assert one.getpixel((60, 60)) == (0, 0, 0)
  assert min(one.getpixel((300, 60))) > 150
  fakes.run(capsys, "tokenize", "a.png", "b c.png", "--overlay", "two.png")
  assert Image.open(tmp_path / "two.png").width > one.width


@pytest.fixture
def tokenized(model, monkeypatch, tmp_path):
  """What the functions behind `lavit tokenize --data` were called with."""
  (tmp_path / "my.jsonl").write_text("{}\n")
  calls = []

  def write_cache(model, data, out, **options):
    calls.append((model, data, out, options))
    return {"images": 2, "out": out}

  def write_caches(model, data, out, **options):
    calls.append((model, data, out, options))
    names = ("train", "held_out")
    return {name: {"images": 2, "out": f"{out}/{name}"} for name in names}

  fakes.stand_in(
    monkeypatch,
    "tokenize_job",
    read,
    write_cache=write_cache,
    write_caches=write_caches,
  )
  return calls


def test_tokenize_passes_on_what_goes_for_the_data(tokenized, capsys):
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes")
  fields = ("--allow-absolute", "--limit-share", "0.2")
  fields += ("--image-feature", "photo", "--text-feature", "said")
  assert fakes.run(capsys, *argv, *fields)[0] == 0
  assert fakes.run(capsys, *argv, *fields, "--split", "train")[0] == 0
  for call in tokenized:
    assert call[3]["fields"] == {
      "allow_absolute": True,
      "limit_share": 0.2,
      "image_feature": "photo",
      "text_feature": "said",
    }


@pytest.mark.parametrize("name", ["my.jsonl", "shapes"])
def test_tokenize_a_dataset_writes_the_caches_of_a_run(tokenized, capsys, name):
  argv = ("tokenize", "--data", name, "--out", "codes")
  status, out, _ = fakes.run(capsys, *argv, "--json")
  assert (status, set(json.loads(out))) == (0, {"train", "held_out"})
  assert tokenized == [
    ("resolved tiny", name, "codes", {"held_out": "", "fields": {}})
  ]
  _, out, _ = fakes.run(capsys, *argv)
  assert "--config.data.cache_dir=codes/train" in out
  assert "--config.data.held_out_cache_dir=codes/held_out" in out


def test_a_page_about_tokens_is_made_by_the_first_part_beside_the_caches(
  tokenized, capsys, tmp_path
):
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes", "--html")
  for words, said in (
    (("p.html", "--part", "2/2"), "--part 1/2"),
    (("codes",), "is in --out codes"),
    (("codes/p.html",), "is in --out codes"),
    (("my.jsonl",), "is there already"),
    (("",), "is empty"),
  ):
    status, _, err = fakes.run(capsys, *argv, *words)
    assert (status, said in err) == (2, True), err
  assert not tokenized
  assert (tmp_path / "my.jsonl").read_text() == "{}\n"
  assert fakes.run(capsys, *argv, "p.html", "--part", "1/2")[0] == 0
  assert tokenized[0][3]["page"] == "p.html"


def test_tokenize_one_part_says_that_the_other_is_needed(tokenized, capsys):
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes", "--split")
  status, out, _ = fakes.run(capsys, *argv, "held_out")
  assert status == 0
  assert "--config.data.held_out_cache_dir=codes" in out
  assert "--split train and another --out" in out
  (call,) = tokenized
  assert call[3] == {"split": "held_out", "held_out": "", "fields": {}}
  _, out, _ = fakes.run(capsys, *argv, "train", "--json")
  assert json.loads(out) == {"images": 2, "out": "codes"}


def test_tokenize_takes_a_file_of_held_out_images(tokenized, capsys, tmp_path):
  (tmp_path / "other.jsonl").write_text("{}\n")
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes", "--held-out")
  assert fakes.run(capsys, *argv, "other.jsonl")[0] == 0
  assert tokenized[0][3] == {"held_out": "other.jsonl", "fields": {}}
  status, _, err = fakes.run(capsys, *argv, "none.jsonl")
  assert (status, "none.jsonl" in err, len(tokenized)) == (2, True, 1)


@pytest.mark.parametrize("there", ["codes/meta.json", "codes.partial/begun"])
def test_two_caches_are_not_written_into_one(
  tokenized, capsys, tmp_path, there
):
  """As an earlier version wrote the training part to --out itself."""
  path = tmp_path / there
  path.parent.mkdir()
  path.write_text("{}")
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes")
  status, _, err = fakes.run(capsys, *argv)
  assert (status, tokenized) == (2, [])
  assert "Add --split train" in err
  assert fakes.run(capsys, *argv, "--split", "train")[0] == 0


@pytest.mark.parametrize(
  ("name", "size", "options", "said"),
  [
    ("tiny", 64, [], True),
    ("tiny", 48, [], False),  # one of its own scenes
    ("tiny", 64, ["--json"], False),
    ("photographs", 64, [], False),
  ],
)
def test_a_model_of_drawn_scenes_says_that_it_knows_nothing_else(
  name, size, options, said, monkeypatch, tmp_path, capsys
):
  monkeypatch.chdir(tmp_path)
  fakes.stand_in(monkeypatch, "pipeline", common, LaVIT=fakes.Model())
  Image.new("RGB", (size, size)).save("a.png")
  meta = {"format": 1, "config": {"data": {"kind": "jsonl", "image_size": 48}}}
  pathlib.Path("photographs/encoder").mkdir(parents=True)
  part = pathlib.Path("photographs/encoder/part.json")
  part.write_text(json.dumps(meta))
  for command in (
    ["caption", "a.png"],
    ["answer", "a.png", "why?"],
    ["tokenize", "a.png"],
    ["reconstruct", "a.png"],
    ["synthesize", "a.png", "in red"],
  ):
    status, _, err = fakes.run(capsys, *command, "--model", name, *options)
    lines = [line for line in err.splitlines() if "drawn scenes" in line]
    assert (status, len(lines)) == (0, int(said)), command
    assert all("--model DIR" in line for line in lines)


def test_a_prompt_without_images_is_not_warned_of(model, capsys):
  _, _, err = fakes.run(capsys, "generate", "a cat", "--out", "x.png")
  assert "drawn scenes" not in err

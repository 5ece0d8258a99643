"""The command line: what it hands on, what it prints, how it fails.

A recorder stands in for the model; whole runs are in the tests of the parts.
"""

import contextlib
import io
import json
import pathlib
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lavit_jax.commands import common, main, read
from lavit_jax.commands import train as train_command
from lavit_jax.core import compiled_programs, errors
from lavit_jax.infer import text_generation
from lavit_jax.infer.prompts import prompts
from tests.train import fake_gcs

CONFIG = """
import ml_collections

def get_config():
  cfg = ml_collections.ConfigDict()
  cfg.steps = 3
  cfg.batch_size = 8
  cfg.mesh = dict(data=-1)
  cfg.model = dict(width=16)
  return cfg
"""


class Model:
  """Records the last call; draws what it was asked for."""

  def __init__(self):
    self.loaded = self.how = self.called = None

  def load(self, name, *, dtype, quantize, check_safety=True):
    self.loaded, self.how = name, (dtype, quantize)
    self.checked = check_safety
    return self

  def _record(self, name, *args, **options):
    self.called = (name, *args, options)

  def tokenize(self, images, **options):
    self._record("tokenize", images, **options)
    keep = np.array([True, False, False, True])
    return [{"keep": keep, "codes": np.array([5, 301])} for _ in images]

  def caption(self, images, **options):
    self._record("caption", images, **options)
    return [f"an image {i}" for i, _ in enumerate(images)]

  def answer(self, images, questions, **options):
    self._record("answer", images, questions, **options)
    return [question[:1] for question in questions]

  def write(self, prompts, *, count, **options):
    self._record("write", prompts, count, **options)
    return [
      [text_generation.Text(f"text {i}", 1.0 - i) for i in range(count)]
      for _ in prompts
    ]

  def write_codes(self, prompts, **options):
    self._record("write_codes", prompts, **options)
    return [np.array([5, 301 + i]) for i in range(len(prompts))]

  def synthesize_batch(self, prompts, *, progress, **options):
    progress(1, 2)
    self._record("synthesize_batch", prompts, **options)
    drawn = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(prompts))]
    drawn[-1].info["withheld"] = "nude" in prompts
    return drawn

  def reconstruct(self, images, *, progress, **options):
    progress(2, 2)
    self._record("reconstruct", images, **options)
    return [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(images))]

  def draw_codes(self, codes, *, progress, **options):
    self._record("draw_codes", codes, **options)
    return [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(codes))]

  def info(self):
    need = {"missing": [], "weights_bytes": 14_200_000_000, "cache_bytes": 0}
    return {
      "parts": {"llm": {"parameters": 3}},
      "tasks": ["caption", "answer"],
      "memory": {"caption": need},
    }


def stand_in(monkeypatch, name, *commands, **members):
  """Gives command modules another module under the name of an import."""
  module = types.SimpleNamespace(**members)
  for command in commands:
    monkeypatch.setattr(command, name, module)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
  """No command sets up this process's compilation cache."""
  monkeypatch.setattr(compiled_programs, "keep", lambda **unused: None)
  monkeypatch.setattr(compiled_programs, "keep_none", lambda: None)


@pytest.fixture
def model(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("LAVIT_DEBUG", raising=False)
  monkeypatch.setattr(common, "note_scenes", lambda *unused: None)
  for i, name in enumerate(("a.png", "b c.png")):
    Image.new("RGB", (8, 8), (0, 0, 10 * i)).save(tmp_path / name)
  model = Model()
  stand_in(
    monkeypatch,
    "pipeline",
    common,
    read,
    LaVIT=model,
    resolve="resolved {}".format,
  )
  return model


def run(capsys, *argv):
  status = main.main(argv)
  out, err = capsys.readouterr()
  return status, out, err


def failed(capsys, *argv):
  """The paragraph of a command that must fail as the user's mistake."""
  status, out, err = run(capsys, *argv)
  assert status == 2
  assert out == ""
  assert err.count("\n") == 1
  assert err.startswith("lavit: ")
  return err


def test_help_names_every_command_and_loads_nothing_heavy():
  code = (
    "import sys; from lavit_jax.commands import main\n"
    "try: main.main(['--help'])\n"
    "except SystemExit as e: assert e.code == 0\n"
    "heavy = {'jax', 'flax', 'numpy', 'PIL', 'absl'} & set(sys.modules)\n"
    "assert not heavy, heavy"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True)
  assert done.returncode == 0, done.stderr.decode()
  names = (
    "quickstart train tokenize caption answer generate synthesize reconstruct"
    " info"
  )
  for name in names.split():
    assert f"\n    {name} " in done.stdout.decode()


@pytest.mark.parametrize(
  "name",
  ["quickstart", "train", "tokenize", "caption", "answer", "generate"]
  + ["synthesize", "reconstruct", "info"],
)
def test_help_of_every_command_shows_examples(name, capsys):
  try:
    status = main.main([name, "--help"])
  except SystemExit as stop:
    status = stop.code
  assert status == 0
  assert f"examples:\n  lavit {name}" in capsys.readouterr().out


def test_one_caption_is_printed_alone(model, capsys):
  assert run(capsys, "caption", "a.png") == (0, "an image 0\n", "")
  assert model.called == ("caption", ["a.png"], {})
  assert model.loaded == "tiny"


def test_several_captions_are_printed_with_their_names(model, capsys):
  argv = ("caption", "a.png", "b c.png", "--model", "m", "--prompt", "a photo")
  _, out, _ = run(capsys, *argv)
  assert out == "a.png: an image 0\nb c.png: an image 1\n"
  assert model.called[-1] == {"prompt": "a photo"}
  assert model.loaded == "m"
  _, out, _ = run(capsys, *argv, "--json")
  assert json.loads(out)[1] == {"image": "b c.png", "caption": "an image 1"}


def test_every_question_is_asked_of_the_image(model, capsys):
  status, out, _ = run(capsys, "answer", "a.png", "How many?", "Is it red?")
  assert (status, out) == (0, "How many? H\nIs it red? I\n")
  questions = ["How many?", "Is it red?"]
  assert model.called == ("answer", "a.png", questions, {})
  _, out, _ = run(capsys, "answer", "a.png", "Why?", "--json")
  assert json.loads(out) == [
    {"image": "a.png", "question": "Why?", "answer": "W"}
  ]


def test_generate_hands_on_the_options_that_are_given(model, capsys, tmp_path):
  status, out, _ = run(capsys, "generate", "a red circle", "--out", "x/y.png")
  assert (status, out) == (0, "x/y.png\n")
  assert model.called == ("synthesize_batch", ["a red circle"], {})
  assert Image.open(tmp_path / "x" / "y.png").size == (4, 4)
  options = shlex.split(
    "--seed 7 --steps 9 --guidance 2.5 --decoder-guidance 1.5 --top-k 9"
    " --temperature 0 --negative night --parity --size 48x64 --solver dpm++"
    " --decoder lowres --tile 32"
  )
  run(capsys, "generate", "one", *options)
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
  _, out, err = run(capsys, "generate", "star", "nude", "--json")
  assert [row["withheld"] for row in json.loads(out)] == [False, True]
  assert "drawing  50%" in err  # how far it is
  _, out, _ = run(capsys, "generate", "nude")
  assert out == "generated.png (withheld by the safety checker, black)\n"
  assert model.checked
  run(capsys, "reconstruct", "a.png", "--no-safety-check")
  assert not model.checked


def test_ids_are_printed_instead_of_drawn(model, capsys, tmp_path):
  argv = ("generate", "one", "two", "--ids", "--seed", "3", "--steps", "9")
  _, out, _ = run(capsys, *argv)
  assert out == "5 301\n5 302\n"
  assert model.called == ("write_codes", ["one", "two"], {"seed": 3})
  assert not list(tmp_path.glob("generated*"))
  _, out, _ = run(capsys, "synthesize", "a.png", "red", "--ids", "--json")
  assert json.loads(out) == [{"parts": ["a.png", "red"], "codes": [5, 301]}]


def test_beams_are_handed_on_and_several_texts_scored(model, capsys):
  options = shlex.split("--beams 5 --max-tokens 9 --length-penalty 0 --seed 1")
  loaded = ("--dtype", "bfloat16", "--quantize", "int8")
  run(capsys, "caption", "a.png", *options, *loaded)
  expected = dict(num_beams=5, max_new_tokens=9, length_penalty=0.0, seed=1)
  assert model.called[-1] == expected
  assert model.how == ("bfloat16", "int8")
  run(capsys, "answer", "a.png", "Why?", *options, "--answerable-first")
  assert model.called[-1] == expected | {"answerable_first": True}
  argv = ("caption", "a.png", "--count", "2", "--prompt", "a photo of")
  _, out, _ = run(capsys, *argv)
  assert out == "a.png: 1.0000 text 0\na.png: 0.0000 text 1\n"
  (prompt,) = model.called[1]
  assert prompt == [pathlib.Path("a.png"), "a photo of"]


def test_several_drawings_are_numbered_in_order(model, capsys, tmp_path):
  argv = ("generate", "one", "two", "--count", "6", "--out", "d.png", "--json")
  _, out, _ = run(capsys, *argv)
  rows = json.loads(out)
  assert [row["prompt"] for row in rows] == ["one"] * 6 + ["two"] * 6
  assert rows[0]["file"] == "d_00.png"
  assert rows[11]["file"] == "d_11.png"
  for i, row in enumerate(rows):
    assert Image.open(tmp_path / row["file"]).getpixel((0, 0)) == (i, 0, 0)


def test_synthesize_tells_images_from_texts(model, capsys, tmp_path):
  run(capsys, "synthesize", "b c.png", "make it red", "--out", "e.png")
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
      run(capsys, *argv)
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
      assert run(capsys, *argv)[0] == 0
    run(capsys, "reconstruct", "--codes", "gs://b/w.json")
    assert model.called == ("draw_codes", [[5, 301]], {})
    err = failed(capsys, "generate", "gs://b/a.png")
    assert "gs://b/a.png is an image" in err
    err = failed(capsys, "synthesize", "gs://b/missing.png", "red")
    assert "gs://b/missing.png" in err


def test_a_misspelt_image_is_not_taken_for_text(model, capsys):
  err = failed(capsys, "synthesize", "a.pgn.PNG", "make it red")
  assert "a.pgn.PNG" in err
  assert model.loaded is None


def test_reconstruct_draws_each_image(model, capsys, tmp_path):
  _, out, _ = run(capsys, "reconstruct", "a.png", "b c.png", "--steps", "3")
  assert out.split() == ["reconstructed_0.png", "reconstructed_1.png"]
  assert model.called == ("reconstruct", ["a.png", "b c.png"], {"steps": 3})
  image = Image.open(tmp_path / "reconstructed_1.png")
  assert image.getpixel((0, 0)) == (1, 0, 0)


def test_words_that_were_printed_are_drawn_again(model, capsys, tmp_path):
  for argv in ("tokenize a.png", "generate one two --ids"):
    _, out, _ = run(capsys, *argv.split(), "--json")
    (tmp_path / "words.json").write_text(out)
    rows = json.loads(out)
    argv = "reconstruct --codes words.json --steps 3 --json"
    _, out, _ = run(capsys, *argv.split())
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
    said = failed(capsys, "reconstruct", "--codes", "words.json")
    assert "JSON list" in said
    assert place in said


def test_tokenize_prints_what_is_kept(model, capsys):
  _, out, _ = run(capsys, "tokenize", "a.png", "--budget", "2")
  assert out == "a.png: 2 of 4 patches kept, codes 5 301\n"
  assert model.called == ("tokenize", ["a.png"], {"budget": 2})
  _, out, _ = run(capsys, "tokenize", "a.png", "--json")
  assert json.loads(out) == [
    {"image": "a.png", "keep": [1, 0, 0, 1], "codes": [5, 301]}
  ]


def test_tokenize_draws_kept_and_dropped_patches(model, capsys, tmp_path):
  run(capsys, "tokenize", "a.png", "--overlay", "one.png")
  one = Image.open(tmp_path / "one.png")
  assert one.getpixel((60, 60)) == (0, 0, 0)
  assert min(one.getpixel((300, 60))) > 150
  run(capsys, "tokenize", "a.png", "b c.png", "--overlay", "two.png")
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

  stand_in(
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
  assert run(capsys, *argv, *fields)[0] == 0
  assert run(capsys, *argv, *fields, "--split", "train")[0] == 0
  for call in tokenized:
    assert call[3]["fields"] == {"allow_absolute": True, "limit_share": 0.2}


@pytest.mark.parametrize("name", ["my.jsonl", "shapes"])
def test_tokenize_a_dataset_writes_the_caches_of_a_run(tokenized, capsys, name):
  argv = ("tokenize", "--data", name, "--out", "codes")
  status, out, _ = run(capsys, *argv, "--json")
  assert (status, set(json.loads(out))) == (0, {"train", "held_out"})
  assert tokenized == [
    ("resolved tiny", name, "codes", {"held_out": "", "fields": {}})
  ]
  _, out, _ = run(capsys, *argv)
  assert "--config.data.cache_dir=codes/train" in out
  assert "--config.data.held_out_cache_dir=codes/held_out" in out


def test_tokenize_one_part_says_that_the_other_is_needed(tokenized, capsys):
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes", "--split")
  status, out, _ = run(capsys, *argv, "held_out")
  assert status == 0
  assert "--config.data.held_out_cache_dir=codes" in out
  assert "--split train and another --out" in out
  (call,) = tokenized
  assert call[3] == {"split": "held_out", "held_out": "", "fields": {}}
  _, out, _ = run(capsys, *argv, "train", "--json")
  assert json.loads(out) == {"images": 2, "out": "codes"}


def test_tokenize_takes_a_file_of_held_out_images(tokenized, capsys, tmp_path):
  (tmp_path / "other.jsonl").write_text("{}\n")
  argv = ("tokenize", "--data", "my.jsonl", "--out", "codes", "--held-out")
  assert run(capsys, *argv, "other.jsonl")[0] == 0
  assert tokenized[0][3] == {"held_out": "other.jsonl", "fields": {}}
  status, _, err = run(capsys, *argv, "none.jsonl")
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
  status, _, err = run(capsys, *argv)
  assert (status, tokenized) == (2, [])
  assert "Add --split train" in err
  assert run(capsys, *argv, "--split", "train")[0] == 0


def test_info_is_flat_for_people_and_nested_for_programs(model, capsys):
  _, out, _ = run(capsys, "info")
  assert "model.parts.llm.parameters: 3\n" in out
  assert "model.tasks: caption, answer\n" in out
  assert "memory.caption: 14.2 GB of weights\n" in out
  _, out, _ = run(capsys, "info", "--json")
  assert json.loads(out)["model"] == model.info()


def test_quickstart_hands_on_its_options(model, capsys, monkeypatch, tmp_path):
  (tmp_path / "my.jsonl").write_text("")
  calls = []

  def start(workdir, **options):
    calls.append((workdir, options))
    return {"caption_exact": 0.5}

  stand_in(
    monkeypatch,
    "quickstart",
    train_command,
    run=start,
    common_batch=lambda: 8,
  )
  argv = shlex.split("quickstart --workdir d --minutes 2 --data my.jsonl")
  assert run(capsys, *argv, "--allow-absolute") == (0, "", "")
  fields = {"allow_absolute": True}
  assert calls[0] == (
    "d",
    {"minutes": 2.0, "data": "my.jsonl", "evaluate_only": False, "model": None}
    | {"fields": fields},
  )
  argv = shlex.split("quickstart --evaluate-only --model tiny --json")
  _, out, _ = run(capsys, *argv)
  assert json.loads(out) == {"caption_exact": 0.5}
  assert calls[1][1]["evaluate_only"] is True
  assert calls[1][1]["model"] == "tiny"


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("caption missing.png", "missing.png"),
    ("generate x --out drawing.xyz", "drawing.xyz"),
    ("generate x --out drawing", "--out drawing.png"),
    ("generate x --count 0", "--count 0"),
    ("generate a.png", "a.png is an image, but a prompt"),
    ("answer a.png a.png", "a.png is an image, but a question"),
    ("answer a.png  ", "A question is empty"),
    ("caption a.png --prompt a.png", "a.png is an image, but --prompt"),
    ("generate x --negative a.png", "a.png is an image, but --negative"),
    ("tokenize", "IMAGE"),
    ("reconstruct", "--codes FILE"),
    ("reconstruct a.png --codes x.json", "not both"),
    ("reconstruct --codes x.json", "x.json"),
    ("tokenize a.png --data x.jsonl --out d", "--data X"),
    ("tokenize a.png --limit-share 0.1", "--limit-share goes with --data"),
    ("quickstart --allow-absolute", "--allow-absolute goes with --data"),
    ("tokenize --data x.jsonl", "--out DIR"),
    ("tokenize --data x.jsonl --out d", "x.jsonl"),
    ("tokenize a.png --overlay kept", "--overlay kept.png"),
    ("tokenize a.png --overlay a.png", "write over a.png, which is read"),
    ("synthesize a.png blue --out ./a.png", "write over a.png, which is read"),
    ("reconstruct a.png --out a.png", "write over a.png, which is read"),
    ("quickstart --model tiny", "--evaluate-only"),
    ("quickstart --minutes 0", "--minutes 0"),
    ("quickstart --data missing.jsonl", "missing.jsonl"),
  ],
)
def test_mistakes_are_told_before_anything_is_loaded(model, capsys, argv, says):
  assert says in failed(capsys, *argv.split(" "))
  assert model.loaded is None


@pytest.mark.parametrize(
  "argv",
  [
    "",
    "draw",
    "caption",
    "generate x --seed y",
    "generate x --size 512",
    "generate x --guidance nan",
    "caption a.png --length-penalty inf",
  ],
)
def test_unknown_words_exit_with_2(argv, capsys):
  with pytest.raises(SystemExit) as stop:
    main.main(argv.split())
  assert stop.value.code == 2


def raising(error):
  def fail(*unused, **unused_options):
    raise error

  return fail


@pytest.mark.parametrize(
  ("error", "says"),
  [
    (
      errors.CheckpointError("no model at x;\n give another"),
      "no model at x; g",
    ),
    (OSError(28, "No space left on device", "f"), "disk is full"),
    (ValueError("tensorstore: No space left on device"), "disk is full"),
    (FileNotFoundError(2, "No such file", "lost.png"), "lost.png"),
    (PermissionError(13, "Permission denied", "secret"), "secret: Permission"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory"),
    (
      RuntimeError("RESOURCE_EXHAUSTED: E1: CompileTimeScopedVmemOom: f32[8]"),
      "Raise xla_tpu_scoped_vmem_limit_kib",
    ),
  ],
)
def test_known_errors_are_one_paragraph(
  model, capsys, monkeypatch, error, says
):
  monkeypatch.setattr(model, "caption", raising(error))
  assert says in failed(capsys, "caption", "a.png")
  monkeypatch.setenv("LAVIT_DEBUG", "1")
  with pytest.raises(type(error)):
    main.main(["caption", "a.png"])


@pytest.mark.parametrize(
  "error", [ValueError("math"), KeyError("x"), OSError()]
)
def test_a_defect_keeps_its_traceback(model, monkeypatch, error):
  monkeypatch.setattr(model, "caption", raising(error))
  with pytest.raises(type(error)):
    main.main(["caption", "a.png"])


def test_a_value_error_that_our_code_raises_is_told(model, capsys, monkeypatch):
  from lavit_jax.evaluate.report import figures

  def refuse(*unused, **unused_options):
    return figures.to_pil(np.zeros((2, 2, 3)))

  monkeypatch.setattr(model, "caption", refuse)
  assert "float64[2, 2, 3]" in failed(capsys, "caption", "a.png")


def test_control_c_says_how_to_go_on(model, capsys, monkeypatch):
  stand_in(
    monkeypatch,
    "quickstart",
    train_command,
    run=raising(KeyboardInterrupt()),
    common_batch=lambda: 8,
  )
  argv = ("quickstart", "--workdir", "my dir")
  status, _, err = run(capsys, *argv)
  assert status == 130
  assert "\n  lavit quickstart --workdir 'my dir'\n" in err
  monkeypatch.setattr(model, "caption", raising(KeyboardInterrupt()))
  status, _, err = run(capsys, "caption", "a.png")
  assert (status, err) == (130, "lavit: interrupted.\n")


@pytest.fixture
def trained(model, monkeypatch, tmp_path):
  (tmp_path / "c.py").write_text(CONFIG)
  calls = []
  stand_in(
    monkeypatch,
    "loop",
    train_command,
    train=lambda config, workdir: calls.append((config, workdir)),
  )
  return calls


def test_train_reads_the_config_with_its_overrides(trained, capsys):
  argv = shlex.split("train --config c.py --workdir w --config.steps=7")
  assert run(capsys, *argv, "--config.model.width", "32") == (0, "", "")
  ((config, workdir),) = trained
  assert (config.steps, config.model.width, workdir) == (7, 32, "w")
  assert config.is_locked
  assert run(capsys, *argv)[0] == 0  # flags of one run do not reach the next
  assert trained[1][0].model.width == 16


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("--config c.py", "--workdir DIR is missing"),
    ("--workdir w", "--config FILE is missing"),
    (
      "--config c.py --workdir w --config.step=7",
      "no field 'step'. Did you mean \"steps",
    ),
    ("--config c.py --workdir w --config.model.widht=7", 'mean "width'),
    ("--config c.py --workdir w --config.steps=many", "many"),
    ("--config c.py --workdir w --wordir=x", "wordir"),
    ("--config c.py --workdir w extra", "cannot use extra"),
    ("--config d.py --workdir w", "no config file d.py"),
    ("--config bad.py --workdir w", "NameError: name 'lr'"),
    ("--config worse.py --workdir w", "ValueError: width is 3"),
  ],
)
def test_train_tells_what_is_wrong_with_its_flags(
  trained, capsys, tmp_path, argv, says
):
  bad = "def get_config():\n  "
  (tmp_path / "bad.py").write_text(bad + "return lr\n")
  (tmp_path / "worse.py").write_text(bad + "raise ValueError('width is 3')\n")
  assert says in failed(capsys, "train", *argv.split())
  assert trained == []


def test_train_without_flags_shows_its_help(capsys):
  status, out, err = run(capsys, "train")
  assert (status, out) == (2, "")
  assert err.startswith("usage: lavit train")


@pytest.mark.parametrize(
  "flag", ["--config=tiny/encoder.py", "--config=configs/tiny/encoder.py"]
)
@pytest.mark.parametrize("split", [True, False])
def test_a_shipped_config_is_found_from_anywhere(model, flag, split):
  argv = flag.split("=") if split else [flag]
  config, _ = train_command.read_config([*argv, "--workdir", "w"])
  assert config.stage == "encoder"
  assert not pathlib.Path("configs").exists()


@pytest.mark.parametrize(
  "words",
  ["quickstart", "train", "latents", "port verify", "caption", "answer"]
  + ["generate", "synthesize", "reconstruct", "tokenize"],
)
def test_help_says_where_compiled_programs_are_kept(words, capsys):
  with contextlib.suppress(SystemExit):  # argparse's way to end
    main.main([*words.split(), "--help"])
  assert compiled_programs.HELP.strip() in capsys.readouterr().out


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
  stand_in(monkeypatch, "pipeline", common, LaVIT=Model())
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
    status, _, err = run(capsys, *command, "--model", name, *options)
    lines = [line for line in err.splitlines() if "drawn scenes" in line]
    assert (status, len(lines)) == (0, int(said)), command
    assert all("--model DIR" in line for line in lines)


def test_no_cache_keeps_no_program(model, capsys, monkeypatch):
  calls = []
  monkeypatch.setattr(
    compiled_programs, "keep", lambda **options: calls.append("keep")
  )
  monkeypatch.setattr(
    compiled_programs, "keep_none", lambda: calls.append("keep_none")
  )
  run(capsys, "caption", "a.png")
  run(capsys, "caption", "a.png", "--no-cache")
  assert calls == ["keep", "keep_none"]


def test_a_prompt_without_images_is_not_warned_of(model, capsys):
  _, _, err = run(capsys, "generate", "a cat", "--out", "x.png")
  assert "drawn scenes" not in err

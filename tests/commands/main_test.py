"""The command `lavit`: help, mistakes, errors, exit statuses."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest

from lavit_jax.commands import main
from lavit_jax.commands import train as train_command
from lavit_jax.core import compiled_programs, errors
from tests.commands import fakes

pytestmark = pytest.mark.usefixtures("nothing_kept")


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


def test_info_is_flat_for_people_and_nested_for_programs(model, capsys):
  _, out, _ = fakes.run(capsys, "info")
  assert "model.parts.llm.parameters: 3\n" in out
  assert "model.tasks: caption, answer\n" in out
  assert "memory.caption: 14.2 GB of weights\n" in out
  _, out, _ = fakes.run(capsys, "info", "--json")
  assert json.loads(out)["model"] == model.info()


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("caption missing.png", "missing.png"),
    ("generate x --out drawing.xyz", "drawing.xyz"),
    ("generate x --out drawing", "--out drawing.png"),
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
    ("tokenize a.png --overlay sub.png", "--overlay sub.png is a folder"),
    ("generate x --out sub.png", "--out sub.png is a folder"),
    ("generate x --out a.png/b.png", "a.png is a file, but a folder"),
    ("tokenize --data a.png --out a.png", "a.png is a file, but a folder"),
    ("caption sub.png", "sub.png is a folder, but a file"),
    ("compile --topology v5e:2x4 --hlo sub.png", "--hlo sub.png is a folder"),
    ("compile --topology v5e:2x4 --hlo a.png/x", "a.png is a file, but a fo"),
    ("compile --topology v5e:2x4 --cache a.png", "a.png is a file, but a fol"),
    ("compile --config a.png --topology v5e:2x4 --hlo a.png", "which is read"),
    ("compile --topology v5e:2x4 --hlo=", "--hlo is empty"),
    ("compile --topology v5e:2x4 --hlo a.png", "is there already"),
    ("compile --config=a.png --topology v5e:2x4 --hlo a.png", "which is read"),
    ("reconstruct --codes codes.png --out codes.png", "which is read"),
    ("reconstruct a.png --out linked.png", "which is read"),
    ("tokenize --data shapes --held-out a.png --out o", "of their own"),
    ("tokenize a.png --overlay a.png", "write over a.png, which is read"),
    ("synthesize a.png blue --out ./a.png", "write over a.png, which is read"),
    ("reconstruct a.png --out a.png", "write over a.png, which is read"),
    ("quickstart --model tiny", "--evaluate-only"),
    ("quickstart --minutes 0", "--minutes 0"),
    ("quickstart --data missing.jsonl", "missing.jsonl"),
  ],
)
def test_mistakes_are_told_before_anything_is_loaded(
  model, capsys, tmp_path, argv, says
):
  (tmp_path / "sub.png").mkdir()
  (tmp_path / "linked.png").hardlink_to(tmp_path / "a.png")
  (tmp_path / "codes.png").write_text('[{"codes": [1]}]')
  assert says in fakes.failed(capsys, *argv.split(" "))
  assert model.loaded is None


@pytest.mark.parametrize(
  "argv",
  [
    "",
    "draw",
    "caption",
    "generate x --seed y",
    "generate x --size 512",
    "generate x --size 0x64",
    "generate x --guidance nan",
    "caption a.png --length-penalty inf",
    "compile --topology v5e:2x4 --slices many",
  ],
)
def test_unknown_words_exit_with_2(argv, capsys):
  with pytest.raises(SystemExit) as stop:
    main.main(argv.split())
  assert stop.value.code == 2
  command = " ".join(["lavit", *argv.split()[:1]])
  assert capsys.readouterr().err.startswith(("usage: lavit", f"{command}: e"))


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("generate x --count 0", "--count: 0: expected 1 to 10000"),
    ("generate x --count 1e9", "--count: invalid integer value: '1e9'"),
    ("generate x --steps 0", "--steps: 0: expected 1 or more"),
    ("generate x --tile -8", "--tile: -8: expected 1 or more"),
    ("generate x --top-k -1", "--top-k: -1: expected 0 or more"),
    ("generate x --seed -1", "--seed: -1: expected 0 to 2147483647"),
    ("caption a.png --count 0", "--count: 0: expected 1 or more"),
    ("caption a.png --beams 0", "--beams: 0: expected 1 or more"),
    ("answer a.png x --max-tokens 0", "--max-tokens: 0: expected 1 or more"),
    ("tokenize a.png --budget 0", "--budget: 0: expected 1 or more"),
  ],
)
def test_numbers_out_of_range_are_told_by_their_option(capsys, argv, says):
  with pytest.raises(SystemExit):
    main.main(argv.split())
  assert f"error: argument {says}" in capsys.readouterr().err


def test_arguments_in_errors_are_told_as_options(model, capsys, monkeypatch):
  argv = ("caption", "a.png", "--beams", "9", "--seed", "3")

  def told(error):
    monkeypatch.setattr(model, "caption", fakes.raising(error))
    return fakes.failed(capsys, *argv)

  said = "num_beams=9: many; raise min_new_tokens. x/seed=3, seed=4, seed=3."
  assert told(errors.UsageError(said)) == (
    "lavit: --beams 9: many; raise --min-tokens. x/seed=3, seed=4, --seed 3.\n"
  )
  assert "seed=3 is" in told(errors.DataError("seed=3 is a line"))


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
  monkeypatch.setattr(model, "caption", fakes.raising(error))
  assert says in fakes.failed(capsys, "caption", "a.png")
  monkeypatch.setenv("LAVIT_DEBUG", "1")
  with pytest.raises(type(error)):
    main.main(["caption", "a.png"])


@pytest.mark.parametrize(
  "error", [ValueError("math"), KeyError("x"), OSError()]
)
def test_a_defect_keeps_its_traceback(model, monkeypatch, error):
  monkeypatch.setattr(model, "caption", fakes.raising(error))
  with pytest.raises(type(error)):
    main.main(["caption", "a.png"])


def test_a_value_error_that_our_code_raises_is_told(model, capsys, monkeypatch):
  from lavit_jax.evaluate.report import figures

  def refuse(*unused, **unused_options):
    return figures.to_pil(np.zeros((2, 2, 3)))

  monkeypatch.setattr(model, "caption", refuse)
  assert "float64[2, 2, 3]" in fakes.failed(capsys, "caption", "a.png")


def test_control_c_says_how_to_go_on(model, capsys, monkeypatch):
  fakes.stand_in(
    monkeypatch,
    "quickstart",
    train_command,
    run=fakes.raising(KeyboardInterrupt()),
    common_batch=lambda: 8,
  )
  argv = ("quickstart", "--workdir", "my dir")
  status, _, err = fakes.run(capsys, *argv)
  assert status == 130
  assert "\n  lavit quickstart --workdir 'my dir'\n" in err
  monkeypatch.setattr(model, "caption", fakes.raising(KeyboardInterrupt()))
  status, _, err = fakes.run(capsys, "caption", "a.png")
  assert (status, err) == (130, "lavit: interrupted.\n")


@pytest.mark.parametrize(
  "words",
  ["quickstart", "train", "latents", "port verify", "caption", "answer"]
  + ["generate", "synthesize", "reconstruct", "tokenize"],
)
def test_help_says_where_compiled_programs_are_kept(words, capsys):
  with contextlib.suppress(SystemExit):  # argparse's way to end
    main.main([*words.split(), "--help"])
  assert compiled_programs.HELP.strip() in capsys.readouterr().out


def test_no_cache_keeps_no_program(model, capsys, monkeypatch):
  calls = []
  monkeypatch.setattr(
    compiled_programs, "keep", lambda **options: calls.append("keep")
  )
  monkeypatch.setattr(
    compiled_programs, "keep_none", lambda: calls.append("keep_none")
  )
  fakes.run(capsys, "caption", "a.png")
  fakes.run(capsys, "caption", "a.png", "--no-cache")
  assert calls == ["keep", "keep_none"]


@pytest.mark.parametrize(
  ("argv", "quickly"),
  [
    (["caption", *["a.png"] * 8], True),
    (["caption", *["a.png"] * 9], False),
    (["answer", "a.png", "Why?"], True),
    (["tokenize", "a.png"], True),
    (["generate", "x", "y", "--count", "4"], True),
    (["generate", "x", "y", "--count", "5"], False),
    (["reconstruct", *["a.png"] * 9], False),
    (["info"], False),
  ],
)
def test_little_work_of_a_small_model_is_compiled_quickly(
  model, capsys, monkeypatch, argv, quickly
):
  calls = []
  monkeypatch.setattr(
    compiled_programs, "compile_quickly", lambda: calls.append(1)
  )
  assert fakes.run(capsys, *argv)[0] == 0
  assert bool(calls) == quickly
  model.num_parameters = 10_000_001
  calls.clear()
  assert fakes.run(capsys, *argv)[0] == 0
  assert not calls

"""Commands and code of README, CONTRIBUTING and docs work as they stand.

A fenced block is run here, or the comment before it says why not:
<!-- not run: it needs a TPU -->. Blocks of bash that are not run are parsed
all the same: commands, flags, config fields, scripts and extras must exist.
"""

import argparse
import json
import os
import pathlib
import re
import runpy
import shlex
import textwrap

import pytest
import setuptools
from ml_collections import config_dict

from lavit_jax.commands import main, train
from tests.data import documented
from tests.jobs import here

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_BY_CI = ("-m venv", "-m pytest")  # .ci/run runs them, word for word
_TOOLS = {"gcloud", "git", "mkdocs", "mypy", "pre-commit", "ruff"}
_BLOCK = re.compile(
  r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?"
  r"```(?P<kind>\w*)\n(?P<text>.*?)^```",
  re.MULTILINE | re.DOTALL,
)


class Parsed(BaseException):
  """Raised where a command would begin to work."""


def _blocks(page, *kinds):
  text = page.read_text("utf-8")
  return [m for m in _BLOCK.finditer(text) if m["kind"] in kinds]


def _commands(text):
  """Lists of words, one for each simple command of a bash block."""
  for line in text.replace("\\\n", " ").splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True  # a word ends at white space alone
    words, skip = [], False
    for word in [*lexer, ";"]:
      if skip:  # the file behind >
        skip = False
      elif word in (";", "&&", "|", "||"):
        if words:
          yield words
        words = []
      elif word == ">":
        skip = True
      elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
        words.append(word)


@pytest.fixture
def parse(monkeypatch):
  """Takes a lavit command up to where it would begin to work."""
  parse_args = argparse.ArgumentParser.parse_args
  read_config = train.read_config

  def stop(function):
    def stopped(*args, **kwargs):
      function(*args, **kwargs)
      raise Parsed

    return stopped

  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop(parse_args))
  monkeypatch.setattr(train, "read_config", stop(read_config))

  def run(argv):
    try:
      status = main.main(argv)
    except Parsed:
      return
    pytest.fail(f"lavit {shlex.join(argv)}: exit status {status}")

  return run


@pytest.fixture(scope="module")
def extras():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **kwargs: None)
    return set(runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"])


def _sources(script):
  """The text of a script and of what it is made of."""
  shared = {
    "launch": ROOT / "launch" / "lib",
    "benchmarks": ROOT / "benchmarks" / "side_by_side",
  }.get(pathlib.Path(script).parts[0])
  paths = [ROOT / script, *(shared.iterdir() if shared else ())]
  return "\n".join(p.read_text("utf-8") for p in paths if p.is_file())


def _check_script(words, parse):
  """A script is there, has the flags, and its config has the fields."""
  script, *rest = words
  assert (ROOT / script).is_file(), script
  known = _sources(script)
  config = []
  for i, word in enumerate(rest):
    if word.startswith("--config."):
      config.append(word)
    elif word.startswith("--") and word != "--":
      flag = word.partition("=")[0]
      assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"
      if flag == "--config":
        config = [word, rest[i + 1], *config]
  if config:
    parse(["train", *config, "--workdir", "w"])


def _check(words, parse, extras):
  """Raises AssertionError unless a command exists as it is written."""
  words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
  program, rest = words[0], words[1:]
  if program == "lavit":
    parse(rest)
  elif program == "pip":
    asked = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
    assert {name for group in asked for name in group.split(",")} <= extras
  elif program in ("python", "python3") and rest[0] == "-m":
    paths = [word for word in rest if word.startswith("tests/")]
    assert rest[1] in ("pytest", "venv", "mkdocs", "build")
    assert all((ROOT / path).exists() for path in paths), paths
  elif program in ("python", "python3"):
    _check_script(rest, parse)
  elif program.startswith(("launch/", ".ci/")):
    _check_script(words, parse)
  else:
    assert program in _TOOLS, f"what is {program}?"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist_as_they_are_written(page, parse, extras, monkeypatch):
  monkeypatch.chdir(ROOT)
  for block in _blocks(page, "bash", "sh", "console"):
    for words in _commands(block["text"]):
      _check(words, parse, extras)


@pytest.mark.parametrize(
  "path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem
)
def test_commands_of_notebooks_exist(path, parse, extras, monkeypatch):
  monkeypatch.chdir(ROOT)
  cells = json.loads(path.read_text("utf-8"))["cells"]
  for cell in cells:
    if cell["cell_type"] == "markdown":
      for block in _BLOCK.finditer("".join(cell["source"]) + "\n"):
        for words in _commands(block["text"]):
          _check(words, parse, extras)


@pytest.mark.parametrize(
  "line",
  [
    "lavit caption a.png --bems 3",
    "lavit train --config tiny/pretrain.py --workdir w --config.stepz=1",
    "lavit train --config tiny/gone.py --workdir w",
    "lavit compile --config tiny/pretrain.py --topologie v5e:2x2",
    "pip install 'lavit_jax[tpuu]'",
    "launch/gpu.sh --gpu 3",
    "launch/local.sh --config tiny/pretrain.py -- --config.mesh.fsdb=2",
    "python benchmarks/kill.py --kill 3",
    "python benchmarks/gone.py",
    "wget x",
  ],
)
def test_commands_that_do_not_exist_are_found(line, parse, extras):
  failed = (AssertionError, SystemExit, pytest.fail.Exception)
  with pytest.raises(failed):  # noqa: PT012
    for words in _commands(line):
      _check(words, parse, extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_unmarked_blocks_are_of_a_kind_that_is_run(page):
  for block in _blocks(page, "bash", "sh", "console", "python"):
    if block["reason"] or block["kind"] == "python":
      continue
    by_ci = any(word in block["text"] for word in _BY_CI)
    others = [w for w, *_ in _commands(block["text"]) if w != "lavit"]
    assert by_ci or not others, f"{page.name}: mark it as not run: {others}"


def _run(block, names):
  if block["kind"] == "python":
    exec(compile(block["text"], "block", "exec"), names)
    return
  if any(word in block["text"] for word in _BY_CI):
    return
  for words in _commands(block["text"]):
    assert main.main(words[1:]) == 0, shlex.join(words)


def _run_pages():
  """Pages with blocks to run."""
  kinds = ("bash", "python")
  return [p for p in PAGES if any(not b["reason"] for b in _blocks(p, *kinds))]


@pytest.mark.parametrize("page", _run_pages(), ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch):
  """In order, in one folder; Python's share their names."""
  (tmp_path / "docs").symlink_to(ROOT / "docs")
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "indexes"))
  if page.name == "data.md":
    documented.write(tmp_path)
    documented.write_tfds(tmp_path)
    here.patch(monkeypatch)
  monkeypatch.chdir(tmp_path)
  names = {}
  blocks = [b for b in _blocks(page, "bash", "python") if not b["reason"]]
  assert blocks
  for block in blocks:  # one that fails raises
    _run(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_that_is_not_run_compiles(page):
  for block in _blocks(page, "python"):
    assert compile(textwrap.dedent(block["text"]), page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_lines_of_json_are_json(page):
  for block in _blocks(page, "json"):
    for line in block["text"].splitlines():
      assert isinstance(json.loads(line), dict), line


def test_every_fence_has_a_kind():
  """Else a block of commands could be left out by mistake."""
  kinds = {"bash", "python", "json", "text", "bibtex"}
  for page in PAGES:
    assert {b["kind"] for b in _blocks(page, *kinds, "")} <= kinds, page.name
    fences = re.findall(r"^```", page.read_text("utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(_blocks(page, *kinds)), page.name


@pytest.fixture(scope="module")
def fields():
  """Dotted names of all fields of all shipped configs."""
  found = set()

  def add(config, prefix):
    for name, value in config.items():
      found.add(prefix + name)
      if isinstance(value, config_dict.ConfigDict | dict):
        add(value, f"{prefix}{name}.")

  for path in ROOT.glob("configs/*/*.py"):
    if path.stem not in ("__init__", "common"):
      name = os.fspath(path.relative_to(ROOT))
      config, _ = train.read_config(["--config", name, "--workdir", "w"])
      add(config, "")
  return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_config_fields_in_the_text_exist(page, fields):
  text = page.read_text("utf-8")
  named = set(re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)", text))
  named |= set(re.findall(r"`(?:config|cfg)\.([a-z]\w*(?:\.\w+)*)`", text))
  named.discard("json")  # the file config.json
  named = {n for n in named if not re.search(r"(^|\.)(x|y|NAME)(\.|$)", n)}
  assert not named - fields, named - fields

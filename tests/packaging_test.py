"""The wheel: everything a user needs is in it, and nothing else."""

import email.parser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

import lavit_jax

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def pip(*args, **options):
  command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  done = subprocess.run(
    [*command, *map(str, args)], capture_output=True, text=True, **options
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel built from a copy, so that nothing is left in the checkout."""
  source = tmp_path_factory.mktemp("source")
  for name in SOURCES:
    if (ROOT / name).exists():
      shutil.copy(ROOT / name, source)
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("lavit_jax", "configs", "tests"):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  out = tmp_path_factory.mktemp("wheel")
  offline = ("--no-deps", "--no-build-isolation", "--no-index")
  pip("wheel", *offline, "--wheel-dir", out, source)
  (path,) = out.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """A folder with nothing but the wheel's files."""
  site = tmp_path_factory.mktemp("site")
  options = ("--no-deps", "--no-index", "--no-compile", "--target", site)
  pip("install", *options, wheel)
  return site


def python(installed, cwd, *args):
  """Runs Python in an empty folder with the installed package in front."""
  environment = os.environ | {"PYTHONPATH": str(installed)}
  return subprocess.run(
    [sys.executable, *args],
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
  )


def test_every_module_config_and_weight_is_in_the_wheel_and_no_test(wheel):
  held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in n}
  expected = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "lavit_jax").rglob("*")
    if path.is_file()
    and (
      path.suffix == ".py" or path.name == "py.typed" or "weights" in path.parts
    )
    and "__pycache__" not in path.parts
  } | {
    str("lavit_jax" / path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.py")
  }
  assert expected
  assert held == expected


def test_the_metadata_names_the_command_and_no_heavy_requirement(wheel):
  archive = zipfile.ZipFile(wheel)
  (prefix,) = {n.split("/")[0] for n in archive.namelist() if "dist-info" in n}

  def read(name):
    return archive.read(f"{prefix}/{name}").decode()

  assert "lavit = lavit_jax.commands.main:main" in read("entry_points.txt")
  assert "Apache License" in read("licenses/LICENSE")
  metadata = email.parser.Parser().parsestr(read("METADATA"))
  assert metadata["Name"] == "lavit_jax"
  assert metadata["Version"] == lavit_jax.__version__
  assert metadata["Requires-Python"] == ">=3.11"
  assert metadata["License-Expression"] == "Apache-2.0"
  assert "Typing :: Typed" in metadata.get_all("Classifier")
  extras = {"tpu", "cuda", "gcs", "torch", "eval", "parquet", "fast"}
  extras |= {"docs", "test", "test-core"}
  assert set(metadata.get_all("Provides-Extra")) == extras
  base = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
  names = {r.split(">")[0].split("=")[0].strip().lower() for r in base}
  assert {"jax", "flax", "grain", "orbax-checkpoint"} <= names
  assert not names & {"tensorflow", "torch", "pytest"}
  # Its version is the one that jax[tpu] asks for: no bound of our own.
  assert not [r for r in metadata.get_all("Requires-Dist") if "libtpu" in r]


def test_the_installed_package_runs_from_an_empty_folder(installed, tmp_path):
  done = python(installed, tmp_path, "-m", "lavit_jax", "--help")
  assert done.returncode == 0, done.stderr
  assert "quickstart" in done.stdout


def test_the_installed_package_finds_its_configs(installed, tmp_path):
  code = (
    "import pathlib, lavit_jax.commands.main\n"
    "from lavit_jax.commands import train\n"
    "argv = ['--config', 'tiny/encoder.py', '--workdir', 'w']\n"
    "print(train.read_config(argv)[0].stage, lavit_jax.commands.main.__file__)"
  )
  done = python(installed, tmp_path, "-c", code)
  assert done.returncode == 0, done.stderr
  stage, path = done.stdout.split()
  assert stage == "encoder"
  assert pathlib.Path(path).is_relative_to(installed)


def test_the_installed_package_describes_a_image(installed, tmp_path):
  """`lavit caption` with the shipped weights, nothing of the checkout near."""
  Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "scene.png")
  command = ("-m", "lavit_jax", "caption", "scene.png", "--json")
  done = python(installed, tmp_path, *command)
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(done.stdout)
  assert row["image"] == "scene.png"
  assert row["caption"]

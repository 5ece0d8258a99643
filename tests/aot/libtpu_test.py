"""Which libtpu compiles, and whether it is the one that JAX asks for."""

import importlib.metadata
import os

import pytest

from lavit_jax.aot import libtpu
from lavit_jax.core import errors


@pytest.fixture
def another(tmp_path, monkeypatch):
  """A folder as `pip install --target` makes it, of libtpu 0.0.77."""
  monkeypatch.setenv(libtpu.VARIABLE, "elsewhere")
  (tmp_path / "libtpu").mkdir()
  (tmp_path / "libtpu" / "libtpu.so").write_bytes(b"\x7fELF")
  info = tmp_path / "libtpu-0.0.77.dist-info"
  info.mkdir()
  text = "Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.77\n"
  (info / "METADATA").write_text(text)
  return tmp_path


@pytest.mark.parametrize("given", ["", "libtpu", "libtpu/libtpu.so"])
def test_another_libtpu_is_named_by_file_or_by_folder(another, given):
  libtpu.use(str(another / given))
  made = (another / "libtpu" / "libtpu.so").resolve()
  assert os.environ[libtpu.VARIABLE] == str(made)
  assert libtpu.library() == made
  assert libtpu.version() == "0.0.77"


def test_a_file_that_is_no_library_is_refused(tmp_path):
  (tmp_path / "libtpu.so").write_text("a page of a proxy")
  with pytest.raises(errors.UsageError, match="is no shared library"):
    libtpu.use(str(tmp_path / "libtpu.so"))


def test_a_path_without_a_libtpu_is_an_error(another, monkeypatch):
  with pytest.raises(errors.UsageError, match=r"nowhere: no libtpu\.so"):
    libtpu.use("nowhere")
  with pytest.raises(errors.UsageError, match=r"elsewhere: no libtpu\.so"):
    libtpu.use(None)  # as the variable has it
  monkeypatch.setenv(libtpu.VARIABLE, "")  # as `library` takes it: unset
  libtpu.use(None)
  monkeypatch.delenv(libtpu.VARIABLE)
  libtpu.use(None)
  assert libtpu.VARIABLE not in os.environ


@pytest.mark.parametrize(
  ("version", "wanted", "good"),
  [
    ("0.0.42.1", "==0.0.42.*", True),
    ("0.0.42", "==0.0.42", True),
    ("0.0.52", "==0.0.42.*", False),
    ("0.0.421", "==0.0.42.*", False),
    ("", "==0.0.42.*", False),
    ("0.0.42.1", ">=0.0.42", False),  # of a form that is not understood
    ("0.0.52", "", True),  # nothing is asked for
  ],
)
def test_another_libtpu_than_jax_asks_for_is_reported_in_one_line(
  monkeypatch, version, wanted, good
):
  monkeypatch.setattr(libtpu, "version", lambda: version)
  monkeypatch.setattr(libtpu, "pinned", lambda: wanted)
  line = libtpu.warning()
  assert (line == "") == good
  assert "\n" not in line
  if not good:
    assert f"libtpu{wanted}" in line
    assert (version or "unknown version") in line


def test_the_pin_is_read_from_what_jax_requires(monkeypatch):
  asked = next(
    line
    for line in importlib.metadata.requires("jax")
    if line.startswith("libtpu") and "tpu" in line.partition(";")[2]
  )
  assert libtpu.pinned().startswith("==")
  assert libtpu.pinned() in asked
  for lines, found in (
    (['numpy>=2; extra == "tpu"', "libtpu==1.2.*; extra == 'tpu'"], "==1.2.*"),
    (["libtpu (==1.2.*) ; extra == 'tpu'"], "==1.2.*"),
    (["libtpu==3; extra == 'other'", "libtpu-nightly==1; extra == 'tpu'"], ""),
    (None, ""),
  ):
    monkeypatch.setattr(
      importlib.metadata, "requires", lambda _, lines=lines: lines
    )
    assert libtpu.pinned() == found


@pytest.mark.libtpu
def test_what_the_suite_compiles_with_is_what_jax_asks_for():
  """Else the tests are of another compiler than a TPU machine has."""
  pytest.importorskip("libtpu")
  assert libtpu.warning() == ""

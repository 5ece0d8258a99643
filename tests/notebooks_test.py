"""Every notebook runs top to bottom, on every kind of model it is for."""

import asyncio
import os
import pathlib
import re

import jupyter_client
import nbclient
import nbformat
import pytest

_NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
_SETTINGS = ("LAVIT_MODEL", "LAVIT_SOURCE", "LAVIT_GOLDEN", "LAVIT_PICTURE")
# Drawings need not be good here: tests/infer/pixels take all the steps.
_FEW_STEPS = """
from lavit_jax.infer.pixels import latent_space, pixel_space
latent_space.STEPS = pixel_space.STEPS = 3
"""
# Each of the six is compiled for by itself.
_FEW_RATIOS = """
from lavit_jax.diffusion import stable_diffusion
stable_diffusion.RATIOS = dict(list(stable_diffusion.RATIOS.items())[:2])
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel():
  """A kernel for all notebooks: what one has compiled the next ones have."""
  manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
  yield manager
  if manager.has_kernel:
    asyncio.run(manager.shutdown_kernel(now=True))


@pytest.fixture
def execute(kernel):
  """Runs a notebook under settings: its outputs, and images among them."""

  def run(name, patch=_FEW_STEPS, **settings):
    path = _NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    setup, *_ = (c for c in notebook.cells if "from lavit_jax" in c.source)
    setup.source += patch
    fresh = nbformat.v4.new_code_cell(_fresh(settings))
    notebook.cells.insert(0, fresh)
    nbclient.NotebookClient(notebook, timeout=600, km=kernel).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    shown = [o for o in outputs if "image/png" in o.get("data", {})]
    return outputs, shown

  return run


def _fresh(settings):
  """A cell that leaves nothing of the notebook before but what it imported."""
  settings = {name: str(value) for name, value in settings.items()}
  return f"""%reset -f
import os
for name in {_SETTINGS}: os.environ.pop(name, None)
os.environ.update({settings})"""


def printed(outputs):
  """Everything that a notebook wrote with print."""
  return "".join(o["text"] for o in outputs if o.get("name") == "stdout")


@pytest.mark.parametrize(
  "name", sorted(path.stem for path in _NOTEBOOKS.glob("*.ipynb"))
)
def test_notebook_runs_and_shows_images(execute, name):
  _, shown = execute(name)
  assert len(shown) >= 5


@pytest.mark.parametrize(
  "path", sorted(_NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebook_is_kept_without_outputs(path):
  for cell in nbformat.read(path, as_version=4).cells:
    if cell.cell_type == "code":
      assert not cell.outputs
      assert cell.execution_count is None


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A model directory, made of PyTorch files with random weights."""
  pytest.importorskip("torch", reason="imports PyTorch files")
  from lavit_jax.port import importing
  from lavit_jax.port.verify import specimen

  root = tmp_path_factory.mktemp("imported")
  source = specimen.write(root / "source")
  importing.run(source, root / "model", quiet=True)
  return root / "model"


def test_understanding_reads_with_an_imported_model(execute, imported):
  outputs, shown = execute("understanding", LAVIT_MODEL=imported)
  assert len(shown) >= 5
  assert "of 42 questions" in printed(outputs)


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"),
  reason="needs LAVIT_SHARED, the folder with the recordings",
)
def test_port_checkpoint_holds_an_official_checkpoint_to_its_recordings(
  execute, tmp_path
):
  """Some of them; tests/port/verify/verify_test.py takes all."""
  golden = pathlib.Path(os.environ["LAVIT_SHARED"]).absolute() / "golden" / "a"
  some = tmp_path / "recordings"
  some.mkdir()
  for name in ("selector.npz", "quantizer.npz"):
    (some / name).symlink_to(golden / name)
  outputs, shown = execute(
    "port_checkpoint", LAVIT_SOURCE=golden / "checkpoint", LAVIT_GOLDEN=some
  )
  assert len(shown) >= 5
  assert re.search(r"^\d+ pass$", printed(outputs), re.MULTILINE)


def test_drawings_by_an_imported_model(execute, imported):
  """Random weights draw noise, in two ratios: the last to use the kernel."""
  patch = _FEW_STEPS + _FEW_RATIOS
  outputs, shown = execute("text_to_image", patch, LAVIT_MODEL=imported)
  assert len(shown) >= 5
  assert "pixel decoders: highres, lowres" in printed(outputs)
  assert "no highres decoder" not in printed(outputs)

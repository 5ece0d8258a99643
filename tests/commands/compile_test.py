"""What `lavit compile --cache` keeps is what a run looks for."""

import dataclasses

import pytest

from lavit_jax.aot import compile as ahead
from lavit_jax.aot import libtpu
from lavit_jax.commands import compile as command
from lavit_jax.commands import main
from lavit_jax.core import sharding
from lavit_jax.train import boundaries, loop, lowering, phases
from tests import micro

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path):
  """A folder where JAX keeps programs during a test, as `--cache` tells it."""
  with micro.own_cache():
    command.keep_in(str(tmp_path / "compiled"))
    yield tmp_path / "compiled"


def _steps(folder):
  return {path.name for path in folder.glob("jit_step-*-cache")}


def test_a_run_finds_the_program_that_was_compiled_ahead(
  cache, micro_codes, tmp_path
):
  """Down to the key of the cache, compiled where its model is not."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  sizes = {"data": -1, "fsdp": 2, "context": 1, "tensor": 1}
  cfg = micro.config("pretrain", root, mesh=sizes)
  elsewhere = micro.assuming(cfg)
  objective = ahead.objective_of(elsewhere)
  assert objective.artifacts.is_abstract
  (phase,) = phases.phases_of(cfg)
  with micro.devices(2):
    mesh = sharding.make_mesh(sizes)
    lowered, _ = lowering.lower(objective, elsewhere, phase, mesh)
    lowered.compile()
    kept = _steps(cache)
    assert len(kept) == 1
    loop.train(cfg, root / "run", quiet=True)
    assert _steps(cache) == kept


def test_a_run_finds_what_was_compiled_for_between_its_phases(
  cache, micro_codes, tmp_path
):
  """Mean features and k-means, before one phase; and its moments."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  sizes = {"data": -1, "fsdp": 2, "context": 1, "tensor": 1}
  cfg = micro.config("tokenizer", root, mesh=sizes, schedule=("codes",))
  elsewhere = micro.assuming(cfg)
  objective = ahead.objective_of(elsewhere)
  (phase,) = phases.phases_of(cfg)
  with micro.devices(2):
    mesh = sharding.make_mesh(sizes)
    _, given = lowering.lower(objective, elsewhere, phase, mesh)
    with sharding.use(mesh):
      made = boundaries.lower(objective, phase, *given, mesh)
    for lowered in made.values():
      lowered.compile()
    kept = _between(cache)
    assert len(kept) == len(made) == 5
    loop.train(cfg, root / "run", quiet=True)
    assert _between(cache) == kept


def _between(folder):
  names = ("feature_mean_add", "feature_mean_finish", "kmeans_add")
  names += ("kmeans_finish", "moments")
  return {
    path.name for name in names for path in folder.glob(f"jit_{name}-*-cache")
  }


_COMPILE = ("compile", "--config=lavit_7b/pretrain.py", "--topology=v5e:2x4")


@dataclasses.dataclass
class _Report:
  """What a sweep goes by."""

  fits: bool
  roofline: dict
  unread: tuple = ()


@pytest.fixture
def compiling(monkeypatch):
  """Compiles nothing: how good each remat is, the better at 8 rows."""
  good = {"dots": None, "most": None, "attention": 0.3, "full": 0.2}

  def compile_for(config, topology, **unused):
    remat, size = config.model.llm.remat, config.batch_size
    fits = good[remat] is not None
    mfu = (good[remat] or 0.9) + (size == 8) * 0.5
    text = f"{size} {remat}"
    return _Report(fits, {"mfu_no_overlap": mfu}), text

  monkeypatch.setattr(ahead, "compile_for", compile_for)
  monkeypatch.setattr(libtpu, "warning", lambda: "")
  monkeypatch.setattr(command, "keep_in", lambda folder: None)
  for name in ("_line", "_table"):
    monkeypatch.setattr(command, name, lambda *unused: "")


def test_the_program_of_a_sweep_is_that_of_the_best(
  compiling, tmp_path, capsys
):
  path = tmp_path / "best.hlo"
  words = [*_COMPILE, "--sweep", "--hlo", str(path)]
  assert main.main([*words, "--batches", "4,8,16"]) == 0
  assert "batch_size=8, remat attention" in capsys.readouterr().out
  assert path.read_text() == "8 attention"
  path.unlink()
  assert main.main([*words, "--remats", "dots"]) == command.DOES_NOT_FIT
  assert not path.exists()  # none fits


def test_an_unknown_policy_is_refused_before_anything_is_compiled(capsys):
  assert main.main([*_COMPILE, "--sweep", "--remats", "dots,foo"]) == 2
  said = capsys.readouterr().err
  assert "--remats: foo: expected some of" in said
  assert "attention, dots, full" in said


@pytest.mark.parametrize("flag", ["--batches", "--remats"])
def test_what_belongs_to_a_sweep_is_refused_without_one(
  compiling, capsys, flag
):
  assert main.main([*_COMPILE, flag, "8"]) == 2
  assert f"{flag} goes with --sweep" in capsys.readouterr().err


def test_a_program_is_written_to_a_disk(compiling, capsys):
  assert main.main([*_COMPILE, "--hlo", "gs://bucket/x"]) == 2
  assert "gs://bucket/x: the file of --hlo is written to a disk" in (
    capsys.readouterr().err
  )

"""Ahead of time for real TPU topologies: needs libtpu, not a TPU."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.aot import collectives, executed, hlo, libtpu, topology
from lavit_jax.aot import compile as ahead
from lavit_jax.aot import report as report_lib
from lavit_jax.commands import compile as command
from lavit_jax.commands import main
from lavit_jax.core import compiler_options, errors, sharding
from lavit_jax.models import llama
from lavit_jax.train import boundaries
from lavit_jax.train.objectives.frozen import abstract_params
from tests import micro
from tests.train import processes

pytestmark = [pytest.mark.slow, pytest.mark.libtpu, pytest.mark.optimized]
pytest.importorskip("libtpu")


@pytest.fixture(scope="module", autouse=True)
def _no_cache():
  """What is kept of a program for other chips cannot be read back."""
  with micro.own_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield


def _config(root):
  """Pretraining with heads that the splash kernel takes, on eight chips."""
  cfg = micro.config("pretrain", root)
  cfg.model.llm.update(
    width=128, num_heads=2, num_kv_heads=2, depth=3, mlp_dim=256, remat="dots"
  )
  cfg.model.llm.dtype = "bfloat16"
  cfg.data.length = 1024  # two blocks of logits
  cfg.mesh = dict(data=-1, fsdp=2, context=1, tensor=2)
  return cfg


@pytest.fixture(scope="module")
def compiled(micro_codes):
  """(report, HLO, config) of the step for v5e:2x4.

  With little effort, but for JAX 0.12, which has no such setting.
  """
  cfg = _config(micro_codes)
  return *ahead.compile_for(cfg, "v5e:2x4"), cfg


def test_the_step_fits_and_is_reported_in_full(compiled):
  report, _, cfg = compiled
  assert report.fits
  assert not report.assumed
  assert report.mesh == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
  assert report.chips == report.devices == 8
  assert report.tokens_per_device == cfg.batch_size * cfg.data.length / 8
  assert report.versions["libtpu"] == libtpu.version()
  assert report.versions["jax"] == jax.__version__
  memory = report.memory
  parts = ("arguments", "outputs", "temporaries", "code", "waiting")
  assert memory["total"] == sum(memory[name] for name in parts)
  assert 0 < memory["share"] < 0.1
  assert {"encoder", "merger", "llm", "head"} <= set(report.model_flops)
  assert 0 < report.roofline["mfu_no_overlap"] <= report.roofline["mfu"] <= 1
  json.dumps(dataclasses.asdict(report))


def test_the_step_has_the_splash_kernel_forward_once_and_backward_once(
  compiled,
):
  report, *_ = compiled
  names = sorted(name.rpartition(".")[0] for name in report.kernels)
  assert len(names) == 2, "remat must keep what the forward kernel gave"
  assert names[0].startswith("splash_mha_dkv")
  assert names[1].startswith("splash_mha_fwd")


def test_the_step_never_holds_all_the_logits_in_float32(compiled):
  _, text, cfg = compiled
  rows = cfg.batch_size // 4  # over data and fsdp
  vocab = ahead.objective_of(cfg).llama_config.padded_vocab // 2  # over tensor
  whole = rows * cfg.data.length * vocab
  found = [
    np.prod(dims)
    for dtype, dims in executed.arrays(hlo.read(text))
    if dtype == "f32" and vocab in dims
  ]
  assert found, "the logits of a block"
  assert max(found) < whole


def test_the_encoder_runs_once_and_is_not_differentiated(compiled):
  _, text, _ = compiled
  names = set(re.findall(r'op_name="([^"]*)"', text))
  encoder = {name for name in names if "EvaVit" in name}
  assert encoder
  assert not any("transpose(jvp(EvaVit" in name for name in encoder)
  assert not any("rematted" in name for name in encoder)


def test_executed_products_are_counted_as_often_as_they_run():
  """A scan of matrix products on a chip: 2 m n k times its length."""
  devices = topology.devices("v5e:2x4")[:1]
  mesh = sharding.make_mesh({}, devices)
  place = sharding.replicated(mesh)
  x, w = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in ((256, 512), (6, 512, 512))
  )

  def run(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  made = hlo.read(jax.jit(run).lower(x, w).compile().as_text())
  assert executed.flops(made) == 6 * 2 * 256 * 512 * 512
  assert executed.hbm_bytes(made) > 0


def test_batched_products_are_counted_as_products():
  """TPUs write them as convolutions with windows between the rows."""
  devices = topology.devices("v5e:2x4")[:1]
  place = sharding.replicated(sharding.make_mesh({}, devices))
  a, b = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in ((2, 4, 256, 128), (2, 4, 256, 128))
  )
  run = lambda a, b: jnp.einsum("bhld,bhmd->bhlm", a, b)
  made = hlo.read(jax.jit(run).lower(a, b).compile().as_text())
  assert executed.flops(made) == 2 * 2 * 4 * 256 * 256 * 128


@pytest.fixture(scope="module")
def tokenizer():
  """(config, report) of the tokenizer's last phase for v5e:2x4."""
  cfg = micro.assumed_tokenizer()
  cfg.mesh = dict(data=-1, fsdp=2, context=1, tensor=1)
  return cfg, ahead.compile_for(cfg, "v5e:2x4")[0]


def test_what_runs_before_a_phase_is_compiled_and_measured(tokenizer):
  cfg, report = tokenizer
  assert report.fits
  made = {one["program"]: one for one in report.boundaries}
  count = cfg.phases.codes.kmeans_batches
  each = f"kmeans, each of {count} batches"
  assert list(made) == [each, "kmeans, at the end", "moments"]
  for one in made.values():
    assert one["fits"]
    memory = one["memory"]
    parts = ("arguments", "outputs", "temporaries", "code", "waiting")
    assert memory["total"] == sum(memory[name] for name in parts)
    # The next batch is put while one is added, and while a step runs.
    reads = one["program"] == each
    assert memory["waiting"] == (report.memory["waiting"] if reads else 0)
  assert report.memory["waiting"] > 0
  # Frozen parameters are in memory, whatever a program reads.
  objective = ahead.objective_of(cfg)
  frozen = jax.tree.leaves(sharding.unbox(objective.frozen_shapes()))
  sizes = [x.size * x.dtype.itemsize for x in frozen]
  at_end = made["kmeans, at the end"]["memory"]
  assert at_end["arguments"] > sum(sizes) / 2  # two ways of fsdp
  # The vectors so far are written in place.
  rows, dim = cfg.batch_size * cfg.data.capacity, 8
  assert made[each]["memory"]["outputs"] < 4 * count * rows * dim / 8


def test_a_boundary_that_takes_more_than_the_step_is_reported(
  tokenizer, monkeypatch
):
  """The step is that of the report: only what runs before it is compiled."""
  cfg, report = tokenizer
  lower = boundaries.lower
  monkeypatch.setattr(ahead, "_compile_program", lambda *_, **__: (report, ""))

  def larger(*args):
    mesh = args[-1]
    place = sharding.replicated(mesh)
    x = jax.ShapeDtypeStruct((1 << 28,), jnp.float32, sharding=place)
    grown = jax.jit(lambda x: x + 1).lower(x)
    return {"moments": lower(*args)["moments"], "growth": grown}

  monkeypatch.setattr(boundaries, "lower", larger)
  warned, _ = ahead.compile_for(cfg, "v5e:2x4")
  assert warned.fits
  (line,) = (one for one in warned.warnings if "growth" in one)
  assert re.search(r"growth, before the phase, takes 2\.\d+ GB; the step", line)
  monkeypatch.setattr(ahead, "FULLEST", 0.1)
  full, _ = ahead.compile_for(cfg, "v5e:2x4")
  assert not full.fits
  assert re.match("growth: 1[23]% of a device's HBM", full.why_not)


def test_a_program_for_chips_of_two_devices_counts_both():
  cfg = micro.assumed_tokenizer()
  report, _ = ahead.compile_for(cfg, "tpu7x:2x2x1", phase="random")
  assert (report.chips, report.devices) == (4, 8)
  assert report.tokens_per_device == cfg.batch_size / 8
  assert report.memory["of"] == 96 * 2**30
  assert [one["program"] for one in report.boundaries] == [
    "feature_mean, each of 8 batches",
    "feature_mean, at the end",
    "moments",
  ]
  line = report.roofline
  least = sum(report.model_flops.values()) / 8 / (2307e12 / 2)
  assert line["mfu"] == pytest.approx(least / line["step_s"])


def test_all_phases_are_compiled_one_after_the_other(monkeypatch, capsys):
  """The command: a list, and a wrong one of them is a failure."""
  cfg = micro.assumed_tokenizer()
  monkeypatch.setattr(command.train, "read_config", lambda _: (cfg, None))

  def report(config, topology_name, *, slices, program, phase):
    assert (config, topology_name, slices, program) == (
      cfg,
      "v5e:2x4",
      1,
      "step",
    )
    versions = libtpu.versions()
    return report_lib.Report(
      **{"program": phase, "topology": topology_name, "slices": 1},
      **{"chips": 8, "devices": 8, "mesh": {}, "assumed": True},
      **{"batch_size": 8, "tokens_per_device": 1.0, "versions": versions},
      fits=phase != "joint",
      why_not="too large" if phase == "joint" else "",
    ), ""

  monkeypatch.setattr(ahead, "compile_for", report)
  words = ["compile", "--topology", "v5e:2x4", "--phase", "all"]
  with micro.own_cache():
    assert main.main([*words, "--json"]) == command.DOES_NOT_FIT
    found = json.loads(capsys.readouterr().out)
    assert [one["program"] for one in found] == list(cfg.schedule)
    assert main.main([*words, "--hlo", "x"]) == 2
  assert "--phase all" in capsys.readouterr().err


def test_what_does_not_fit_says_so_and_exits_with_3(
  micro_codes, monkeypatch, capsys
):
  cfg = _config(micro_codes)
  report, text = ahead.compile_for(cfg, "v5e:2x4", program="decode")
  assert report.fits
  assert text
  monkeypatch.setattr(ahead, "FULLEST", 1e-6)
  again, _ = ahead.compile_for(cfg, "v5e:2x4", program="decode")
  assert not again.fits
  assert "more than" in again.why_not


def test_int8_products_are_int8_on_the_chip_and_their_kernels_are_sent_so(
  micro_codes, compiled
):
  cfg = _config(micro_codes)
  cfg.model.llm.matmul = "int8"
  report, _ = ahead.compile_for(cfg, "v5e:2x4")
  plain, *_ = compiled
  assert plain.int8_flops == 0
  llm = cfg.model.llm
  kernels = llm.depth * (4 * llm.width**2 + 3 * llm.width * llm.mlp_dim)
  # Two FLOPs a weight, forward and by x.
  assert report.int8_flops == 2 * 2 * report.tokens_per_device * kernels
  assert report.roofline["compute_s"] < plain.roofline["compute_s"]
  assert "s8" in {one["dtype"] for one in report.collectives}


def test_what_libtpu_dumps_and_what_jaxlib_reads_say_the_same(
  micro_codes, monkeypatch
):
  cfg = _config(micro_codes)
  dumped, text = ahead.compile_for(cfg, "v5e:2x4", program="decode")
  compiles = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, "compile", lambda lowered, _: compiles(lowered)
  )
  read, other = ahead.compile_for(cfg, "v5e:2x4", program="decode")
  assert other != text  # written by another hand
  assert dumped.executed_flops == read.executed_flops
  assert dumped.collectives == read.collectives
  assert dumped.kernels == read.kernels
  assert dumped.roofline == read.roofline

  def fails(_):
    raise jax.errors.JaxRuntimeError("Async done requires an operand")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", fails)
  unread, text = ahead.compile_for(cfg, "v5e:2x4", program="decode")
  assert (text, unread.unread) == ("", "Async done requires an operand")
  assert unread.fits
  assert unread.memory == read.memory


def test_a_config_gives_the_compiler_the_options_of_its_chips():
  config = micro.config("pretrain", "models")
  mesh = sharding.make_mesh({}, topology.devices("v6e:2x2")[:1])
  plain = compiler_options.of_mesh(mesh, config)
  config.compiler_options = {
    "xla_tpu_scoped_vmem_limit_kib": "8192",
    "xla_gpu_autotune_level": "0",
  }
  own = {"xla_tpu_scoped_vmem_limit_kib": "8192"}
  assert compiler_options.of_mesh(mesh, config) == plain | own
  assert not compiler_options.of_mesh(
    sharding.make_mesh({}, jax.devices()[:1]), config
  )
  config.compiler_options = {"scoped_vmem": "8192"}
  with pytest.raises(errors.ConfigError, match=r"\['scoped_vmem'\]"):
    compiler_options.of_mesh(mesh, config)


def test_a_mesh_without_fsdp_of_a_large_model_is_an_error():
  config = dataclasses.replace(llama.LLAMA2_7B, width=4096, depth=1)
  devices = topology.devices("v5e:2x4")
  mesh = sharding.make_mesh({"context": 8}, devices)
  made = sharding.abstract(abstract_params.llm(config), mesh)
  assert made["embedding"].sharding.is_fully_replicated  # as configured
  mesh = sharding.make_mesh({"tensor": 8}, devices)
  with pytest.raises(errors.ConfigError, match="whole on every device"):
    sharding.abstract({"table": made["embedding"]}, mesh)


def test_collectives_of_a_step_are_found(compiled):
  report, text, _ = compiled
  kinds = {one["kind"] for one in report.collectives}
  assert "all-gather" in kinds
  assert kinds <= set(collectives.KINDS)
  assert "ENTRY" in text


def test_a_sweep_ends_with_the_best_that_fits(micro_codes, tmp_path, capsys):
  config = processes.write_config(
    tmp_path / "config.py",
    "pretrain",
    micro_codes,
    mesh={"data": -1, "fsdp": 2, "context": 1, "tensor": 1},
  )
  words = ["compile", "--config", str(config), "--topology", "v5e:2x4"]
  words += ["--program", "decode", "--sweep", "--remats", "full"]
  cache = tmp_path / "compiled"
  with micro.own_cache():
    words += ["--batches", "8,16", "--cache", str(cache)]
    assert main.main(words) == 0
  out, err = capsys.readouterr()
  assert len(list(cache.glob("*-cache"))) == 2
  assert err.count("of HBM") == 2
  assert "fits\nbest: --config.batch_size=" in out
  assert "decode on v5e:2x4, 8 chips (data 4 x fsdp 2)" in out


def test_a_batch_that_does_not_divide_over_the_chips_is_an_error(micro_codes):
  cfg = _config(micro_codes)
  cfg.batch_size = 6
  with pytest.raises(errors.ConfigError, match=r"data x fsdp = 4"):
    ahead.compile_for(cfg, "v5e:2x4")

"""Which configs a workdir takes for those of its run."""

import json

import pytest
from lavit_jax.configs.lavit_7b import pretrain
from lavit_jax.configs.tiny import pretrain as tiny

from lavit_jax.core import errors
from lavit_jax.train.resilience import workdir


def test_a_run_goes_on_under_code_with_new_fields_that_are_off(tmp_path):
  cfg = pretrain.get_config()
  workdir.claim(cfg, tmp_path)
  path = tmp_path / "config.json"
  older = json.loads(path.read_text())
  del older["model"]["llm"]["matmul"]
  path.write_text(json.dumps(older))
  workdir.claim(cfg, tmp_path)
  assert json.loads(path.read_text())["model"]["llm"]["matmul"] == ""
  path.write_text(json.dumps(older))
  cfg.model.llm.matmul = "int8"
  with pytest.raises(errors.ConfigError, match=r"matmul \(None there, 'int8'"):
    workdir.claim(cfg, tmp_path)


def test_the_computation_of_a_step_may_change_but_not_its_result(tmp_path):
  cfg = pretrain.get_config()
  workdir.claim(cfg, tmp_path)
  cfg.model.llm.remat = "full"  # in place of "dots"
  cfg.compiler_options = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
  cfg.model.llm.unroll += 1
  cfg.mesh.fsdp = 2
  cfg.data.limit_share = 0.2  # as the error of a run that stopped for it says
  workdir.claim(cfg, tmp_path)
  cfg.model.llm.depth += 1
  with pytest.raises(errors.ConfigError, match=r"model\.llm\.depth"):
    workdir.claim(cfg, tmp_path)


@pytest.mark.parametrize("field", ["workdir", "model_dir"])
def test_names_under_which_arrays_would_be_lost_are_refused_at_once(
  tmp_path, field
):
  cfg = pretrain.get_config()
  cfg.model_dir, work = str(tmp_path / "model"), tmp_path / "run"
  if field == "workdir":
    work = tmp_path / "run[1]"
  else:
    cfg.model_dir = str(tmp_path / "model[1]")
  with pytest.raises(errors.CheckpointError, match=r"has \[ in its name"):
    workdir.claim(cfg, work)
  assert not list(tmp_path.iterdir())


def _older(cfg, folder):
  """The stored config of a run begun before `model.compute` was."""
  workdir.claim(cfg, folder)
  path = folder / "config.json"
  stored = json.loads(path.read_text())
  del stored["model"]["compute"]
  path.write_text(json.dumps(stored))
  return path


@pytest.mark.parametrize("module", [tiny, pretrain])
def test_a_run_from_before_model_compute_goes_on_with_the_new_config(
  module, tmp_path, caplog
):
  cfg = module.get_config()
  path = _older(cfg, tmp_path)
  workdir.claim(cfg, tmp_path)
  dtype = cfg.model.compute.encoder.dtype
  assert f"encoder {dtype}" in caplog.text
  assert json.loads(path.read_text())["model"]["compute"]
  caplog.clear()
  cfg.model.compute.merger.remat = "attention"
  workdir.claim(cfg, tmp_path)
  assert not caplog.text
  cfg.model.compute.encoder.dtype = "float16"
  with pytest.raises(errors.ConfigError, match=r"compute\.encoder\.dtype"):
    workdir.claim(cfg, tmp_path)


def test_a_dtype_that_is_left_out_is_float32(tmp_path):
  cfg = tiny.get_config()
  workdir.claim(cfg, tmp_path)
  del cfg.model.compute.encoder.dtype
  workdir.claim(cfg, tmp_path)
  cfg.model.compute.encoder.dtype = "bfloat16"
  with pytest.raises(errors.ConfigError, match="'float32' there, 'bfloat16'"):
    workdir.claim(cfg, tmp_path)


def test_a_workdir_belongs_to_nobody_until_its_config_is_found_good(tmp_path):
  cfg = pretrain.get_config()
  workdir.check(cfg, tmp_path / "run")
  assert not list(tmp_path.iterdir())
  cfg.model.llm.depth += 1
  workdir.claim(cfg, tmp_path / "run")
  cfg.model.llm.depth += 1
  with pytest.raises(errors.ConfigError, match=r"model\.llm\.depth"):
    workdir.check(cfg, tmp_path / "run")

"""The main job end to end at width 16: every stage, evaluation, report."""

import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

from lavit_jax.commands import main
from lavit_jax.core import errors
from lavit_jax.evaluate import suite
from lavit_jax.infer.pixels import pixel_space
from lavit_jax.jobs import quickstart
from tests import micro


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
  """Drawings are judged, but need not be good."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(suite, "_DRAWING_STEPS", 1)
    patch.setattr(pixel_space, "STEPS", 1)
    yield


@pytest.fixture(scope="module")
def run(micro_runs, tmp_path_factory):
  """A trained run, gone on with: evaluation and report are what is left."""
  workdir = tmp_path_factory.mktemp("quickstart") / "run"
  shutil.copytree(micro_runs, workdir)
  with micro.one_device():
    metrics = quickstart.run(
      workdir,
      configs=lambda stage: micro.config(stage, workdir),
      scenes=10,
      quiet=True,
    )
  return workdir, metrics


@pytest.mark.slow
def test_quickstart_writes_model_metrics_and_report(run):
  workdir, metrics = run
  stored = json.loads((workdir / "report" / "metrics.json").read_text())
  for name in (
    "caption_attributes",
    "vqa_accuracy",
    "vqa_majority",
    "t2i_attributes",
    "t2i_attributes_shuffled",
    "edit_attributes",
    "recon_gain",
    "recon_gain_objects",
    "recon_gain_random",
    "recon_gain_sampled",
    "recon_gain_no_codes",
    "codes_used_share",
    "perplexity",
    "kept_share",
    "object_lift",
    "never_seen_caption_attributes",
    "never_seen_t2i_attributes",
  ):
    assert np.isfinite(stored[name]), name
    assert stored[name] == metrics[name]
  assert set(stored["seconds"]) == {*quickstart.STAGES, "evaluation"}
  assert set(stored["parameters"]) == {"encoder", "tokenizer", "pixels", "llm"}
  page = (workdir / "report" / "index.html").read_text()
  assert page.count("data:image/png;base64") >= 20
  assert "<svg" in page


@pytest.mark.slow
def test_quickstart_again_skips_what_is_done(run, capsys):
  workdir, metrics = run
  again = quickstart.run(
    workdir,
    configs=lambda stage: micro.config(stage, workdir),
    scenes=10,
    quiet=True,
  )
  assert "pretrain: done before" in capsys.readouterr().out
  assert again["caption_attributes"] == metrics["caption_attributes"]
  assert again["t2i_attributes"] == metrics["t2i_attributes"]


_OTHERWISE = {
  "other data": (
    {"data__seed": 5},
    errors.ConfigError,
    r"data\.seed \(0 there",
  ),
  "other steps": ({"steps": 50}, errors.ConfigError, r"steps \(0 there"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _OTHERWISE)
def test_a_stage_trained_with_another_config_is_not_skipped(
  name, micro_runs, tmp_path
):
  updates, error, said = _OTHERWISE[name]
  with pytest.raises(error, match=said):
    quickstart.train(
      micro_runs,
      configs=lambda stage: micro.config(stage, micro_runs, **updates),
      quiet=True,
    )
  with pytest.raises(errors.ConfigError, match=r"data\.kind"):
    quickstart.train(
      micro_runs,
      data=micro.images(tmp_path),
      configs=lambda stage: micro.config(stage, micro_runs),
    )


@pytest.mark.slow
def test_changed_data_of_a_finished_stage_are_refused(
  micro_runs, monkeypatch, capsys
):
  make = lambda stage: micro.config(stage, micro_runs)
  quickstart.train(micro_runs, configs=make, quiet=True)
  assert capsys.readouterr().out.count("done before") == 5
  monkeypatch.setattr(quickstart.contents, "of", lambda source: "other")
  with pytest.raises(errors.DataError, match=r"train_data is .* 'other' here"):
    quickstart.train(micro_runs, configs=make, quiet=True)


@pytest.mark.slow
def test_every_command_works_on_the_trained_model(run, tmp_path, capsys):
  workdir, _ = run
  model = ["--model", str(workdir)]
  scene = tmp_path / "scene.png"
  pixels = np.full((60, 80, 3), 90, np.uint8)
  pixels[10:30, 10:30] = (220, 20, 20)
  PIL.Image.fromarray(pixels).save(scene)
  out = str(tmp_path / "out.png")
  commands = (
    ["caption", str(scene), "--json"],
    ["answer", str(scene), "how many?", "--json"],
    ["tokenize", str(scene), "--json"],
    ["info", "--json"],
  )
  for command in commands:
    assert main.main([*command, *model]) == 0, command
    json.loads(capsys.readouterr().out)
  overlay = str(tmp_path / "overlay.png")
  assert main.main(["tokenize", str(scene), "--overlay", overlay, *model]) == 0
  assert PIL.Image.open(overlay).size[0] > 48
  assert main.main(["generate", "a red circle", "--out", out, *model]) == 0
  assert PIL.Image.open(out).size == (48, 48)
  assert main.main(["reconstruct", str(scene), "--out", out, *model]) == 0
  assert PIL.Image.open(out).size == (48, 48)


@pytest.mark.slow
def test_bad_images_end_the_command_with_a_paragraph(run, tmp_path, capsys):
  workdir, _ = run
  bad = tmp_path / "broken.jpg"
  bad.write_bytes(b"\xff\xd8 this is no image")
  status = main.main(["caption", str(bad), "--model", str(workdir)])
  said = capsys.readouterr().err
  assert status == 2
  assert "broken.jpg" in said
  assert "Traceback" not in said


def test_model_without_evaluate_only_is_refused(tmp_path):
  with pytest.raises(errors.UsageError, match="evaluate-only"):
    quickstart.run(tmp_path, model="tiny")


@pytest.fixture
def evaluated(monkeypatch):
  """Which data each call of `run` evaluates on; no model is needed."""
  found = []

  def evaluate(lavit, *, data, scenes, quiet):
    found.append(data)
    return {}, None

  nothing = lambda *unused, **more: pathlib.Path()
  monkeypatch.setattr(quickstart.suite, "evaluate", evaluate)
  monkeypatch.setattr(quickstart.pipeline.LaVIT, "load", nothing)
  monkeypatch.setattr(quickstart.report_build, "write", nothing)
  return found


@pytest.mark.parametrize("trained_on", [None, "shapes", "jsonl"])
def test_evaluation_uses_the_data_of_its_arguments(
  evaluated, tmp_path, trained_on
):
  """Over what the workdir's run was trained on, if there was one."""
  if trained_on:
    cfg = micro.config("pretrain", tmp_path)
    cfg.data.kind, cfg.data.path = trained_on, "/theirs.jsonl"
    cfg.data.held_out_path, cfg.data.seed = "/theirs_too.jsonl", 77
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/config.json").write_text(cfg.to_json_best_effort())

  def data_of(**given):
    quickstart.run(tmp_path, evaluate_only=True, **given)
    return evaluated.pop()

  found = data_of(data="my.jsonl", fields={"limit_share": 0.5})
  assert (found["kind"], found["limit_share"]) == ("jsonl", 0.5)
  assert found["path"] == str(pathlib.Path("my.jsonl").absolute())
  assert not found["held_out_path"]  # theirs is none of my.jsonl
  assert data_of(fields={"limit_share": 0.25})["limit_share"] == 0.25
  if trained_on:  # and nothing given: what it was trained on
    found = data_of()
    assert (found["kind"], found["seed"]) == (trained_on, 77)
    assert found["held_out_path"] == "/theirs_too.jsonl"
  # Another model has nothing to do with the run of the workdir.
  found = data_of(model="tiny")
  assert (found["kind"], found["path"]) == ("shapes", "")
  assert found["seed"] != 77
  found = data_of(model="tiny", data="my.jsonl")
  assert (found["kind"], found["seed"] != 77) == ("jsonl", True)


def test_quickstart_passes_fields_to_every_stage(tmp_path):
  fields = {"limit_share": 0.3, "allow_absolute": True}
  configs = quickstart._configs(
    tmp_path, quickstart._committed, None, "my.jsonl", fields
  )
  for config in configs.values():
    assert config.data.limit_share == 0.3
    assert config.data.allow_absolute
  assert quickstart._data_of(tmp_path, "my.jsonl", fields)["allow_absolute"]

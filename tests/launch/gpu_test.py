"""launch/gpu.sh, with srun, sbatch and lavit that are small scripts."""

import os
import subprocess

import pytest

from tests.launch import worlds

GPU = ("--config", "configs/run.py", "--workdir", "/shared/w", "--grace", "1")


def test_gpu_runs_one_process_on_the_first_k_gpus(world):
  status, out, _ = world.run("gpu.sh", *GPU, "--gpus", "3", "--", *worlds.ODD)
  assert status == 0
  [(arguments, environment)] = world.attempts("0")
  assert arguments == ["train", *GPU[:4], *worlds.ODD]
  assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2"
  assert "LAVIT_NUM_PROCESSES" not in environment
  assert out.startswith("attempt 0 step 1\n")


def test_gpu_tries_crashes_again(world):
  world.plan(_0=1, _1=134)
  assert world.run("gpu.sh", *GPU)[0] == 0
  assert len(world.attempts("0")) == 3


def test_gpu_by_hand_sets_what_the_trainer_reads(world):
  hand = ["--processes=4", "--process-id=2", "--coordinator=node0:9876"]
  assert world.run("gpu.sh", *GPU, *hand)[0] == 0
  [(_, environment)] = world.attempts("2")
  assert environment["LAVIT_COORDINATOR"] == "node0:9876"
  assert environment["LAVIT_NUM_PROCESSES"] == "4"


def slurm(world):
  """srun that drops its flags and runs, sbatch and scontrol that record."""
  worlds.write_script(
    world.path / "bin/srun",
    'printf "%s\\n" "$@" >>srun\n'
    'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
  )
  for name in ("sbatch", "scontrol"):
    worlds.write_script(
      world.path / "bin" / name, f'printf "%s\\0" "$@" >>{name}'
    )


def test_gpu_submits_itself_to_slurm_and_the_job_starts_a_process_a_node(
  world,
):
  slurm(world)
  args = [*GPU, "--slurm", "--nodes", "2", "--gpus", "4"]
  flags = ["--sbatch-flag=--comment=it's; touch pwned"]
  assert world.run("gpu.sh", *args, *flags, "--", *worlds.ODD)[0] == 0
  submitted = (world.path / "sbatch").read_text().split("\0")[:-1]
  wanted = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4"}
  assert {*wanted, "--signal=TERM@120", "--requeue"} <= set(submitted)
  assert "--comment=it's; touch pwned" in submitted
  assert submitted[-2] == "--wrap"
  env = {
    "PATH": f"{world.path / 'bin'}:{os.environ['PATH']}",
    "LAVIT_STUB": str(world.path),
    "SLURM_JOB_ID": "7",
  }
  subprocess.run(
    ["sh", "-c", submitted[-1]],
    check=True,
    env=os.environ | env,
    cwd=world.path,
    capture_output=True,
  )
  assert not list(world.path.rglob("pwned"))
  srun = (world.path / "srun").read_text().splitlines()
  assert {*wanted, "--kill-on-bad-exit=0"} <= set(srun)
  [(arguments, environment)] = world.attempts("0")
  assert arguments == ["train", *GPU[:4], *worlds.ODD]
  assert environment["LAVIT_DISTRIBUTED"] == "1"
  assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
  assert not (world.path / "scontrol").exists()


def test_gpu_puts_a_preempted_slurm_job_back_into_the_queue(world):
  slurm(world)
  world.plan(_0=1, _1=75)
  args = [*GPU, "--slurm", "--gpus", "4", "--resume"]
  assert world.run("gpu.sh", *args, SLURM_JOB_ID="7")[0] == 75
  assert len(world.attempts("0")) == 2
  assert (world.path / "scontrol").read_text() == "requeue\0" + "7\0"


MISTAKES = [
  ([*GPU, "--gpus", "0"], "--gpus takes a whole number of at least"),
  ([*GPU, "--slurm"], "--slurm needs --gpus"),
  ([*GPU, "--nodes", "2"], "--nodes goes with --slurm"),
  ([*GPU, "--processes", "2"], "--process-id takes a whole number"),
  (
    [*GPU, "--processes=2", "--process-id=2", "--coordinator=a:1"],
    "--process-id runs from 0 to 1, not 2",
  ),
  (
    [*GPU, "--processes=2", "--process-id=1", "--coordinator=a"],
    "--coordinator takes HOST:PORT, not 'a'",
  ),
]


@pytest.mark.parametrize(("args", "line"), MISTAKES)
def test_a_mistake_is_one_clear_line(world, args, line):
  status, out, err = world.run("gpu.sh", *args)
  assert (status, out, err.count("\n")) == (2, "", 1)
  assert line in err

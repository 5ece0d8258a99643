"""launch/tpu_pod.sh against a gcloud that is a small script."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess

import pytest

from tests.launch import worlds

# TPU: create or reuse


def test_a_first_run_creates_copies_installs_starts_and_follows(world):
  status, out, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0, err
  verbs = [c[3] for c in world.calls()]
  assert verbs == [
    *("describe", "create", "describe", "ssh", "scp"),
    *("ssh", "ssh", "ssh", "ssh"),
  ]
  create = world.calls("create")[0]
  assert create[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
  assert "--accelerator-type=v5litepod-16" in create
  assert "--version=v2-alpha-tpuv5-lite" in create
  assert not {"--spot", "--reserved"} & set(create)
  assert out == "".join(f"attempt 0 step {i}\n" for i in (1, 2, 3))
  train = ["train", "--config", "configs/run.py", "--workdir"]
  for host in ("pod.0", "pod.1"):
    [(arguments, environment)] = world.attempts(host)
    assert arguments == [*train, "/mnt/shared/run"]
    assert environment["LAVIT_DISTRIBUTED"] == "1"
    assert environment["PWD"].endswith("lavit/code")


def test_a_tpu_is_never_deleted_unasked_and_the_way_to_do_it_is_told(world):
  _, _, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert not world.calls("delete")
  command = "launch/tpu_pod.sh delete --name pod --zone=us-west4-a"
  assert command in err
  assert world.run(*command.replace("launch/", "").split())[0] == 0
  assert world.state()["nodes"] == {}


def test_a_ready_tpu_with_the_same_code_is_only_started_on(world):
  world.run("tpu_pod.sh", *worlds.RUN)
  before = len(world.calls())
  status, out, _ = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0
  assert [c[3] for c in world.calls()[before:]] == ["describe", *["ssh"] * 4]
  assert out.startswith("attempt 1 step 1\n")
  assert len(world.calls("create")) == 1


def _interrupted(launcher):
  """Its stderr after SIGTERM, sent again like a second Ctrl-C if need be.

  bash runs a trap late if the signal comes just before its `wait` blocks.
  """
  for _ in range(4):
    launcher.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
      return launcher.communicate(timeout=5)[1]
  raise AssertionError("it goes on after four signals")


def test_a_run_in_progress_is_followed_and_not_started_twice(world):
  world.plan(_0="hang")
  first = world.start("tpu_pod.sh", *worlds.RUN)
  world.wait_for_attempt("pod.0", "pod.1")
  first.stdout.readline()
  err = _interrupted(first)
  assert first.returncode == 130
  assert "no longer following; a run that was started goes on" in err
  second = world.start("tpu_pod.sh", *worlds.RUN)
  assert second.stdout.readline() == "attempt 0 step 1\n"
  world.release()
  out = second.stdout.read()  # not communicate(), which forgets what is read
  assert second.wait(timeout=20) == 0
  assert "in progress; following it" in second.stderr.read()
  assert out == "attempt 0 step 2\nattempt 0 step 3\n"
  assert len(world.attempts("pod.0")) == len(world.attempts("pod.1")) == 1


def test_another_run_in_progress_is_left_alone(world):
  world.plan(_0="hang")
  world.start("tpu_pod.sh", *worlds.RUN)
  world.wait_for_attempt("pod.0", "pod.1")
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--config.lr=1")
  assert status == 2
  assert "another run is in progress" in err
  assert "tpu_pod.sh stop --name pod" in err
  assert len(world.attempts("pod.0")) == 1


def test_hosts_that_are_told_to_start_twice_start_once(world):
  world.plan(_0="hang")
  world.start("tpu_pod.sh", *worlds.RUN)
  world.wait_for_attempt("pod.0", "pod.1")
  home = world.path / "tpus/pod/w0"
  worker = ["bash", home / "lavit/code/launch/lib/worker.sh"]
  again = subprocess.run(
    [*worker, "start", "key", "another-attempt", "--", "lavit", "train"],
    env=os.environ | {"HOME": str(home), "LAVIT_STUB": str(world.path)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert again.stdout.endswith(" already\n")
  assert len(list((world.path / "runs").iterdir())) == 2


def test_a_run_that_lives_on_some_hosts_only_is_ended_and_started_anew(world):
  world.plan(_0="hang")
  first = world.start("tpu_pod.sh", *worlds.RUN)
  world.wait_for_attempt("pod.0", "pod.1")
  first.kill()
  pid = world.path / "tpus/pod/w1/lavit/run/pid"
  os.killpg(int(pid.read_text()), signal.SIGKILL)
  status, out, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0
  assert "alive on 1 of 2 hosts only" in err
  assert out.startswith("attempt 1 step 1\n")


# TPU: what can go wrong


def test_a_run_preempted_twice_is_resumed_on_a_new_tpu_each_time(world):
  world.plan(_0="hang", _1="hang")
  world.set(faults={"ssh:follow": ["preempt", "preempt"]})
  status, out, err = world.run("tpu_pod.sh", *worlds.RUN, "--spot")
  assert status == 0, err
  assert len(world.calls("create")) == 3
  assert all("--spot" in c for c in world.calls("create"))
  assert len(world.calls("delete")) == 2
  for host in ("pod.0", "pod.1"):
    arguments = [a for a, _ in world.attempts(host)]
    assert len(arguments) == 3
    assert arguments[0] == arguments[1] == arguments[2]
  assert out.endswith("attempt 2 step 3\n")
  assert err.count("the TPU was taken away") == 2


@pytest.mark.parametrize("moment", ["scp", "ssh:setup", "ssh:start"])
def test_a_preemption_before_the_run_is_recovered_from(world, moment):
  world.set(faults={moment: ["preempt"]})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--spot")
  assert status == 0, err
  assert len(world.calls("create")) == 2


def test_no_capacity_is_waited_out(world):
  world.set(faults={"create": ["capacity", "offline", "exists"]})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0
  assert len(world.calls("create")) == 4
  waits = [f"again in {s} s" for s in (10, 20, 40)]
  assert [w for w in waits if w in err] == waits


def test_capacity_that_never_comes_ends_with_75_and_advice(world):
  world.set(faults={"create": ["capacity"] * 9})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--capacity-tries", "3")
  assert status == 75
  assert len(world.calls("create")) == 3
  assert "no v5litepod-16 in us-west4-a after 3 tries" in err
  assert "--queued" in err


@pytest.mark.parametrize(("fault", "tries"), [("denied", 1), ("quota", 3)])
def test_a_refusal_is_not_repeated_for_long(world, fault, tries):
  world.set(faults={"create": [fault] * 9})
  status, _, _ = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 1
  assert len(world.calls("create")) == tries


def test_a_dropped_ssh_loses_and_repeats_no_line_and_starts_nothing_twice(
  world,
):
  world.set(
    faults={
      "ssh:state": ["drop"],
      "scp": ["drop"],
      "ssh:setup": ["drop after"],
      "ssh:start": ["drop after"],
      "ssh:follow": ["drop", "drop at 2", "repeat at 1"],
    }
  )
  status, out, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0, err
  assert out == "".join(f"attempt 0 step {i}\n" for i in (1, 2, 3))
  assert len(world.attempts("pod.0")) == len(world.attempts("pod.1")) == 1
  assert len(world.calls("create")) == 1


def test_an_ssh_that_stays_away_gives_up_and_names_the_agent(world):
  world.set(faults={"ssh:state": ["drop"] * 99})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, **worlds.AT_ONCE)
  assert status == 1
  assert len(world.calls("ssh")) == 8
  assert "ssh-add ~/.ssh/google_compute_engine" in err


def test_a_log_that_stays_away_leaves_the_run_alone(world):
  world.plan(_0="hang")
  world.set(faults={"ssh:follow": ["drop"] * 99})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, **worlds.AT_ONCE)
  assert status == 75
  assert "the same command follows it again" in err
  assert not world.commands("worker.sh kill")


def test_gcloud_without_an_answer_is_asked_again(world):
  world.set(faults={"describe": ["offline", "offline"]})
  status, _, _ = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0
  assert len(world.calls("create")) == 1


def test_a_tpu_that_never_gets_ready_is_waited_for_until_the_timeout(world):
  world.set(nodes={"pod": "CREATING"})
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--ready-timeout", "60")
  assert status == 75
  assert len(world.calls("describe")) == 5
  assert "still CREATING after 60 s" in err
  assert not world.calls("delete")


def test_an_installation_that_fails_is_tried_again(world):
  (world.path / "broken_pip").touch()
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 0
  assert "installing failed on pod (READY)" in err


def test_hosts_with_an_old_python_get_another_one(world):
  (world.path / "old_python").touch()
  assert world.run("tpu_pod.sh", *worlds.RUN)[0] == 0
  calls = (world.path / "python_calls").read_text()
  assert "python3 -m pip install --quiet --user uv\n" in calls
  assert "python3 -m uv venv --quiet --seed --python 3.12 " in calls


# TPU: which versions a run goes on with

_VERSIONS = "# python==3.12\njax==0.10.2\nnumpy==2.4.0\n"


def _installs(world):
  """What pip was asked to install the code with, on each host."""
  calls = (world.path / "python_calls").read_text().splitlines()
  return [c for c in calls if "code[tpu,gcs]" in c]


def _begun(world, place, text=_VERSIONS):
  """The flags of a run with `versions.txt` in its workdir."""
  if place == "bucket":
    folder, workdir = world.path / "bucket/b/run 1", "gs://b/run 1"
  else:
    folder = world.path / "shared it's"
    workdir = str(folder)
  folder.mkdir(parents=True)
  (folder / "versions.txt").write_text(text)
  return (*worlds.TPU, "--config", "configs/run.py", "--workdir", workdir)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_goes_on_with_the_versions_that_it_began_with(world, place):
  """On a TPU that is made anew after a preemption."""
  line = _begun(world, place)
  world.set(faults={"ssh:follow": ["preempt"]})
  status, _, err = world.run("tpu_pod.sh", *line)
  assert status == 0, err
  assert len(_installs(world)) == 4  # two hosts, two lives
  for call in _installs(world):
    assert re.search(r" -c \S+/lavit/versions\.txt -e ", call)
  for home in world.path.glob("tpus/pod/*"):
    pinned = (home / "lavit/versions.txt").read_text()
    assert pinned == "jax==0.10.2\nnumpy==2.4.0\n"
  assert "with which the run began" in err


def test_a_first_start_takes_the_newest_versions_and_says_nothing(world):
  for workdir in ("gs://b/new", "/mnt/shared/new"):
    line = [*worlds.TPU, "--config", "configs/run.py", "--workdir", workdir]
    status, _, err = world.run("tpu_pod.sh", *line)
    assert status == 0, err
    assert "versions" not in err
    world.run("tpu_pod.sh", "delete", *worlds.TPU[:4])
  assert len(_installs(world)) == 4
  assert not any(" -c " in call for call in _installs(world))


def test_versions_that_cannot_be_had_are_told_and_do_not_end_the_run(world):
  line = _begun(world, "bucket")
  (world.path / "withdrawn").touch()
  status, _, err = world.run("tpu_pod.sh", *line)
  assert status == 0, err
  assert "the newest are, and the run will tell which differ" in err
  assert " -c " not in _installs(world)[-1]


def test_versions_that_one_host_cannot_read_are_read_again(world):
  """None goes on with the newest while the others have those of the run."""
  (world.path / "bucket_denied").touch()
  status, _, err = world.run("tpu_pod.sh", *_begun(world, "bucket"))
  assert status == 0, err
  assert "gs://b/run 1/versions.txt cannot be read: ERROR" in err
  assert all(" -c " in call for call in _installs(world))


def test_a_run_on_a_tpu_of_another_run_gets_its_own_versions(world):
  """Of one commit; and none of them is installed twice."""
  line = _begun(world, "disk")
  other = [*line[:-1], "/mnt/shared/new"]
  for which in (other, line, line):
    assert world.run("tpu_pod.sh", *which)[0] == 0
  found = [" -c " in call for call in _installs(world)]
  assert found == [False, False, True, True]


def test_no_network_is_no_reason_for_other_versions(world):
  line = _begun(world, "disk")
  (world.path / "broken_pip").touch()
  status, _, err = world.run("tpu_pod.sh", *line)
  assert status == 0, err
  assert "installing failed on pod (READY)" in err
  assert all(" -c " in call for call in _installs(world))


def test_a_list_of_versions_holds_names_and_numbers_alone(world):
  evil = (
    "--index-url https://evil.example\n-r /etc/passwd\njax @ https://evil\n"
    "a==1 --hash=x\n$(touch pwned)==1\n../x==1\njax==0.10.2\r\n"
  )
  world.run("tpu_pod.sh", *_begun(world, "disk", evil))
  for home in world.path.glob("tpus/pod/*"):
    assert (home / "lavit/versions.txt").read_text() == "jax==0.10.2\n"


# TPU: how a run ends


def test_a_mistake_of_the_user_is_never_tried_again(world):
  world.plan(_0=2)
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 2
  assert "refused its flags or config" in err
  assert len(world.attempts("pod.0")) == 1


def test_crashes_are_tried_again_up_to_the_limit_and_explained(world):
  world.plan(_0=1, _1=1, _2=139, _3=1)
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--max-restarts", "2")
  assert status == 139
  assert len(world.attempts("pod.0")) == 3
  assert f"{socket.gethostname()}: attempt 2 step 3" in err
  assert "restarts used: 2 of 2" in err


def test_a_crash_on_one_host_only_is_a_crash_of_the_run(world):
  world.plan(_0_pod_1=7)
  status, _, _ = world.run("tpu_pod.sh", *worlds.RUN, "--max-restarts", "0")
  assert status == 7


def test_a_run_that_was_told_to_end_resumes_and_counts_as_no_crash(world):
  world.plan(_0=75, _1=75)
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--max-restarts", "0")
  assert status == 0
  assert err.count("told to end and has saved; resuming") == 2


def test_hosts_that_outlive_the_first_one_are_ended(world):
  world.plan(_0_pod_1="hang")
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--max-restarts", "0")
  assert status == 1
  assert "but not on 1 other(s)" in err


def test_stop_lets_the_run_save_and_the_launcher_does_not_restart_it(world):
  world.plan(_0="hang")
  run = world.start("tpu_pod.sh", *worlds.RUN, "--delete-at-end")
  world.wait_for_attempt("pod.0", "pod.1")
  assert "run=running" in world.run("tpu_pod.sh", "status", *worlds.TPU[:4])[1]
  status, _, err = world.run("tpu_pod.sh", "stop", *worlds.TPU[:4])
  assert status == 0
  assert "tpu_pod.sh delete --name pod" in err
  out, err = run.communicate(timeout=20)
  assert run.returncode == 75
  assert out.endswith("told to end\n")
  assert "stopped on request; the same command resumes it" in err
  assert len(world.attempts("pod.0")) == 1
  assert not world.calls("delete")
  _, out, _ = world.run("tpu_pod.sh", "status", *worlds.TPU[:4])
  assert out.startswith("pod: READY\n")
  assert out.count("run=stopped") == out.count("status=75") == 2
  _, out, _ = world.run("tpu_pod.sh", "logs", *worlds.TPU[:4], "--worker", "1")
  assert out.endswith(": told to end\n")


@pytest.mark.parametrize("plan", [0, 2])
def test_delete_at_end_deletes_when_the_run_is_over(world, plan):
  world.plan(_0=plan)
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--delete-at-end")
  assert status == plan
  assert len(world.calls("delete")) == 1
  assert world.state()["nodes"] == {}
  assert "may still be there" not in err


# TPU: queued resources and slices


def test_a_queued_spot_tpu_is_waited_for_and_replaced_with_its_request(world):
  world.plan(_0="hang")
  faults = {
    "describe": [None, "=WAITING_FOR_RESOURCES", "=PROVISIONING"],
    "ssh:follow": ["preempt"],
  }
  world.set(faults=faults)
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--queued", "--spot")
  assert status == 0, err
  create = world.calls("create")[0]
  assert create[2:5] == ["queued-resources", "create", "pod"]
  assert {"--node-id=pod", "--spot", "--async"} <= set(create)
  assert "--runtime-version=v2-alpha-tpuv5-lite" in create
  assert "pod is WAITING_FOR_RESOURCES" in err
  assert "pod is SUSPENDED: deleting it to create it anew" in err
  [delete] = world.calls("delete")
  assert delete[2:6] == ["queued-resources", "delete", "pod", "--force"]
  assert len(world.attempts("pod.0")) == 2


def test_one_slice_that_is_gone_is_enough_to_ask_for_all_anew(world):
  slices = ["=ACTIVE", "=TERMINATED", "=CREATING"]
  world.set(faults={"describe": [None, *slices]})
  status, _, _ = world.run("tpu_pod.sh", *worlds.RUN, "--slices", "2")
  assert status == 0
  assert len(world.calls("create")) == 2
  assert len(world.calls("delete")) == 1


def test_delete_finds_out_by_itself_that_a_tpu_was_queued(world):
  world.set(queue={"pod": "FAILED"})
  assert world.run("tpu_pod.sh", "delete", *worlds.TPU[:4])[0] == 0
  assert world.state()["queue"] == {}


def test_slices_are_one_request_and_one_run_on_all_hosts_of_all(world):
  (world.path / "plan/0.pod-1.0").write_text("75")
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--slices", "3")
  assert status == 0, err
  create = world.calls("create")[0]
  assert create[2:5] == ["queued-resources", "create", "pod"]
  assert {"--node-count=3", "--node-prefix=pod"} <= set(create)
  for slice_ in range(3):
    for worker in range(2):
      assert len(world.attempts(f"pod-{slice_}.{worker}")) == 2
  followed = {c[4] for c in world.commands("worker.sh follow")}
  assert followed == {"pod-0"}
  world.run("tpu_pod.sh", "delete", *worlds.TPU[:4], "--slices", "3")
  assert world.state()["nodes"] == world.state()["queue"] == {}


# TPU: dry run, quoting, mistakes


@pytest.mark.parametrize("more", [[], ["--slices", "2"], ["--delete-at-end"]])
def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(world, more):
  args = [*worlds.RUN, "--spot", *more, "--", *worlds.ODD]
  status, out, _ = world.run("tpu_pod.sh", "--dry-run", *args)
  assert status == 0
  assert world.calls() == []
  subprocess.run(["bash", "-n"], input=out, text=True, check=True)
  printed = shlex.split(out, comments=True)
  assert printed.count("gcloud") >= 8
  status, _, _ = world.run("tpu_pod.sh", *args)
  assert status == 0

  def plain(words):
    text = shlex.join(words)  # without the number of the attempt
    return re.sub(r"(start \w+) [0-9.]+", r"\1", text)

  for call in world.calls():
    text = plain(["gcloud", *call])
    if call[3] != "scp" and "follow" not in text:  # a temporary file, a line
      assert text in plain(printed)
  assert ("delete" in [c[3] for c in world.calls()]) == (
    "--delete-at-end" in more
  )


def test_odd_values_reach_the_run_as_they_are(world):
  args = ["--config", worlds.CONFIG, "--workdir", "/mnt/a b; touch pwned"]
  env = ["--env", "A=x y", "--env", "B=$(touch pwned)'\""]
  status, _, err = world.run(
    "tpu_pod.sh", *worlds.TPU, *args, *env, "--", *worlds.ODD
  )
  assert status == 0, err
  [(arguments, environment)] = world.attempts("pod.1")
  assert arguments == ["train", *args, *worlds.ODD]
  assert environment["A"] == "x y"
  assert environment["B"] == "$(touch pwned)'\""


def test_a_run_may_be_kept_in_a_bucket(world):
  args = ["--config", worlds.CONFIG, "--workdir", "gs://bucket/run 1"]
  status, _, err = world.run("tpu_pod.sh", *worlds.TPU, *args)
  assert status == 0, err
  [(arguments, _)] = world.attempts("pod.1")
  assert arguments == ["train", *args]


def test_caches_are_written_by_all_hosts(world):
  """Joined by their environment, each host writes a part."""
  out = ["--out", "/mnt/shared/codes"]
  data = ["--model", "/mnt/m", "--data", "/mnt/web/*.tar"]
  words = [*worlds.TPU, "--workdir", out[1]]
  config = ["--config", "configs/run.py"]
  for job, given, expected in (
    ("tokenize", ["--", *data], ["tokenize", *out, *data]),
    ("latents", config, ["latents", *config, *out]),
  ):
    status, _, err = world.run("tpu_pod.sh", *words, "--job", job, *given)
    assert status == 0, err
    for host in ("pod.0", "pod.1"):
      arguments, environment = world.attempts(host)[-1]
      assert arguments == expected
      assert environment["LAVIT_DISTRIBUTED"] == "1"


MISTAKES = {
  "--job takes train, tokenize or latents, not 'x'": ["--job", "x"],
  "--job tokenize takes no --config": ["--job", "tokenize"],
  "--job latents sets --out itself": ["--job", "latents", "--", "--out=x"],
  "--job latents sets --part itself": ["--job=latents", "--", "--part", "1/2"],
  "to a folder that all hosts see": [
    *("--job", "latents", "--workdir", "gs://bucket/run"),
  ],
  "--name takes": ["--name", "x; touch pwned"],
  "--zone takes": ["--zone", "'us-west4-a'"],
  "--project takes": ["--project", "a b"],
  "--type takes an accelerator type": ["--type", "v7x-8"],
  "no runtime is known": ["--type", "v5x-8"],
  "'configs/new.py' is not in the last commit": ["--config", "configs/new.py"],
  "or a folder such as /mnt/shared/run, not 'runs/a'": ["--workdir", "runs/a"],
  "--workdir takes gs://BUCKET/FOLDER": ["--workdir", "gs://bucket"],
  "--max-restarts takes a whole number": ["--max-restarts", "08"],
  "--slices takes a whole number of at least 1": ["--slices=0"],
  "--ready-timeout takes": ["--ready-timeout", "a[$(touch pwned)]"],
  "--env takes NAME=VALUE, not 'A'": ["--env", "A"],
  "--worker takes": ["--worker", "-1"],
  "unknown argument '--nmae'": ["--nmae=x"],
  "unknown argument 'start'": ["start"],
  "--zone needs a value": ["--zone"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_clear_line_and_calls_nothing(world, line):
  status, out, err = world.run("tpu_pod.sh", *worlds.RUN, *MISTAKES[line])
  assert status == 2
  assert out == ""
  assert err.count("\n") == 1
  assert line in err
  assert world.calls() == []


def test_a_checkout_without_the_part_for_the_hosts_is_a_mistake(
  world, tmp_path
):
  root = tmp_path / "older"
  shutil.copytree(world.checkout, root)
  git = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t"]
  subprocess.run([*git, "rm", "-q", "--cached", "-r", "launch"], check=True)
  subprocess.run([*git, "commit", "-qm", "older"], check=True)
  world.checkout = root
  status, _, err = world.run("tpu_pod.sh", *worlds.RUN)
  assert status == 2
  assert "launch/lib/worker.sh is not in the last commit" in err


def test_changes_that_are_not_committed_are_pointed_out(world, tmp_path):
  root = tmp_path / "changed"
  shutil.copytree(world.checkout, root)
  (root / "configs/run.py").write_text("changed")
  world.checkout = root
  _, _, err = world.run("tpu_pod.sh", *worlds.RUN, "--dry-run")
  assert "1 changed file(s) are not committed, and not copied" in err

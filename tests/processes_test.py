"""Several processes on loopback: one training; a signal to one saves on all, a lost one ends all; runs go
on elsewhere."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

from conftest import ROOT, environment, run, train_flags
import numpy as np
import pytest

from evo_jax.training import metrics as metrics_lib

pytestmark = pytest.mark.slow

LAST, EVERY = 60, 10
STEPS = {
  "train.steps": LAST,
  "train.checkpoint_every": EVERY,
  "model.kv_heads": 2,
  "eval.samples": 0,
  "eval.paths": ("ar",),
}
BOUND = 90  # seconds in which the others of a lost process must have ended


def flags(workdir, text, mesh=(1, 1, 1), **changes):
  return train_flags(
    workdir, text, **{**STEPS, **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)), **changes}
  )


@contextlib.contextmanager
def processes(number, arguments):
  """`number` processes that train together, one device each; killed at the end if they still run."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  found = [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "evo_jax.main",
        *arguments,
        f"--coordinator=localhost:{port}",
        f"--num_processes={number}",
        f"--process_id={i}",
        "--heartbeat=30",
      ],
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(number)
  ]
  try:
    yield found
  finally:
    for process in found:
      process.kill()
      process.communicate()


def ends(found, timeout=400):
  """(exit status, stdout, stderr) of each."""
  outputs = [process.communicate(timeout=timeout) for process in found]
  return [(process.returncode, *output) for process, output in zip(found, outputs)]


def assert_well(ended):
  for code, _, _ in ended:
    assert code == 0, [text[:1500] + " ... " + text[-1500:] for _, _, text in ended]


def wait_for(condition, found):
  """Until it holds, while the processes run."""
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in found), ends(found)
    time.sleep(0.02)


def last_step(workdir):
  rows = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  return rows[-1]["step"] if rows else 0


def losses(workdir):
  rows = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
  return np.array([row["bits"] for row in rows])


def checkpoints(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
  """What one process computes."""
  workdir = tmp_path_factory.mktemp("one")
  done = run("evo_jax.main", *flags(workdir, text))
  assert done.returncode == 0, done.stderr
  return losses(workdir)


@pytest.mark.parametrize("number, mesh", [(2, (1, 1, 2)), (4, (2, 2, 1))], ids=str)
def test_processes_train_as_one(alone, text, tmp_path, number, mesh):
  """Also where heads are split over processes, which then hold the same rows of a batch."""
  with processes(number, flags(tmp_path, text, mesh)) as found:
    ended = ends(found)
  assert_well(ended)
  np.testing.assert_allclose(losses(tmp_path), alone, rtol=2e-3)
  assert "held-out" in ended[0][1] and not any("held-out" in out for _, out, _ in ended[1:])  # process 0 speaks


def test_a_signal_to_one_saves_on_all_and_one_process_goes_on(alone, text, tmp_path):
  with processes(2, flags(tmp_path, text, (1, 2, 1))) as found:
    wait_for(lambda: last_step(tmp_path) >= 12, found)
    found[1].send_signal(signal.SIGTERM)
    ended = ends(found)
  assert_well(ended)
  saved = checkpoints(tmp_path)[-1]
  assert 12 < saved < LAST and f"step {saved} is saved" in ended[0][1]
  done = run("evo_jax.main", *flags(tmp_path, text))
  assert done.returncode == 0 and f"goes on after step {saved}" in done.stdout, done.stderr
  np.testing.assert_allclose(losses(tmp_path), alone, rtol=2e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_two_go_on_from_one(alone, text, tmp_path, victim):
  """Process 0 holds the service by which the others find each other. The run begins as one process."""
  first = subprocess.Popen(
    [sys.executable, "-m", "evo_jax.main", *flags(tmp_path, text)],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for(lambda: checkpoints(tmp_path), [first])
  first.kill()
  first.communicate()
  begun = max(last_step(tmp_path), checkpoints(tmp_path)[-1])
  with processes(2, flags(tmp_path, text, (2, 1, 1))) as found:
    wait_for(lambda: last_step(tmp_path) > begun, found)
    found[victim].kill()
    began = time.monotonic()
    code, _, error = ends([found[1 - victim]], timeout=BOUND)[0]
    assert code != 0 and time.monotonic() - began < BOUND
    assert "Traceback" not in error and ("another process was lost" in error or "coordination service" in error), error
  assert checkpoints(tmp_path) and checkpoints(tmp_path)[-1] < LAST
  if victim:
    return
  with processes(2, flags(tmp_path, text, (1, 2, 1))) as found:
    ended = ends(found)
  assert_well(ended)
  np.testing.assert_allclose(losses(tmp_path), alone, rtol=2e-3)


def test_a_damaged_checkpoint_is_passed_over(alone, text, tmp_path):
  """With a warning, by training, which sets it aside, and by readers, which leave it; one half-written is
  not even seen."""
  done = run("evo_jax.main", *flags(tmp_path, text))
  assert done.returncode == 0 and checkpoints(tmp_path) == [LAST - EVERY, LAST]
  for part in (tmp_path / "checkpoints" / str(LAST) / "params").rglob("*"):
    if part.is_file() and part.stat().st_size > 200:
      part.write_bytes(part.read_bytes()[:100])
  half = tmp_path / "checkpoints" / "70.orbax-checkpoint-tmp-1"
  half.mkdir()
  read = run("evo_jax.evaluate", f"--workdir={tmp_path}", "--paths=ar", f"--data={text}")
  assert (
    read.returncode == 0
    and f"{LAST}: cannot be restored" in read.stderr
    and f"step {LAST - EVERY} is read instead" in read.stderr
  ), read.stderr
  assert checkpoints(tmp_path) == [LAST - EVERY, LAST]
  done = run("evo_jax.main", *flags(tmp_path, text))
  assert done.returncode == 0 and f"goes on after step {LAST - EVERY}" in done.stdout, done.stderr
  assert (
    f"step {LAST - EVERY} is read instead" in done.stderr and (tmp_path / "damaged" / str(LAST) / "params").is_dir()
  )
  assert checkpoints(tmp_path) == [LAST - EVERY, LAST]
  np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-6)


def test_moments_may_change_their_dtype(alone, text, tmp_path):
  """A run goes on with its optimizer's means in bfloat16, near what it would have been."""
  one = run("evo_jax.main", *flags(tmp_path, text))
  assert one.returncode == 0
  for step in checkpoints(tmp_path)[1:]:
    (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"gone-{step}")
  done = run("evo_jax.main", *flags(tmp_path, text, **{"optim.moment_dtype": "bfloat16"}))
  assert done.returncode == 0 and f"goes on after step {LAST - EVERY}" in done.stdout, done.stderr
  found = losses(tmp_path)
  np.testing.assert_allclose(found[:51], alone[:51], rtol=1e-6)
  assert 0 < np.abs(found[51:] - alone[51:]).max() < 0.02
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["config"]["optim"]["moment_dtype"] == "bfloat16"


def test_metrics_and_traces(text, tmp_path):
  """The journal says where the time went, and a trace of some steps lies where it is said to."""
  done = run("evo_jax.main", *flags(tmp_path, text, **{"train.profile": "21:23"}))
  assert done.returncode == 0 and "steps 21 to 23 are traced" in done.stdout, done.stderr
  last = metrics_lib.read_metrics(tmp_path / "metrics.jsonl")[-1]
  assert last["tokens_per_second"] == pytest.approx(last["tokens_per_second_per_chip"], abs=0.2)
  assert 0 < last["goodput"] < 1 and 0 <= last["data_wait"] <= 1 and last["checkpoint_stall"] >= 0
  traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and traces[0].stat().st_size > 10_000
  done = run("evo_jax.main", *flags(tmp_path / "x", text, **{"train.profile": "23:21"}))
  assert done.returncode == 1 and "config.train.profile: '23:21' is not START:STOP" in done.stderr

"""Several processes on loopback: one training; a signal to one saves on all, a lost one ends all; runs continue on
other numbers of processes. And what a run leaves: damaged checkpoints are skipped, moments may change their dtype."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from conftest import ROOT, call, environment, run, train_flags
from etils import epath
import numpy as np
import pytest

from evo_jax.training import lease as lease_lib
from evo_jax.training import metrics as metrics_lib

pytestmark = pytest.mark.slow

LAST, EVERY = 60, 10
STEPS = {
  "train.steps": LAST,
  "train.checkpoint_every": EVERY,
  "train.checkpoints_kept": LAST // EVERY,
  "model.kv_heads": 2,
  "eval.samples": 0,
  "eval.paths": ("ar",),
}
SAVED = list(range(EVERY, LAST + 1, EVERY))
BOUND = 60  # seconds in which the others of a lost process must have ended


def flags(workdir, text, mesh=(1, 1, 1), **changes):
  return train_flags(
    workdir, text, **{**STEPS, **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)), **changes}
  )


@contextlib.contextmanager
def processes(number, arguments, module="evo_jax.main", **variables):
  """`number` processes that run a command together, one device each; killed at the end if they still run."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  started = [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        module,
        *arguments,
        f"--coordinator=localhost:{port}",
        f"--num_processes={number}",
        f"--process_id={i}",
        "--heartbeat=10",
      ],
      cwd=ROOT,
      env=environment() | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(number)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.communicate()


def ends(started, timeout=400):
  """(exit status, stdout, stderr) of each."""
  outputs = [process.communicate(timeout=timeout) for process in started]
  return [(process.returncode, *output) for process, output in zip(started, outputs)]


def assert_well(ended):
  for code, _, _ in ended:
    assert code == 0, [text[:1500] + " ... " + text[-1500:] for _, _, text in ended]


def wait_for(condition, started):
  """Until it holds, while the processes run."""
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in started), ends(started)
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
  """The work directory of one process that nobody disturbs, with a checkpoint of every tenth step and a profile."""
  workdir = tmp_path_factory.mktemp("alone")
  done = run("evo_jax.main", *flags(workdir, text, **{"train.profile": "21:23"}))
  assert done.returncode == 0 and "steps 21 to 23 are traced" in done.stdout, done.stderr
  assert checkpoints(workdir) == SAVED
  return workdir


def stopped(alone, step, workdir):
  """A copy of the undisturbed run as if it had been stopped after the checkpoint of `step`."""
  shutil.copytree(alone, workdir)
  for later in checkpoints(workdir):
    if later > step:
      shutil.rmtree(workdir / "checkpoints" / str(later))
  log = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(log[:step]))
  return workdir


@pytest.fixture(scope="module")
def signalled(text, tmp_path_factory):
  """Two processes over which heads are split, until a SIGTERM to one: the work directory and what they said."""
  workdir = tmp_path_factory.mktemp("signalled")
  with processes(2, flags(workdir, text, (1, 1, 2))) as started:
    wait_for(lambda: last_step(workdir) >= 12, started)
    started[1].send_signal(signal.SIGTERM)
    ended = ends(started)
  assert_well(ended)
  return workdir, ended


def test_processes_that_share_rows_of_a_batch_train_as_one(alone, signalled):
  """Where heads are split over processes, these hold the same rows."""
  bits = losses(signalled[0])
  assert len(bits) > 12
  np.testing.assert_allclose(bits, losses(alone)[: len(bits)], rtol=2e-3)


def test_a_signal_to_one_saves_on_all_and_one_process_goes_on(alone, signalled, text, tmp_path):
  workdir, ended = signalled
  saved = checkpoints(workdir)[-1]
  assert 12 < saved < LAST and f"step {saved} is saved" in ended[0][1]
  shutil.copytree(workdir, tmp_path / "run")
  done = call("evo_jax.main", *flags(tmp_path / "run", text))
  assert done.returncode == 0 and f"goes on after step {saved}" in done.stdout, done.stderr
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=2e-3)


def test_a_signal_saves_on_all_without_the_preemption_service(text, tmp_path):
  with processes(2, flags(tmp_path, text, (2, 1, 1)), JAX_ENABLE_PREEMPTION_SERVICE="false") as started:
    wait_for(lambda: last_step(tmp_path) >= 2, started)
    started[1].send_signal(signal.SIGTERM)
    ended = ends(started)
  assert_well(ended)
  saved = checkpoints(tmp_path)[-1]
  assert 2 <= saved < LAST and f"step {saved} is saved" in ended[0][1]


def test_a_held_work_directory_refuses_all(text, tmp_path):
  """Process 0 names who holds it, and the others end with it."""
  with lease_lib.held(epath.Path(tmp_path)), processes(2, flags(tmp_path, text, (2, 1, 1))) as started:
    ended = ends(started, timeout=BOUND)
  assert [code for code, _, _ in ended] == [1, 1] and "Traceback" not in ended[0][2] + ended[1][2]
  assert f"{tmp_path}: is in use by process {os.getpid()} on " in ended[0][2]
  assert f"{tmp_path}: process 0 may not write there" in ended[1][2]


def test_an_error_of_one_process_ends_all():
  """Soon, though the others stand still in what they do together."""
  with processes(2, [], "tests.failing_process") as started:
    ended = ends(started, timeout=2 * BOUND)
  assert ended[1][0] == 1 and ended[1][2].endswith("evo_jax: process 1: text.jsonl: is damaged\n")
  assert ended[0][0] not in (0, None)


def test_processes_wait_for_what_the_first_does_alone():
  with processes(2, [], "tests.late_process") as started:
    ended = ends(started)
  assert_well(ended)
  assert [out.splitlines()[-1] for _, out, _ in ended] == ["7", "7"]


@pytest.fixture(scope="module")
def bereft(alone, text, tmp_path_factory):
  """One process began; two go on, of which number 0 is killed; two go on, of which number 1 is killed; four go on to
  the end. The work directory; by victim the other's exit, its seconds and the checkpoints left; what the four said.

  Process 0 holds the service by which the others find each other: its loss is another case than that of number 1,
  which takes a heartbeat's timeout to notice.
  """
  workdir, survivors = stopped(alone, EVERY, tmp_path_factory.mktemp("bereft") / "run"), {}
  for victim, mesh, step in ((0, (2, 1, 1), EVERY + 1), (1, (1, 2, 1), LAST // 2 + 2)):
    with processes(2, flags(workdir, text, mesh)) as started:
      wait_for(lambda: last_step(workdir) >= step, started)
      started[victim].kill()
      killed = time.monotonic()
      (survivor,) = ends([started[1 - victim]], timeout=BOUND)
    survivors[victim] = survivor, time.monotonic() - killed, checkpoints(workdir)
  with processes(4, flags(workdir, text, (2, 2, 1))) as started:
    ended = ends(started)
  return workdir, survivors, ended


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(bereft, victim):
  (code, _, error), seconds, left = bereft[1][victim]
  assert code != 0 and seconds < BOUND
  assert "Traceback" not in error and ("another process was lost" in error or "coordination service" in error), error
  assert left and left[-1] < LAST


def test_four_processes_go_on_from_two_and_train_as_one(alone, bereft):
  """Up to four the losses are also those of two processes, on meshes (2, 1, 1) and (1, 2, 1)."""
  workdir, _, ended = bereft
  assert_well(ended)
  np.testing.assert_allclose(losses(workdir), losses(alone), rtol=2e-3)
  assert "goes on after step" in ended[0][1] and checkpoints(workdir)[-1] == LAST
  assert "held-out" in ended[0][1] and not any("held-out" in out for _, out, _ in ended[1:])  # only process 0 prints


@pytest.mark.parametrize(
  "module, arguments",
  [
    ("evaluate", ("--paths=ar,diagonal:2",)),
    ("generate", ("--prompt=the", "--prompt=a", "--mode=adaptive", "--max_tokens=12")),
  ],
)
def test_two_processes_read_a_run_as_one(alone, module, arguments):
  """With heads in shards over both; only process 0 prints."""
  output = {"evaluate": "--json=/dev/stdout", "generate": "--json"}[module]
  arguments = (f"--workdir={alone}", output, *arguments)
  with processes(2, (*arguments, "--mesh=tensor:2"), f"evo_jax.{module}") as started:
    ended = ends(started)
  assert_well(ended)
  expected = call(f"evo_jax.{module}", *arguments)
  together, single = (json.loads(text[text.index("[\n") :]) for text in (ended[0][1], expected.stdout))
  if module == "evaluate":
    np.testing.assert_allclose([e["bits"] for e in together], [e["bits"] for e in single], atol=1e-4)
  else:
    assert [e["tokens"] for e in together] == [e["tokens"] for e in single] and "{" not in ended[1][1]


def test_two_processes_write_texts_as_one(alone, tmp_path):
  """Into one folder, the same bytes."""
  flags = (f"--workdir={alone}", "--prompt=the", "--prompt=a river", "--num=3", "--max_tokens=12", "--batch_size=2")
  assert call("evo_jax.generate", *flags, f"--output={tmp_path}/one").returncode == 0
  with processes(2, (*flags, f"--output={tmp_path}/two", "--mesh=tensor:2"), "evo_jax.generate") as started:
    ended = ends(started)
  assert_well(ended)
  assert "has all 6 texts" in ended[0][1] and "texts" not in ended[1][1] + ended[1][2]
  one, two = ((tmp_path / name / "00000.jsonl").read_bytes() for name in ("one", "two"))
  assert one == two and one.count(b"\n") == 6


def test_a_damaged_checkpoint_is_passed_over(alone, text, tmp_path):
  """With a warning, by training, which sets it aside, and by readers, which leave it; a partial one is not seen."""
  workdir = shutil.copytree(alone, tmp_path / "run")
  for part in (workdir / "checkpoints" / str(LAST) / "params").rglob("*"):
    if part.is_file() and part.stat().st_size > 200:
      part.write_bytes(part.read_bytes()[:100])
  partial = workdir / "checkpoints" / "70.orbax-checkpoint-tmp-1"
  partial.mkdir()
  done = call("evo_jax.evaluate", f"--workdir={workdir}", "--paths=ar", f"--data={text}")
  assert done.returncode == 0 and f"{LAST}: cannot be restored" in done.stderr, done.stderr
  assert f"step {LAST - EVERY} is read instead" in done.stderr and checkpoints(workdir) == SAVED
  done = call("evo_jax.main", *flags(workdir, text))
  assert done.returncode == 0 and f"goes on after step {LAST - EVERY}" in done.stdout, done.stderr
  assert f"step {LAST - EVERY} is read instead" in done.stderr
  assert (workdir / "damaged" / str(LAST) / "params").is_dir() and checkpoints(workdir) == SAVED
  np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-6)


def test_moments_may_change_their_dtype(alone, text, tmp_path):
  """A run goes on with its optimizer's means in bfloat16, near what it would have been."""
  workdir = stopped(alone, LAST - EVERY, tmp_path / "run")
  done = call("evo_jax.main", *flags(workdir, text, **{"optim.moment_dtype": "bfloat16"}))
  assert done.returncode == 0 and f"goes on after step {LAST - EVERY}" in done.stdout, done.stderr
  bits, undisturbed = losses(workdir), losses(alone)
  np.testing.assert_allclose(bits[:51], undisturbed[:51], rtol=1e-6)
  assert 0 < np.abs(bits[51:] - undisturbed[51:]).max() < 0.02
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["config"]["optim"]["moment_dtype"] == "bfloat16"


def test_metrics_and_traces(alone):
  """The log says where the time went, and a trace of some steps lies where it is said to."""
  last = metrics_lib.read_metrics(alone / "metrics.jsonl")[-1]
  assert last["tokens_per_second"] == pytest.approx(last["tokens_per_second_per_chip"], abs=0.2)
  assert 0 < last["goodput"] < 1 and 0 <= last["data_wait"] <= 1 and last["checkpoint_stall"] >= 0
  traces = list((alone / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and traces[0].stat().st_size > 10_000

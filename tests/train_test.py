"""Training runs: pinned numbers, a work directory's contents, interruptions without a trace, refused input."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

from conftest import LONG, ROOT, assert_refused, call, environment, run, train_flags
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import run as run_lib
from evo_jax.errors import UserError
from evo_jax.training import checkpoint
from evo_jax.training import metrics as metrics_lib


def rows(workdir):
  """The log without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if k not in metrics_lib.TIMING_FIELDS}
    for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")
  ]


def last_step(workdir):
  logged = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  return logged[-1]["step"] if logged else 0


GOLDEN = {1: 8.06935, 10: 6.79641, 20: 5.04484}


def test_golden_run(trained):
  """Pinned numbers: if you did not mean to change training, you broke it."""
  bits = {row["step"]: row["bits"] for row in rows(trained)}
  for step, want in GOLDEN.items():
    assert bits[step] == pytest.approx(want, rel=2e-3), {s: bits[s] for s in GOLDEN}


def test_a_run_leaves_what_it_promises(trained):
  logged = rows(trained)
  assert [row["step"] for row in logged] == list(range(1, 121))
  for name in (
    "bits",
    "window_ce",
    "window_bound",
    "ce_diagonal",
    "ce_rolling",
    "ce_independent",
    "ce_staircase",
    "gradient_norm",
    "codes_spread",
    "warp_precision_50",
    "learning_rate",
  ):
    assert np.isfinite(logged[-1][name]), name
  assert [row["step"] for row in logged if "valid_ar" in row] == [50, 100]
  assert logged[-1]["bits"] < 0.6 * logged[0]["bits"]
  table = json.loads((trained / "table.json").read_text())
  assert [e["path"] for e in table] == ["ar", "diagonal:2"] and table[0]["unit"] == "bits per byte"
  assert "diagonal:2" in (trained / "table.txt").read_text()
  assert (trained / "samples.txt").read_text().count("---") == 2
  saved = json.loads((trained / "config.json").read_text())
  assert saved["config"]["model"]["width"] == 32 and saved["parameters"] > 10_000
  assert sorted(p.name for p in (trained / "checkpoints").iterdir() if p.name.isdigit()) == ["100", "120"]
  assert not (trained / "lease.json").exists()


def test_the_window_learns(trained):
  """More passes cost fewer bits than one parallel jump, after a minute's training."""
  done = call("evo_jax.evaluate", f"--workdir={trained}", "--paths=ar,diagonal:1,diagonal:8,staircase")
  bits = [float(line.split()[1]) for line in done.stdout.splitlines()[2:6]]
  assert bits[0] < bits[2] < bits[1] and bits[3] < bits[1], done.stdout


# A limit on a file's size stands for a full disk. It holds while a checkpoint is being written, and is less than the
# largest array takes: into how many files Orbax puts the others depends on timing.
FULL_DISK = """
import resource, runpy
from evo_jax.training.checkpoint import CheckpointStore

save = CheckpointStore.save

def save_to_a_full_disk(store, *what):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
  try:
    save(store, *what)
    store.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

CheckpointStore.save = save_to_a_full_disk
runpy.run_module("evo_jax.main", run_name="__main__", alter_sys=True)
"""


def start(flags, command=("-m", "evo_jax.main")):
  return subprocess.Popen(
    [sys.executable, *command, *flags],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(process, workdir, step):
  deadline = time.time() + 300
  while last_step(workdir) < step:
    assert process.poll() is None and time.time() < deadline, process.communicate()
    time.sleep(0.002)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, text):
  """A run that a signal ends before its first step; that is killed before the first checkpoint, between two, and while
  one is being written; that a signal stops; whose disk refuses a checkpoint; and that goes on to the end. By event:
  exit status, stdout, stderr, checkpoints.

  Each event leaves the work directory to the next one, so that a single comparison with an undisturbed run proves that
  none leaves a trace. What each of them says is a test of its own.
  """
  workdir = tmp_path_factory.mktemp("interrupted")
  flags, events = train_flags(workdir, text, **LONG), {}

  def finish(event, process):
    output = process.communicate(timeout=300)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    events[event] = (process.returncode, *output, steps)
    assert (workdir / "lease.json").exists() == (process.returncode == -signal.SIGKILL), events[event]

  process = start(flags)
  while not (workdir / "lease.json").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  finish("early signal", process)
  for step in (8, 53, 80):
    process = start(flags)
    wait_for_step(process, workdir, step)
    process.kill()
    finish(f"kill {step}", process)
  process = start(flags)
  wait_for_step(process, workdir, 85)
  process.send_signal(signal.SIGTERM)
  finish("signal", process)
  finish("disk", start(flags, ("-c", FULL_DISK)))
  finish("end", start(flags))
  return workdir, events


@pytest.mark.slow
def test_interruptions_leave_no_trace(trained, interrupted):
  """Bit for bit: log, parameters, statistics, table and samples."""
  workdir, events = interrupted
  assert [events[f"kill {step}"][0] for step in (8, 53, 80)] == [-signal.SIGKILL] * 3
  assert events["kill 8"][3] == [] and events["kill 53"][3] == [20, 40]
  assert events["end"][0] == 0, events["end"]
  assert rows(trained) == rows(workdir)
  a, b = run_lib.load_run(str(trained)), run_lib.load_run(str(workdir))
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  jax.tree.map(np.testing.assert_array_equal, a.statistics, b.statistics)
  assert (trained / "table.json").read_text() == (workdir / "table.json").read_text()
  assert (trained / "samples.txt").read_text() == (workdir / "samples.txt").read_text()


@pytest.mark.slow
def test_sigterm_saves_and_leaves(interrupted):
  _, events = interrupted
  status, out, err, steps = events["signal"]
  assert status == 0 and "stopped by signal; step" in out, err
  step = int(out.split("stopped by signal; step ")[1].split()[0])
  assert 85 <= step < 120 and steps[-1] == step
  assert f"goes on after step {step}\n" in events["disk"][1]


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_taken_over(interrupted):
  """At once, with a line; a run that ends in any other way leaves nothing to take over."""
  _, events = interrupted
  after = {"kill 8": "early signal", "kill 53": "kill 8", "kill 80": "kill 53", "signal": "kill 80", "disk": "signal"}
  for event, before in after.items():
    assert ("is taken over from process" in events[event][1]) == before.startswith("kill"), events[event]
  assert events["early signal"][0] == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_disk_that_refuses_leaves_the_checkpoint_before_whole(interrupted):
  _, events = interrupted
  status, out, err, steps = events["disk"]
  before = events["signal"][3][-1]
  message = f"^evo_jax: .*a checkpoint cannot be written: .*the last whole one is of step {before}$"
  assert status == 1 and re.search(message, err, re.M) and "Traceback" not in err, err
  assert steps[-1] == before and f"goes on after step {before}\n" in events["end"][1]


@pytest.mark.slow
def test_a_finished_run_shows_its_table_again(interrupted, text):
  workdir, _ = interrupted
  before = (workdir / "table.json").read_text()
  done = call("evo_jax.main", *train_flags(workdir, text, **LONG, train__profile="3:6"))
  assert done.returncode == 0 and "is finished: 120 steps" in done.stdout and "diagonal:2" in done.stdout, done.stderr
  assert "config.train.profile: 3:6 is not traced: step 120 was the last" in done.stdout
  assert (workdir / "table.json").read_text() == before


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model__width", 48, "config.model.width: 48 does not fit"),
    ("data__batch_size", 16, "config.data.batch_size: 16 does not fit"),
    ("optim__ema", 0.0, "config.optim.ema: 0.0 does not fit"),
    ("data__tokenizer", "chars27", "config.data.tokenizer: 'chars27' does not fit"),
  ],
)
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(trained, text, field, value, message):
  before = (trained / "config.json").read_text()
  assert_refused(call("evo_jax.main", *train_flags(trained, text, **LONG, **{field: value})), message)
  assert (trained / "config.json").read_text() == before


@pytest.mark.slow
def test_divergence_stops_and_keeps_the_last_good_checkpoint(trained, text, tmp_path):
  """A run that goes on with an absurd learning rate stops with one line; what was saved before can be read."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / "checkpoints" / "120")
  done = run("evo_jax.main", *train_flags(workdir, text, **LONG, optim__learning_rate=1e30))
  assert done.returncode == 1 and "training has diverged; the last good checkpoint is of step 100" in done.stderr
  assert done.stderr.splitlines()[-1].startswith("evo_jax: step 101: ") and "Traceback" not in done.stderr
  assert run_lib.load_run(str(workdir)).step == 100


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
  log = metrics_lib.MetricsLog(epath.Path(tmp_path), 0)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: File too large"):
      log.write({"step": 1, "bits": "8" * 200})
    log.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_seen_before_it_is_written_to(tmp_path, monkeypatch):
  store = checkpoint.CheckpointStore(checkpoint.make_workdir(str(tmp_path)), 2)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 39))
  with pytest.raises(UserError, match="needs 40 bytes, 39 are free"):
    store.save(1, {"params": {"a": jnp.zeros(10)}})
  store.close()


def test_a_checkpoint_of_another_network_names_what_differs(tmp_path):
  store = checkpoint.CheckpointStore(checkpoint.make_workdir(str(tmp_path)), 1)
  store.save(1, {"params": {"blocks": {"w_in": jnp.zeros(3), "w_o": jnp.zeros(3)}}})
  store.wait()
  with pytest.raises(UserError, match=r"checkpoints/1: cannot be restored: [^\n]*: blocks.w_gate, blocks.w_in$"):
    store.restore(1, {"params": {"blocks": {"w_gate": jnp.zeros(3), "w_o": jnp.zeros(3)}}})
  store.close()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model.kv_heads": 3}, "config.model.kv_heads: 3 does not divide"),
    ({"window.size": 5}, "config.window.size: 5 does not divide"),
    ({"data.path": "/no/such*"}, "config.data.path: no file matches"),
    ({"mesh.data": 3}, "--mesh or config.mesh: {'data': 3"),
    ({"model.vocab_size": 100}, "config.model.vocab_size: 100 is less than the tokenizer's 257"),
    ({"data.tokenizer": "sentencepiece"}, "config.data.tokenizer_path: is empty"),
    ({"eval.paths": ("diagonal",)}, "path 'diagonal'"),
    ({"model.param_dtype": "bfloat16"}, "config.model.param_dtype: 'bfloat16' cannot be trained"),
    ({"eval.paths": ()}, "config.eval.paths: () is empty"),
    ({"train.profile": "23:21"}, "config.train.profile: '23:21' is not START:STOP"),
  ],
  ids=str,
)
def test_bad_settings_are_refused_in_one_line(text, tmp_path, changes, message):
  assert_refused(call("evo_jax.main", *train_flags(tmp_path / "run", text, **changes)), message)


def test_a_work_directory_that_cannot_be_made_is_named(text, tmp_path):
  (tmp_path / "file").write_text("")
  assert_refused(call("evo_jax.main", *train_flags(tmp_path / "file" / "run", text)), "--workdir=")


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--config=configs/tiny.py", "--config.model.widht=3"), "config.model.widht: the configuration has no such field"),
    (("--config=configs/tiny.py", "--config.train.steps=many"), "--config.train.steps"),
    (("--config=configs/none.py",), "--config=configs/none.py: cannot be loaded: [Errno 2] No such file"),
    ((), "--config is needed"),
  ],
)
def test_bad_flags_are_refused_in_one_line(flags, message):
  assert_refused(call("evo_jax.main", *flags), message)


@pytest.mark.parametrize(
  "content, message",
  [
    ("def get_config(:", "mine.py: SyntaxError: invalid syntax"),
    ("import nothing_of_this_name", "mine.py: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("raise ValueError('too wide')", "mine.py: Error whilst parsing config file: ValueError: too wide"),
  ],
)
def test_a_configuration_that_cannot_be_run_is_one_line(tmp_path, content, message):
  (tmp_path / "mine.py").write_text(content)
  assert_refused(call("evo_jax.main", f"--config={tmp_path / 'mine.py'}"), message)


def test_a_refusal_is_all_that_a_process_prints(text, tmp_path):
  """Libraries add nothing, in a process of its own."""
  done = run("evo_jax.main", *train_flags(tmp_path, text, model__vocab_size=100))
  assert_refused(done, "config.model.vocab_size: 100 is less than the tokenizer's 257")
  assert done.stderr.startswith("evo_jax: ") and done.stdout == ""

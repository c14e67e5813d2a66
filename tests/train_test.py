"""Training: pinned numbers, one gradient however it is computed, and runs that are killed, stopped, and go on."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT, environment, run, small_config, train_flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import run as run_lib
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.training import checkpoint
from evo_jax.training import metrics as metrics_lib
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

LONG = {"train.steps": 120, "train.checkpoint_every": 20, "train.eval_every": 50}


def rows(workdir):
  """The journal without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if k not in metrics_lib.TIMING_FIELDS}
    for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")
  ]


def last_step(workdir):
  found = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  return found[-1]["step"] if found else 0


def one_step(**changes):
  config = small_config(**changes)
  model = state_lib.make_model(config, tokenizers.Bytes())
  state = jax.jit(lambda: nn.unbox(state_lib.init_state(model, config)))()
  batch = jnp.asarray(np.random.default_rng(0).integers(1, 257, (8, 33)), jnp.int32)
  return jax.jit(lambda s, b: step_lib.train_step(s, Batch(b), model=model, config=config))(state, batch)


def close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def plain():
  return one_step(optim__clip=0.0, optim__epsilon=1e-3, optim__warmup=0)


@pytest.mark.parametrize(
  "changes",
  [{"train__accumulate": 4}, {"optim__separate_clip": True}, {"train__accumulate": 2, "optim__separate_clip": True}],
)
def test_accumulation_and_separate_gradients_add_up(plain, changes):
  """Without a limit to clip to, the step is the same however its gradient is put together."""
  state, found = one_step(optim__clip=0.0, optim__epsilon=1e-3, optim__warmup=0, **changes)
  close(plain[0].params, state.params, rtol=2e-3, atol=2e-6)
  close(plain[0].statistics, state.statistics, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(plain[1]["bits"], found["bits"], rtol=1e-5)


def test_clipping_apart_keeps_the_window_gradient_from_shrinking_the_ar_gradient():
  """Window weight 1,000: a shared limit leaves AR next to nothing, separate limits leave it all that it had."""
  share = {}
  for separate in (False, True):
    state, found = one_step(optim__separate_clip=separate, loss__window_weight=1000.0, optim__clip=1.0)
    share[separate] = found
  assert float(share[False]["gradient_norm"]) > 50
  assert float(share[True]["gradient_norm_window"]) > 50 > float(share[True]["gradient_norm_ar"])


def test_ar_only_is_a_configuration():
  state, found = one_step(window__count=0)
  assert "window_ce" not in found and np.isfinite(found["bits"]) and int(state.statistics.steps) == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
  """A run that nobody disturbs."""
  workdir = tmp_path_factory.mktemp("alone")
  done = run("evo_jax.main", *train_flags(workdir, text, **LONG))
  assert done.returncode == 0, done.stderr
  return workdir


GOLDEN = {1: 8.06745, 10: 6.79318, 20: 5.06009}


def test_golden_run(alone):
  """Pinned numbers: if you did not mean to change training, you broke it."""
  bits = {row["step"]: row["bits"] for row in rows(alone)}
  for step, want in GOLDEN.items():
    assert bits[step] == pytest.approx(want, rel=2e-3), {s: bits[s] for s in GOLDEN}


def test_a_run_leaves_what_it_promises(alone):
  found = rows(alone)
  assert [row["step"] for row in found] == list(range(1, 121))
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
    assert np.isfinite(found[-1][name]), name
  assert [row["step"] for row in found if "valid_ar" in row] == [50, 100]
  assert found[-1]["bits"] < 0.6 * found[0]["bits"]
  table = json.loads((alone / "table.json").read_text())
  assert [e["path"] for e in table] == ["ar", "diagonal:2"] and table[0]["unit"] == "bits per byte"
  assert "diagonal:2" in (alone / "table.txt").read_text()
  assert (alone / "samples.txt").read_text().count("---") == 2
  saved = json.loads((alone / "config.json").read_text())
  assert saved["config"]["model"]["width"] == 32 and saved["parameters"] > 10_000
  assert sorted(p.name for p in (alone / "checkpoints").iterdir() if p.name.isdigit()) == ["100", "120"]


def test_the_window_learns(alone):
  """More passes cost fewer bits than one parallel jump, after a minute's training."""
  done = run("evo_jax.evaluate", f"--workdir={alone}", "--paths=ar,diagonal:1,diagonal:8,staircase")
  bits = [float(line.split()[1]) for line in done.stdout.splitlines()[2:6]]
  assert bits[0] < bits[2] < bits[1] and bits[3] < bits[1], done.stdout


def started(flags):
  return subprocess.Popen(
    [sys.executable, "-m", "evo_jax.main", *flags],
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


def same_run(a, b):
  assert rows(a) == rows(b)
  x, y = run_lib.load_run(str(a)), run_lib.load_run(str(b))
  jax.tree.map(np.testing.assert_array_equal, x.params, y.params)
  jax.tree.map(np.testing.assert_array_equal, x.statistics, y.statistics)
  assert (a / "table.json").read_text() == (b / "table.json").read_text()
  assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()


def test_killed_runs_go_on_bit_for_bit(alone, tmp_path, text):
  """kill -9 before the first checkpoint, between two, and while one is being written."""
  flags = train_flags(tmp_path, text, **LONG)
  for step in (8, 53, 80):
    process = started(flags)
    wait_for_step(process, tmp_path, step)
    process.kill()
    process.communicate()
  done = run("evo_jax.main", *flags)
  assert done.returncode == 0 and "goes on after step" in done.stdout, done.stderr
  same_run(alone, tmp_path)


def test_sigterm_saves_and_leaves(alone, tmp_path, text):
  flags = train_flags(tmp_path, text, **LONG)
  process = started(flags)
  wait_for_step(process, tmp_path, 30)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and "stopped by signal; step" in out, err
  step = int(out.split("stopped by signal; step ")[1].split()[0])
  assert 30 <= step < 120 and (tmp_path / "checkpoints" / str(step)).is_dir()
  done = run("evo_jax.main", *flags)
  assert f"goes on after step {step}" in done.stdout, done.stderr
  same_run(alone, tmp_path)


def test_a_finished_run_shows_its_table_again(alone, text):
  done = run("evo_jax.main", *train_flags(alone, text, **LONG))
  assert done.returncode == 0 and "is finished: 120 steps" in done.stdout and "diagonal:2" in done.stdout, done.stderr


def refused(message, *flags, **kwargs):
  done = run("evo_jax.main", *flags, **kwargs)
  assert done.returncode == 1 and message in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model__width", 48, "config.model.width: 48 does not fit"),
    ("data__batch_size", 16, "config.data.batch_size: 16 does not fit"),
    ("optim__ema", 0.9, "config.optim.ema: 0.9 does not fit"),
    ("data__tokenizer", "chars27", "config.data.tokenizer: 'chars27' does not fit"),
  ],
)
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(alone, text, field, value, message):
  refused(message, *train_flags(alone, text, **LONG, **{field: value}))


def test_changed_text_is_refused(alone, text, tmp_path):
  saved = json.loads((alone / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**saved, "text": ["0123456789abcdef"]}))
  refused("config.data.path: the text of", *train_flags(tmp_path, text, **LONG))


@pytest.fixture
def stopped(alone, tmp_path):
  """A copy of the undisturbed run as if it had been stopped after its checkpoint of step 100."""
  workdir = tmp_path / "stopped"
  shutil.copytree(alone, workdir)
  shutil.rmtree(workdir / "checkpoints" / "120")
  return workdir


def test_divergence_stops_and_keeps_the_last_good_checkpoint(stopped, text):
  """A run that goes on with an absurd learning rate stops with one line; what was saved before can be read."""
  done = run("evo_jax.main", *train_flags(stopped, text, **LONG, optim__learning_rate=1e30))
  assert done.returncode == 1 and "training has diverged; the last good checkpoint is of step 100" in done.stderr
  assert done.stderr.splitlines()[-1].startswith("evo_jax: step 101: ") and "Traceback" not in done.stderr
  assert run_lib.load_run(str(stopped)).step == 100


def test_a_disk_that_refuses_leaves_the_checkpoint_before_whole(alone, stopped, text):
  """A limit on a file's size stands for the full disk: writing a checkpoint's arrays fails. With room again the run
  goes on as if nothing had happened."""
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # above the journal, below the arrays
  done = run("evo_jax.main", *train_flags(stopped, text, **LONG), preexec_fn=limit)
  assert done.returncode == 1, done.stderr
  assert re.search(
    "^evo_jax: .*a checkpoint cannot be written: .*the last whole one is of step 100$", done.stderr, re.M
  ), done.stderr
  assert "Traceback" not in done.stderr
  assert run_lib.load_run(str(stopped)).step == 100
  done = run("evo_jax.main", *train_flags(stopped, text, **LONG))
  assert done.returncode == 0 and "goes on after step 100" in done.stdout, done.stderr
  same_run(alone, stopped)


def test_a_full_disk_is_seen_before_it_is_written_to(tmp_path, monkeypatch):
  found = checkpoint.CheckpointStore(checkpoint.make_workdir(str(tmp_path)), 2)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 39))
  with pytest.raises(UserError, match="needs 40 bytes, 39 are free"):
    found.save(1, {"params": {"a": jnp.zeros(10)}})
  found.close()


def test_a_checkpoint_of_another_network_names_what_differs(tmp_path):
  found = checkpoint.CheckpointStore(checkpoint.make_workdir(str(tmp_path)), 1)
  found.save(1, {"params": {"blocks": {"w_in": jnp.zeros(3), "w_o": jnp.zeros(3)}}})
  found.wait()
  with pytest.raises(UserError, match=r"checkpoints/1: cannot be restored: [^\n]*: blocks.w_gate, blocks.w_in$"):
    found.restore(1, {"params": {"blocks": {"w_gate": jnp.zeros(3), "w_o": jnp.zeros(3)}}})
  found.close()


def test_bad_settings_are_refused_in_one_line(text, tmp_path):
  (tmp_path / "file").write_text("")
  for message, changes in (
    ("--workdir=", {}),
    ("config.model.heads: 2 is not", {"model.heads": 2, "model.kv_heads": 3}),
    ("config.window.size: 5 does not divide", {"window.size": 5}),
    ("config.data.path: no file matches", {"data.path": f"{tmp_path}/none*"}),
    ("config.mesh: {'data': 3", {"mesh.data": 3}),
    ("config.model.vocab_size: 100 is less than the tokenizer's 257", {"model.vocab_size": 100}),
    ("config.data.tokenizer_path: is empty", {"data.tokenizer": "sentencepiece"}),
    ("path 'diagonal'", {"eval.paths": ("diagonal",)}),
  ):
    flags = train_flags(tmp_path / "file" / "run" if message == "--workdir=" else tmp_path / "run", text)
    message = message.replace("config.model.heads: 2 is not", "config.model.kv_heads: 3 does not divide")
    refused(message, *flags, *(f"--config.{k}={v}" for k, v in changes.items()))
  refused(
    "config.model.widht: the configuration has no such field", "--config=configs/tiny.py", "--config.model.widht=3"
  )
  refused("--config.train.steps", "--config=configs/tiny.py", "--config.train.steps=many")
  refused("--config=configs/none.py: cannot be loaded: [Errno 2] No such file", "--config=configs/none.py")
  refused("--config is needed")

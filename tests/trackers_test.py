"""Metrics for TensorBoard and for Weights & Biases: what is written, also by runs that go on, and refusals."""

import struct
import sys
import types

from conftest import assert_refused, call, small_config, train_flags
from etils import epath
import pytest

from evo_jax.training import trackers

ROWS = [{"step": step, "bits": 8.0 / step, "epochs/a text": step / 10} for step in (1, 2, 3)]


def write(config, workdir, rows, step=0):
  (tracker,) = trackers.start_trackers(config, epath.Path(workdir), step)
  for row in rows:
    tracker.write(row)
  tracker.close()


def events(folder):
  """The events in all files, in the order of the files."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for file in sorted(folder.iterdir()):
    raw = file.read_bytes()
    while raw:
      (size,) = struct.unpack("<Q", raw[:8])
      found.append(Event.FromString(raw[12 : 12 + size]))
      raw = raw[16 + size :]
  return found


def test_tensorboard_has_the_rows_of_a_run_that_goes_on(tmp_path):
  pytest.importorskip("tensorboardX")
  config = small_config(train__log_to="tensorboard")
  write(config, tmp_path, ROWS)
  (first,) = (tmp_path / "tensorboard").iterdir()
  values = [
    (e.step, v.tag.replace("_", " "), round(v.simple_value, 4)) for e in events(first.parent) for v in e.summary.value
  ]
  assert values == [(r["step"], n, round(r[n], 4)) for r in ROWS for n in ("bits", "epochs/a text")]
  first.rename(tmp_path / "0")
  write(config, tmp_path, ROWS[1:], step=1)  # killed in step 4, started again behind step 1
  again = events(tmp_path / "tensorboard")
  assert [e.step for e in again if e.HasField("session_log")] == [2]  # events from there on are not shown
  assert [e.step for e in again for v in e.summary.value if v.tag == "bits"] == [2, 3]


class Wandb(types.ModuleType):
  """What the library does, as far as it is used."""

  def __init__(self):
    super().__init__("wandb")
    self.started, self.rows, self.finished = [], [], 0

  def init(self, **settings):
    self.started.append(settings)
    return self

  def log(self, row, step):
    self.rows.append({"step": step, **row})

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
  module = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def test_wandb_has_the_rows_of_a_run_that_goes_on(tmp_path, wandb):
  config = small_config(train__log_to="wandb")
  write(config, tmp_path, ROWS)
  write(config, tmp_path, ROWS[1:], step=1)
  write(config, tmp_path, [])  # from the beginning: another run
  assert wandb.rows == ROWS + ROWS[1:] and wandb.finished == 3
  first, again, other = wandb.started
  assert first["id"] == again["id"] != other["id"] and first["resume"] == "allow"
  assert first["config"]["model"]["width"] == 32 and first["dir"] == str(tmp_path) and first["name"] == tmp_path.name


@pytest.mark.extended
def test_wandb_writes_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  write(small_config(train__log_to="wandb"), tmp_path, ROWS)
  assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_what_cannot_be_used_is_refused_before_anything_starts(text, tmp_path, monkeypatch, wandb):
  flags = lambda name: train_flags(tmp_path / name, text, train__log_to=name)
  wandb.init = lambda **settings: 1 / 0
  with pytest.raises(trackers.UserError, match=r"config\.train\.log_to: wandb cannot be started: division by zero"):
    write(small_config(train__log_to="wandb"), tmp_path, [])
  for name in ("wandb", "tensorboardX"):
    monkeypatch.setitem(sys.modules, name, None)
  for name in ("wandb", "tensorboard"):
    assert_refused(call("evo_jax.main", *flags(name)), f"config.train.log_to: {name} needs ")
  assert_refused(call("evo_jax.main", *flags("wandb,wandb")), "pip install 'evo_jax[wandb]'")
  assert not (tmp_path / "wandb").exists()

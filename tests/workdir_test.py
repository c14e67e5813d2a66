"""Work directories: what may change where a run goes on, and whatever is found in one: damaged, foreign, lost."""

import errno
import json
import math
import os
import re
import shutil

from conftest import LONG, assert_refused, call, small_config, train_flags
from etils import epath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from evo_jax.data import tokenizers
from evo_jax.errors import UserError
from evo_jax.training import checkpoint, files, loop
from evo_jax.training import metrics as metrics_lib

BRIEF = LONG | {"train.steps": 102, "train.eval_every": 0, "eval.samples": 0, "eval.paths": ("ar",)}


def stopped(trained, workdir):
  """A copy of the trained run as if it had been stopped after step 100."""
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / "checkpoints" / "120")
  log = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(log[:100]))
  return workdir


def steps(workdir):
  return [row["step"] for row in metrics_lib.read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture
def traces(monkeypatch):
  """What the profiler was asked for, without its time."""
  asked = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: asked.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("stop"))
  return asked


def test_a_changed_length_and_a_moved_text(trained, text, tmp_path, traces):
  """Windows that are on stay on; one line says what becomes of them and of the learning rate. What is left of the
  profile's steps is traced."""
  workdir = stopped(trained, tmp_path / "run")
  shutil.copytree(text.parent, tmp_path / "moved")
  changes = BRIEF | {"train.profile": "50:101"}
  done = call("evo_jax.main", *train_flags(workdir, tmp_path / "moved" / "*.txt", **changes))
  assert done.returncode == 0, done.stderr
  old, new = (3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * 95 / (steps - 5)))) for steps in (120, 102))
  line = f"goes on after step 100: the learning rate is {new:.4g} now, not {old:.4g}, windows are on\n"
  assert line in done.stdout, done.stdout
  assert f"config.data.path: '{text}' -> " in done.stdout and "config.train.steps: 120 -> 102" in done.stdout
  assert traces == ["start", "stop"] and "steps 101 to 101 are traced in" in done.stdout
  assert steps(workdir) == list(range(1, 103))
  assert "window_ce" in metrics_lib.read_metrics(workdir / "metrics.jsonl")[-1]


def test_an_imported_model_goes_on_with_any_text(trained, tmp_path, traces):
  """A checkpoint of step 0 has seen no text, and no order of batches hangs on it. Windows may start later than they
  did, and a profile that asks for no step of the run says so."""
  workdir = stopped(trained, tmp_path / "run")
  (workdir / "checkpoints" / "100").rename(workdir / "checkpoints" / "0")
  (tmp_path / "other.txt").write_text("a river runs " * 300)
  changes = {"data.batch_size": 4, "train.seed": 3, "optim.ema": 0.4, "window.start": 1, "train.profile": "103:200"}
  done = call("evo_jax.main", *train_flags(workdir, tmp_path / "other.txt", **BRIEF | changes | {"train.steps": 2}))
  assert done.returncode == 0, done.stderr
  assert re.search("goes on after step 0: the learning rate .*, windows start after step 1\n", done.stdout), done.stdout
  line = "config.train.profile: 103:200 is not traced: this run makes steps 1 to 2\n"
  assert line in done.stdout and not traces
  rows = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2] and rows[0]["bits"] < 6
  assert ["window_ce" in row for row in rows] == [False, True]
  assert "goes far beyond step 0" in done.stderr  # the log of the hundred steps is not lost
  assert steps(workdir / "damaged") == list(range(1, 101))


def prepared(workdir, **changes):
  with loop.prepare(small_config(**(LONG | changes)), str(workdir)) as setup:
    return setup


def saved(trained, workdir, step):
  """A work directory that says what it was trained with, and that a checkpoint of `step` is there (None: none)."""
  workdir.mkdir()
  shutil.copy(trained / "config.json", workdir)
  if step is not None:
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
  return workdir


CONTENTS = [
  ("model.width", 64),
  ("model.rope_base", 500.0),
  ("optim.ema", 0.0),
  ("warp.knots", 8),
  ("data.tokenizer", "chars27"),
]
ORDER = [
  ("model.context", 64),
  ("data.batch_size", 16),
  ("data.seed", 1),
  ("train.seed", 1),
  ("train.trainable", "windows"),
  ("model.progression", "learned"),  # windows' own parameters begin anew at step 0
  ("model.window_rank", 2),
  ("data.weights", (2.0,)),
  ("data.path", "text"),  # another one
]
FREE = [
  ("model.isolate_documents", True),
  ("optim.ema", 0.9),
  ("optim.learning_rate", 1e-5),
  ("optim.schedule", "wsd"),
  ("optim.moment_dtype", "bfloat16"),
  ("model.dtype", "bfloat16"),
  ("window.start", 50),
  ("train.steps", 500),
]


@pytest.mark.parametrize("step", [None, 0, 100])
@pytest.mark.parametrize("field, value", CONTENTS + ORDER + FREE)
def test_what_is_pinned(trained, text, tmp_path, step, field, value):
  """Where nothing is saved, nothing; by a checkpoint, what it contains; by steps, also the order of batches."""
  changes = {"data.path": str(text), field: value}
  if field == "data.path":
    shutil.copytree(text.parent, tmp_path / "text")
    (tmp_path / "text" / "20.txt").write_text("one more")
    changes["data.path"] = str(tmp_path / "text" / "*.txt")
  if field == "model.progression":
    changes |= {"paths.learned": 0.2}
  workdir = saved(trained, tmp_path / "run", step)
  refused = (field, value) in CONTENTS if step == 0 else step == 100 and (field, value) not in FREE
  if not refused:
    assert prepared(workdir, **changes).folder == epath.Path(workdir)
    assert json.loads((workdir / "config.json").read_text())["config"]["optim"]["ema"] == changes.get("optim.ema", 0.5)
    return
  before = (workdir / "config.json").read_text()
  with pytest.raises(UserError, match=f"^config.{field}: .*(does not fit|is not what).*use another --workdir$"):
    prepared(workdir, **changes)
  assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
  "content, problem",
  [
    (b"", "is damaged"),
    (b'{"config": {"model": {', "is damaged"),
    (b"\xff\xfe{}", "is damaged"),
    (b"[" * 100_000, "is damaged"),
    (b"[1]", "is damaged"),
    (b"{}", "is damaged"),
    (b'{"config": 3, "tokenizer": "bytes", "text": []}', "is damaged"),
    (
      b'{"config": {"model": {"sparse": true}}, "tokenizer": "bytes", "text": []}',
      "config.model.sparse: no such field",
    ),
    (b'{"config": {"model": {"width": "a"}}, "tokenizer": "bytes", "text": []}', "config.model.width: 'a' is not of"),
    (None, "cannot be read"),
  ],
  ids=["empty", "cut off", "not UTF-8", "deep", "list", "no fields", "no section", "newer", "foreign", "lost"],
)
def test_a_config_that_cannot_be_read_is_named(trained, text, tmp_path, content, problem):
  """Where something is saved; a first attempt's, which nothing hangs on, is written again."""
  for step in (100, None):
    workdir = saved(trained, tmp_path / str(step), step)
    (workdir / "config.json").unlink() if content is None else (workdir / "config.json").write_bytes(content)
    if step is None:
      prepared(workdir, **{"data.path": str(text)})
      assert checkpoint.read_config(epath.Path(workdir))["config"].model.width == 32
    else:
      with pytest.raises(UserError, match=f"^{workdir}/config.json: [^\n]*{problem}[^\n]*$"):
        prepared(workdir, **{"data.path": str(text)})


def test_a_share_of_the_steps_before_windows_is_read_as_steps(trained, tmp_path):
  values = json.loads((trained / "config.json").read_text())
  values["config"]["window"]["start"] = 0.5
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert checkpoint.read_config(epath.Path(tmp_path))["config"].window.start == 60


def test_the_tokenizers_copy_serves_where_it_was_moved(text, tmp_path, capsys):
  words = [path.read_text() for path in text.parent.iterdir()]
  tokenizers.train_sentencepiece(words, 290, str(tmp_path / "tokenizer"))
  tokenizers.train_sentencepiece(words, 291, str(tmp_path / "another"))
  workdir, folder = tmp_path / "run", tmp_path / "tokenizer"
  changes = {"data.path": str(text), "data.tokenizer": "sentencepiece", "data.tokenizer_path": str(folder)}
  identity = prepared(workdir, **changes).tokenizer.identity
  (workdir / "checkpoints" / "20").mkdir(parents=True)
  with pytest.raises(UserError, match="config.data.tokenizer_path: tokenizer .* is not the checkpoint's"):
    prepared(workdir, **changes | {"data.tokenizer_path": str(tmp_path / "another")})
  copy = workdir / "tokenizer" / tokenizers.MODEL_FILE
  copy.write_bytes(b"cut off")  # mended from the original
  prepared(workdir, **changes)
  folder.rename(tmp_path / "moved")
  for path in (str(folder), ""):
    capsys.readouterr()
    assert prepared(workdir, **changes | {"data.tokenizer_path": path}).tokenizer.identity == identity
    assert f"; its copy {workdir}/tokenizer is used\n" in capsys.readouterr().out
  copy.write_bytes(b"cut off")
  with pytest.raises(UserError, match=f"{copy}: is not a SentencePiece model"):
    prepared(workdir, **changes)


ROWS = [json.dumps({"step": step, "bits": 1.5}).encode() for step in range(1, 9)]


@pytest.mark.parametrize(
  "bad, aside",
  [
    ({}, False),
    ({8: b'{"step": 9, "bi'}, False),  # cut off, as by a kill
    ({3: b"\xff\xfe"}, True),
    ({3: b"\0" * 40, 5: b""}, True),
    ({0: b"[1]", 4: b"3", 5: b'{"bits": 3}'}, True),
    ({2: b"[" * 100_000}, True),
    ({2: ROWS[2] + b"\r"}, False),  # edited elsewhere
  ],
  ids=["whole", "cut off", "not UTF-8", "zeros", "no rows", "deep", "line end"],
)
def test_no_row_of_a_damaged_log_is_lost(tmp_path, capsys, bad, aside):
  lines = ROWS + [b""]
  for place, line in bad.items():
    lines[place] = line
  raw = b"\n".join(lines)
  (tmp_path / "metrics.jsonl").write_bytes(raw)
  readable = [step for step in range(1, 9) if lines[step - 1].strip() == ROWS[step - 1]]
  assert steps(tmp_path) == readable
  log = metrics_lib.MetricsLog(epath.Path(tmp_path), 6, 4)
  log.write({"step": 7, "bits": 2.0})
  log.close()
  assert steps(tmp_path) == [step for step in readable if step <= 6] + [7]
  assert (tmp_path / "damaged").exists() == aside == ("it is kept as" in capsys.readouterr().err)
  if aside:
    assert (tmp_path / "damaged" / "metrics.jsonl").read_bytes() == raw


def test_a_full_disk_leaves_files_as_they_were(tmp_path, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(ROWS))
  files.write_json(epath.Path(tmp_path) / "config.json", {"a": 1})
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  monkeypatch.setattr(os, "fsync", full)
  for write in (
    lambda: files.write_json(epath.Path(tmp_path) / "config.json", {"a": 2}),
    lambda: files.write_file(epath.Path(tmp_path) / "table.txt", b"table"),
    lambda: metrics_lib.MetricsLog(epath.Path(tmp_path), 3),
  ):
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
      write()
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def store(tmp_path):
  """A folder with small checkpoints of steps 10 and 20, and the abstract item to restore."""
  workdir = checkpoint.make_workdir(str(tmp_path))
  checkpoints = checkpoint.CheckpointStore(workdir, 5)
  for step in (10, 20):
    checkpoints.save(step, {"params": {"a": jnp.full(3, float(step))}})
  checkpoints.wait()
  checkpoints.close()
  return workdir


def restored(workdir):
  checkpoints = checkpoint.CheckpointStore(workdir, 5)
  try:
    step, items = checkpoints.restore_latest({"params": {"a": jnp.zeros(3)}})
  finally:
    checkpoints.close()
  np.testing.assert_array_equal(items["params"]["a"], float(step))
  return step


def test_a_save_that_fails_while_another_error_ends_the_run_adds_nothing(store, monkeypatch):
  """As on a disk that fills up: the next save is refused while the one before fails in the background."""

  def full(_):
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

  checkpoints = checkpoint.CheckpointStore(store, 5)
  checkpoints.save(30, {"params": {"a": jnp.zeros(3)}})
  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
  with pytest.raises(UserError, match="cannot be written: RESOURCE_EXHAUSTED: No space left on device"):
    checkpoints.wait()
  checkpoints.close()


@pytest.mark.parametrize(
  "put, step, aside",
  [
    (lambda folder: (folder / "30").mkdir(), 20, ["30"]),
    (lambda folder: (folder / "30").write_text("x"), 20, None),
    (lambda folder: (folder / "notes.txt").write_text("x"), 20, None),
    (lambda folder: (folder / "30.orbax-checkpoint-tmp").mkdir(), 20, None),  # killed while it was being written
    (lambda folder: shutil.rmtree(folder / "20" / "params"), 10, ["20"]),
    (lambda folder: (folder / "20" / "params" / "_METADATA").write_bytes(b""), 10, ["20"]),
    (lambda folder: (folder / "20" / "_CHECKPOINT_METADATA").write_bytes(b"{"), 20, None),
    (lambda folder: shutil.copytree(folder / "20", folder / "30" / "20"), 20, ["30"]),  # copied one level too deep
  ],
  ids=["empty folder", "file", "foreign", "partial", "item lost", "empty", "cut off", "too deep"],
)
def test_what_is_no_checkpoint_is_passed_over(store, put, step, aside):
  """And kept: nothing is deleted."""
  put(store / "checkpoints")
  assert restored(store) == step
  assert sorted(os.listdir(store / "damaged")) == aside if aside else not (store / "damaged").exists()
  assert restored(store) == step


def test_setting_aside_never_overwrites(store):
  (store / "damaged" / "20").mkdir(parents=True)
  shutil.rmtree(store / "checkpoints" / "20" / "params")
  assert restored(store) == 10 and sorted(os.listdir(store / "damaged")) == ["20", "20-1"]


def test_folders_that_are_files_or_gone_are_named(store):
  shutil.rmtree(store / "checkpoints" / "20" / "params")
  (store / "damaged").write_text("")
  with pytest.raises(UserError, match="damaged: cannot be made"):
    restored(store)
  checkpoints = checkpoint.CheckpointStore(store, 5)
  (store / "checkpoints").rename(store / "elsewhere")
  with pytest.raises(UserError, match="checkpoints: is gone"):
    checkpoints.save(30, {"params": {"a": jnp.zeros(3)}})
  checkpoints.close()
  (store / "checkpoints").write_text("")
  with pytest.raises(UserError, match="checkpoints: is no folder"):
    restored(store)


@pytest.mark.parametrize(
  "name, problem",
  [
    ("", "is empty"),
    ("  ", "is empty"),
    ("{}/file", "is a file, or a link to nothing"),
    ("{}/file/run", "cannot be written: Not a directory"),
    ("{}/dangling", "is a file, or a link to nothing"),
    ("{}/loop", "is a file, or a link to nothing"),
    ("{}/" + "a" * 256, "cannot be written: File name too long"),
    ("{}/caf\udcc3", "'.*caf.udcc3': is not UTF-8"),
    ("~nobody-by-this-name/run", "there is no such user"),
    ("ftp://host/run", "is neither a local folder nor in gs://"),
    ("/proc/run", "cannot be written: No such file or directory"),
  ],
)
def test_a_work_directory_that_cannot_be_is_named(tmp_path, name, problem):
  (tmp_path / "file").write_text("")
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  with pytest.raises(UserError, match=f"^--workdir.*{problem}$"):
    checkpoint.make_workdir(name.format(tmp_path))


class _Bucket(MemoryFileSystem):
  """A bucket in memory: as in a real one, nothing can be appended."""

  protocol, store, pseudo_dirs = "gcs", {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("gs://", "memory://"))

  def _open(self, path, mode="rb", **kwargs):
    assert "a" not in mode
    return super()._open(path, mode, **kwargs)


def test_a_work_directory_in_a_bucket_has_files_and_a_log(monkeypatch):
  fsspec.register_implementation("gcs", _Bucket, clobber=True)
  monkeypatch.setattr(metrics_lib, "_REWRITTEN", 0.0)
  folder = epath.Path("gs://bucket/run")
  files.write_json(folder / "config.json", {"a": 1})
  files.write_json(folder / "config.json", {"a": 2})
  assert json.loads((folder / "config.json").read_text()) == {"a": 2}
  log = metrics_lib.MetricsLog(folder, 0)
  for step in (1, 2, 3):
    log.write({"step": step})
    assert [row["step"] for row in metrics_lib.read_metrics(folder / "metrics.jsonl")] == list(range(1, step + 1))
  monkeypatch.setattr(metrics_lib, "_REWRITTEN", 60.0)
  log = metrics_lib.MetricsLog(folder, 2)  # what is behind a checkpoint is written again
  log.write({"step": 3, "again": 1})
  log.flush()
  log.write({"step": 4})
  log.close()
  rows = metrics_lib.read_metrics(folder / "metrics.jsonl")
  assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}, {"step": 4}]


def test_an_empty_work_directory_is_not_the_default(text):
  """As --workdir=$DIR is where DIR is not set."""
  assert_refused(call("evo_jax.main", *train_flags("", text)), "--workdir: is empty")

"""Runs on prepared text: mixtures that change, what a restart keeps, damage, slow buckets, and held-out text."""

import json
import shutil
import time

from conftest import assert_refused, call, train_flags
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
import pytest

from evo_jax.training import metrics as metrics_lib

CHEAP = {
  "window.count": 0,
  "loss.bound_windows": 0,
  "eval.samples": 0,
  "eval.paths": ("ar",),
  "train.steps": 6,
  "train.checkpoints_kept": 3,
}
MIXED = {"data.weights": (3.0, 1.0), "data.weight_changes": "2:0,1"}


def train(workdir, data, **changes):
  return call("evo_jax.main", *train_flags(workdir, data, **{**CHEAP, "train.checkpoint_every": 2}, **changes))


def rows(workdir):
  logged = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in metrics_lib.TIMING_FIELDS} for row in logged]


def prepare(folder, **texts):
  for name, text in texts.items():
    (folder / f"{name}.txt").write_text(text)
  inputs = ",".join(f"{folder}/{name}.txt" for name in texts)
  done = call("evo_jax.prepare", f"--input={inputs}", f"--output={folder}/tokens", "--workers=1")
  assert done.returncode == 0, done.stderr
  return folder / "tokens"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """A folder with the run of a mixture on two sources, a and b, and its text, tokens."""
  folder = tmp_path_factory.mktemp("mixed")
  rng = np.random.default_rng(0)
  words = lambda count, letters: " ".join("".join(rng.choice(list(letters), 4)) for _ in range(count))
  data = prepare(folder, a=words(1600, "abcd"), b=words(800, "efgh"))
  done = train(folder / "run", data, **MIXED)
  assert done.returncode == 0 and "10,800 training tokens" in done.stdout, done.stdout + done.stderr
  return folder


def test_metrics_say_how_often_each_source_has_been_read(mixed):
  names = [f"epochs/{name}.txt" for name in "ab"]
  a, b = (np.array([row[name] for row in rows(mixed / "run")]) for name in names)
  np.testing.assert_allclose(a * 7200 / 32, [6, 12, 12, 12, 12, 12], atol=1e-3)
  np.testing.assert_allclose(b * 3600 / 32, [2, 4, 12, 20, 28, 36], atol=1e-3)


def test_a_run_goes_on_with_the_same_text_wherever_it_stands(mixed, tmp_path):
  """From any checkpoint, bit for bit: in another folder, and as text files."""
  moved = shutil.copytree(mixed / "tokens", tmp_path / "moved")
  for i, path in enumerate([moved, f"{mixed}/a.txt,{mixed}/b.txt"]):
    workdir = shutil.copytree(mixed / "run", tmp_path / str(i))
    for step in (4, 6)[i:]:
      shutil.rmtree(workdir / "checkpoints" / str(step))
    done = train(workdir, path, **MIXED)
    assert done.returncode == 0 and f"goes on after step {2 + 2 * i}" in done.stdout, done.stderr
    assert rows(workdir) == rows(mixed / "run")


def test_weights_may_change_from_now_on_but_not_before(mixed, tmp_path):
  workdir = shutil.copytree(mixed / "run", tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / "6")
  for field, value, shown in (
    ("weight_changes", "3:0,1", "'3:0,1'"),
    ("weight_changes", "", "''"),
    ("weights", (1.0, 1.0), r"(1.0, 1.0)"),
  ):
    done = train(workdir, mixed / "tokens", **{**MIXED, f"data.{field}": value})
    assert done.returncode == 1 and f"config.data.{field}: {shown} does not fit" in done.stderr, done.stderr
  done = train(workdir, mixed / "tokens", **{**MIXED, "data.weight_changes": "2:0,1;4:1,0"})
  assert done.returncode == 0 and "goes on after step 4" in done.stdout, done.stderr
  last = rows(workdir)[-1]
  assert last["epochs/a.txt"] * 7200 / 32 == pytest.approx(12 + 16, abs=1e-3)


def test_a_damaged_shard_ends_training_before_it_is_trained_on(mixed, tmp_path):
  data = shutil.copytree(mixed / "tokens", tmp_path / "tokens")
  workdir = shutil.copytree(mixed / "run", tmp_path / "run")
  for step in (4, 6):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  shard = data / "001-00000-0000.train"
  raw = bytearray(shard.read_bytes())
  for place in range(100, len(raw), 1000):
    raw[place] ^= 4
  shard.write_bytes(raw)
  assert_refused(train(workdir, data, **MIXED), "001-00000-0000.train: record ")
  assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
  assert [row["step"] for row in rows(workdir)] == [1, 2]
  done = train(workdir, mixed / "tokens", **MIXED)
  assert done.returncode == 0 and rows(workdir) == rows(mixed / "run"), done.stderr


class Slow(MemoryFileSystem):
  """A bucket whose answers take a while."""

  protocol = "slow"
  seconds = 0.0

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("slow://", "memory://"))

  def cat_file(self, path, start=None, end=None, **kwargs):
    time.sleep(Slow.seconds)
    return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("slow", Slow, clobber=True)


def test_a_slow_bucket_is_seen_in_the_metrics(mixed, tmp_path, monkeypatch):
  for file in (mixed / "tokens").iterdir():
    if file.is_file():
      Slow().pipe_file(f"slow://tokens/{file.name}", file.read_bytes())
  monkeypatch.setattr(Slow, "seconds", 0.1)
  done = train(tmp_path, "slow://tokens", **MIXED, **{"data.threads": 2, "eval.sequences": 1})
  assert done.returncode == 0, done.stderr
  assert rows(tmp_path) == rows(mixed / "run")
  assert metrics_lib.read_metrics(tmp_path / "metrics.jsonl")[-1]["data_wait"] > 0.3  # 0.9 where nothing else runs


def test_held_out_text_of_runs_and_of_prepared_folders_is_measured(mixed, tmp_path):
  def bits(*arguments):
    file = tmp_path / "table.json"
    done = call("evo_jax.evaluate", f"--workdir={mixed / 'run'}", "--paths=ar", f"--json={file}", *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(file.read_text())[0]["bits"], done.stdout

  own, shown = bits()
  assert f"{mixed}/tokens (valid): 18 sequences of 32" in shown
  assert bits(f"--data={mixed}/tokens")[0] == own != bits("--split=test")[0]
  assert bits(f"--data={mixed}/tokens", "--split=test")[0] == bits("--split=test")[0]
  (tmp_path / "a.txt").write_text("a text of its own. " * 20)
  _, shown = bits(f"--data={tmp_path}/a.txt", "--sequences=0")
  assert f"{tmp_path}/a.txt: 11 sequences of 32" in shown

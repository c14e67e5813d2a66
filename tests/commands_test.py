"""The other commands and the README's, as a user runs them."""

import json
import pathlib
import re

import pytest

from conftest import ROOT, run, train_flags
from evo_jax import config as config_lib
from evo_jax import cli


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp("run")
  done = run("evo_jax.main", *train_flags(folder, text, eval__samples=0, optim__ema=0.5))
  assert done.returncode == 0, done.stderr
  return folder


def test_evaluate_writes_json(workdir, tmp_path, text):
  file = tmp_path / "table.json"
  done = run("evo_jax.evaluate", f"--workdir={workdir}", "--paths=ar,diagonal:16,rolling:4,staircase", f"--json={file}")
  assert done.returncode == 0, done.stderr
  table = json.loads(file.read_text())
  assert [set(e) for e in table] == [{"path", "bits", "stderr", "passes_per_token", "unit"}] * 4
  assert [e["passes_per_token"] for e in table] == [1.0, 2.0, 0.5, 1.0]
  assert all(e["stderr"] > 0 and 0 < e["bits"] < 10 and e["unit"] == "bits per byte" for e in table)
  again = run("evo_jax.evaluate", f"--workdir={workdir}", "--paths=ar", f"--data={text}", "--sequences=20")
  assert again.returncode == 0 and "20 sequences" in again.stdout, again.stderr
  assert run("evo_jax.evaluate", f"--workdir={workdir}", "--paths=ar", "--split=test").returncode == 0


def test_generate_writes_text(workdir):
  flags = (f"--workdir={workdir}", "--prompt=the ri", "--num=2", "--max_tokens=20")
  found = [run("evo_jax.generate", *flags, *more) for more in (
      ("--seed=1",), ("--seed=1",), ("--seed=2",), ("--mode=flow", "--steps=3"),
      ("--mode=flow", "--steps=3", "--path=rolling", "--stepper=ancestral"))]
  for done in found:
    assert done.returncode == 0 and done.stdout.count("the ri") >= 2, done.stderr
  assert found[0].stdout == found[1].stdout and len({done.stdout for done in found}) == 4


@pytest.mark.parametrize("module, flags, message", [
    ("evaluate", ("--workdir=/no/such",), "--workdir=/no/such: is no folder"),
    ("evaluate", ("--workdir=RUN", "--paths=spiral:2"), "path 'spiral:2'"),
    ("evaluate", ("--workdir=RUN", "--data=/no/such*"), "--data: no file matches"),
    ("evaluate", ("--workdir=RUN", "--json=/no/such/file"), "--json=/no/such/file: cannot be written"),
    ("evaluate", ("--workdir=RUN", "--step=999"), "holds no checkpoint of step 999"),
    ("evaluate", ("--workdir=RUN", "--pats=ar"), "Unknown command line flag 'pats'"),
    ("generate", ("--workdir=RUN", "--mode=spiral"), "--mode=spiral"),
    ("generate", ("--workdir=RUN", "--max_tokens=500"), "do not fit the context of 32"),
    ("generate", ("--workdir=RUN", "--num=0"), "--num=0: is not positive"),
    ("generate", ("--workdir=configs",), "config.json: cannot be read"),
    ("main", ("--config=configs/tiny.py", "stray"), "unexpected argument 'stray'")])
def test_bad_input_is_one_line(workdir, module, flags, message):
  done = run(f"evo_jax.{module}", *(f.replace("RUN", str(workdir)) for f in flags))
  assert done.returncode == 1 and message in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_readme_command_in_short(tmp_path):
  """The README's first command, with fewer steps: standard-library text, a table of all paths, two kinds of samples."""
  readme = (pathlib.Path(ROOT) / "README.md").read_text()
  command = re.search(r"^python3 -m venv .*-m (evo_jax\.main) (--config=\S+)$", readme, re.M)
  done = run(command[1], command[2], f"--workdir={tmp_path}", "--config.train.steps=3", "--config.train.log_every=1",
             "--config.eval.sequences=4", "--config.eval.sample_tokens=20")
  assert done.returncode == 0, done.stderr
  assert re.findall(r"^(ar|[a-z]+:\d+)\b", done.stdout, re.M) == ["ar", "diagonal:1", "diagonal:4", "diagonal:16", "rolling:8"]
  assert "--- ar" in done.stdout and "--- flow" in done.stdout and "tokens/s" in done.stderr
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_ci_runs_the_readmes_tests():
  readme, ci = ((pathlib.Path(ROOT) / name).read_text() for name in ("README.md", ".ci/run"))
  command = re.search(r"^\.venv/bin/pip install -e '\.\[test\]' && \.venv/bin/python -m pytest$", readme, re.M)
  assert command and command[0] in ci


@pytest.mark.parametrize("values, message", [
    ({"model": {"widht": 3}}, "config.model.widht: no such field"),
    ({"model": {"width": 3.5}}, "config.model.width: 3.5 is not of type int"),
    ({"model": {"width": True}}, "config.model.width: True is not of type int"),
    ({"modl": {}}, "config.modl: no such field"),
    ({"model": 3}, "config.model: is a section"),
    ({"eval": {"paths": "ar"}}, "config.eval.paths: 'ar' is not a tuple"),
    ({"train": {"steps": -1}}, "config.train.steps: -1 is not positive"),
    ({"loss": {"bound_windows": 9}}, "config.loss.bound_windows: 9 is not in"),
    ({"data": {"weights": (1.0,), "path": "a,b"}}, "config.data.weights"),
    ({"optim": {"schedule": "step"}}, "config.optim.schedule: 'step' is not one of")])
def test_impossible_fields_are_named(values, message):
  with pytest.raises(cli.UserError, match=re.escape(message)):
    config_lib.from_dict(values)

"""The notebooks run from top to bottom, in a few small steps."""

import csv
import json
import pathlib
import shutil
import subprocess
import sys

from conftest import ROOT, environment
import numpy as np
import pytest

from evo_jax.pretrained.source import open_source

# What a notebook has and a plain interpreter does not.
_DISPLAY = """
import sys, types
module = types.ModuleType("IPython.display")
module.HTML = module.Image = lambda value: value
module.display = lambda value: print("displayed", len(value))
sys.modules["IPython.display"] = module
"""

# The same statements with smaller numbers.
_SMALLER = {
  "values.eval.samples, values.eval.sequences = 0, 16": (
    "values.eval.samples, values.eval.sequences, values.eval.batch_size = 0, 2, 2\n"
    "values.data.batch_size, values.model.layers, values.eval.paths = 2, 2, ('ar',)"
  ),
  "values.window.size, values.window.count = 32, 2": "values.window.size, values.window.count = 16, 2",
  "run.config.model.context, 16)": "run.config.model.context, 2)",
  "max_tokens=64": "max_tokens=20",
}
_SMALLER_FASTER = {
  "max_tokens=100, **fields": "max_tokens=12, **fields",
  "num=4, max_tokens=100": "num=8, max_tokens=40",
  '"config.train.steps": STEPS}': '"config.train.steps": STEPS, "config.window.count": 4, "config.train.log_every": 1}',
}
_SMALLER_ABLATION = {
  "values.train.steps = STEPS": (
    "values.train.steps = STEPS\n"
    "values.model.layers, values.model.width, values.model.hidden, values.model.context = 1, 16, 16, 32\n"
    "values.window.size, values.data.batch_size, values.optim.warmup = 8, 4, 1"
  ),
  '= 0, 32, ("ar",)': '= 0, 2, ("ar",)',
  "base.config.model.context, 32)": "base.config.model.context, 4)",
  "for path in (OwnPath(even_first, 8), OwnPath(apart, 2.0))": "for path in (OwnPath(apart, 2.0),)",
  'for options in ({}, {"price": squared_error})': 'for options in ({"price": squared_error},)',
  "max_tokens=48": "max_tokens=8",
}


def run_notebook(name, smaller, folder, **variables):
  """Runs a notebook's statements in a folder, without those that install; what they print."""
  notebook = json.loads((pathlib.Path(ROOT) / "colab" / name).read_text())
  cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "install" not in c["metadata"].get("tags", ())]
  source = "\n\n".join("".join(c["source"]) for c in cells)
  for large, small in smaller.items():
    assert large in source, large
    source = source.replace(large, small)
  (folder / "notebook.py").write_text(_DISPLAY + source)
  (folder / "configs").symlink_to(pathlib.Path(ROOT) / "configs")
  done = subprocess.run(
    [sys.executable, "notebook.py"],
    capture_output=True,
    text=True,
    cwd=folder,
    timeout=900,
    env=environment() | {"EVO_STEPS": "4", "EVO_WORKDIR": "run", "PYTHONPATH": ROOT} | variables,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_evo_in_ten_minutes(tmp_path):
  shown = run_notebook("evo_in_ten_minutes.ipynb", _SMALLER, tmp_path)
  assert "streams:8" in shown
  assert all(f"--- {mode}: " in shown for mode in ("ar", "flow", "adaptive", "verify"))
  assert shown.count("displayed") == 2
  assert (tmp_path / "trace.html").exists() and (tmp_path / "trace.png").exists()
  assert shown.count("(self):\n    return self._") == 2


@pytest.mark.slow
def test_ablate_the_flow(tmp_path):
  """A path and a policy of one's own are trained, priced, compared, and written with."""
  shown = run_notebook("ablate_the_flow.ipynb", _SMALLER_ABLATION, tmp_path)
  assert "even_first minus base: bits per byte" in shown and "mine.py:apart:2 squared_error" in shown
  assert "--- apart:2: " in shown
  rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
  paths = ["ar", "streams:2", "diagonal:8", "rolling:8", "even_first:8", "apart:2"]
  assert [row["path"] for row in rows] == 3 * paths
  assert [row["run"] for row in rows] == 6 * ["base"] + 12 * ["even_first"]
  assert [row["minus"] for row in rows] == 12 * [""] + 6 * ["base"]
  base, own, difference = np.array([float(row["bits"]) for row in rows]).reshape(3, 6)
  np.testing.assert_allclose(difference, own - base, atol=1e-9)
  assert 0 < np.abs(difference).max() < 0.1  # four steps on other windows


@pytest.mark.slow
def test_your_model_faster(tmp_path):
  """With a small model of the same architecture, whose windows are trained and not added."""
  model, references = tmp_path / "model", pathlib.Path(ROOT) / "tests" / "pretrained"
  shutil.copytree(references / "smollm2", model)
  shutil.copy(references / "tokenizer" / "tokenizer.json", model)
  settings = json.loads((references / "tokenizer" / "tokenizer_config.json").read_text())
  settings["chat_template"] = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
  (model / "tokenizer_config.json").write_text(json.dumps(settings))
  shown = run_notebook("your_model_faster.ipynb", _SMALLER_FASTER, tmp_path, EVO_SOURCE=str(model), EVO_WINDOWS="")
  assert shown.count("the same text: True") == 3 and shown.count("displayed") == 3
  exported = sorted(path.name for path in (tmp_path / "run-export").iterdir())
  assert {"config.json", "evo.safetensors", "model.safetensors", "tokenizer.json"} <= set(exported)
  before, after = (open_source(str(folder)) for folder in (model, tmp_path / "run-export"))
  assert all(after.read(name).tobytes() == before.read(name).tobytes() for name in before.names())

"""The notebook runs from top to bottom, in a few small steps."""

import json
import pathlib
import subprocess
import sys

from conftest import ROOT, environment
import pytest

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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  notebook = json.loads((pathlib.Path(ROOT) / "colab" / "evo_in_ten_minutes.ipynb").read_text())
  cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "install" not in c["metadata"].get("tags", ())]
  source = "\n\n".join("".join(c["source"]) for c in cells)
  for large, small in _SMALLER.items():
    assert large in source, large
    source = source.replace(large, small)
  (tmp_path / "notebook.py").write_text(_DISPLAY + source)
  (tmp_path / "configs").symlink_to(pathlib.Path(ROOT) / "configs")
  done = subprocess.run(
    [sys.executable, "notebook.py"],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    timeout=900,
    env=environment() | {"EVO_STEPS": "4", "EVO_WORKDIR": "run", "PYTHONPATH": ROOT},
  )
  assert done.returncode == 0, done.stderr
  assert "streams:8" in done.stdout
  assert all(f"--- {mode}: " in done.stdout for mode in ("ar", "flow", "adaptive", "verify"))
  assert done.stdout.count("displayed") == 2
  assert (tmp_path / "trace.html").exists() and (tmp_path / "trace.png").exists()
  assert done.stdout.count("(self):\n    return self._") == 2

"""The notebook runs from top to bottom, in a few steps."""

import json
import pathlib
import subprocess
import sys

from conftest import ROOT, environment

# What a notebook has and a plain interpreter has not.
_DISPLAY = """
import sys, types
module = types.ModuleType("IPython.display")
module.HTML = module.Image = lambda value: value
module.display = lambda value: print("displayed", len(value))
sys.modules["IPython.display"] = module
"""


def test_the_notebook_runs(tmp_path):
  notebook = json.loads((pathlib.Path(ROOT) / "colab" / "evo_in_ten_minutes.ipynb").read_text())
  cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "install" not in c["metadata"].get("tags", ())]
  (tmp_path / "notebook.py").write_text(_DISPLAY + "\n\n".join("".join(c["source"]) for c in cells))
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
  assert "streams:8" in done.stdout and all(
    f"--- {mode}: " in done.stdout for mode in ("ar", "flow", "adaptive", "verify")
  )
  assert (
    done.stdout.count("displayed") == 2 and (tmp_path / "trace.html").exists() and (tmp_path / "trace.png").exists()
  )
  assert done.stdout.count("(self):\n    return self._") == 2

"""The house stands as it is drawn: import contracts, lint and format, and functions that fit into the head."""

import ast
import pathlib
import shutil
import subprocess
import sys

from conftest import ROOT
import pytest

PACKAGE = pathlib.Path(ROOT) / "evo_jax"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.parts]
LONGEST = 70  # lines of a function


@pytest.mark.parametrize(
  "command",
  [
    ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    ("-m", "ruff", "check", "--no-cache"),
    ("-m", "ruff", "format", "--check", "--no-cache"),
  ],
  ids=["imports", "lint", "format"],
)
def test_the_checks_of_pyproject_pass(command):
  done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


def test_a_circle_would_be_found(tmp_path):
  """The contracts can fail: the flow reads the network, and two siblings read each other."""
  shutil.copytree(PACKAGE, tmp_path / "evo_jax", ignore=shutil.ignore_patterns("configs", "__pycache__"))
  shutil.copy(pathlib.Path(ROOT) / "pyproject.toml", tmp_path)
  with (tmp_path / "evo_jax" / "flow" / "latents.py").open("a") as file:
    file.write("\nfrom evo_jax.flow import bound\nfrom evo_jax.network import rotary\n")
  command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode != 0
  for contract in ("Imports point downwards", "No circles inside packages", "The flow is pure mathematics"):
    assert any(line.startswith(contract) and "BROKEN" in line for line in done.stdout.splitlines()), done.stdout


def imported(path):
  """Names of what a module imports, wherever it does: "flax.linen", "jax.sharding", ..."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("part, folders", [("flax.linen", ("network",)), ("jax.sharding", ("network", "parallel"))])
def test_parts_of_libraries_stay_in_their_packages(part, folders):
  """What import contracts cannot tell apart: linen is the network's alone, and the flow knows no mesh."""
  users = {path.relative_to(PACKAGE).parts[0] for path in MODULES for name in imported(path) if name.startswith(part)}
  assert folders[0] in users if part == "flax.linen" else "flow" not in users
  assert part != "flax.linen" or users == set(folders)


def test_no_function_is_long():
  lengths = {
    f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
    for path in [*MODULES, *(pathlib.Path(ROOT) / "experiments").glob("*.py")]
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
  }
  assert len(lengths) > 300
  assert {name: length for name, length in lengths.items() if length > LONGEST} == {}

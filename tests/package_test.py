"""Shipped configurations by name, in a checkout and in a wheel that is installed elsewhere."""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT, assert_refused, call, environment, train_flags
import pytest

from evo_jax import cli
from evo_jax.errors import UserError


def test_a_name_finds_the_shipped_file_and_a_path_stays():
  assert pathlib.Path(cli.config_file("tiny")).samefile(pathlib.Path(ROOT) / "configs" / "tiny.py")
  assert cli.config_file("dir/own.py") == "dir/own.py" and cli.config_file("own.py") == "own.py"
  with pytest.raises(
    UserError, match="--config=tyni: is not one of evo150m, evo1b, .*smollm2_windows, tiny, and not the path"
  ):
    cli.config_file("tyni")


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--config=tyni",), "--config=tyni: is not one of evo150m"),
    (("--config", "tiny"), "--topology is needed"),  # the configuration is read before that is missed
    (("--config=tiny", "--config.model.widht=3"), "--config.model.widht: the configuration has no such field"),
  ],
)
def test_commands_take_names(flags, message):
  assert_refused(call("evo_jax.plan", *flags), message)


def succeed(*command, folder):
  """The output of a command that runs in a folder and does not see the checkout."""
  variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [str(part) for part in command], capture_output=True, text=True, timeout=600, cwd=folder, env=variables
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def build_wheel(folder):
  """Builds a wheel from a copy of the checkout, since a build writes into its source."""
  source = folder / "source"
  source.mkdir()
  for name in ("evo_jax", "configs"):
    shutil.copytree(f"{ROOT}/{name}", source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(f"{ROOT}/{name}", source)
  offline = ("--no-deps", "--no-build-isolation", "--no-index")
  succeed(sys.executable, "-m", "pip", "wheel", *offline, f"--wheel-dir={folder}", source, folder=folder)
  (wheel,) = folder.glob("*.whl")
  return wheel


def install(wheel, folder):
  """The interpreter of a new environment that holds the wheel, and its site-packages; it borrows the dependencies."""
  succeed(sys.executable, "-m", "venv", "--without-pip", folder / "env", folder=folder)
  python = folder / "env" / "bin" / "python"
  succeed(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", wheel, folder=folder)
  (site_packages,) = folder.glob("env/lib/python*/site-packages")
  borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
  (site_packages / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
  return python, site_packages


def modules(package):
  """The Python files of a package, and of its folder configs, which may be a link."""
  files = [*package.rglob("*.py"), *(package / "configs").glob("*.py")]
  return {str(file.relative_to(package)) for file in files}


@pytest.mark.slow
def test_an_installed_wheel_trains_away_from_the_checkout(tmp_path, text):
  pytest.importorskip("setuptools", minversion="77", reason="older ones cannot build this project")
  wheel = build_wheel(tmp_path)
  with zipfile.ZipFile(wheel) as archive:
    odd = [name for name in archive.namelist() if not re.match(r"evo_jax/.*\.py$|evo_jax-[^/]*\.dist-info/", name)]
  assert not odd
  python, site_packages = install(wheel, tmp_path)
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  package = succeed(python, "-c", "import evo_jax; print(evo_jax.__path__[0])", folder=elsewhere).strip()
  assert pathlib.Path(package) == site_packages / "evo_jax"
  assert modules(pathlib.Path(package)) == modules(pathlib.Path(ROOT) / "evo_jax")
  _, _, *fields = train_flags("", text, train__steps=2, eval__samples=0)  # without --config and --workdir
  table = succeed(python, "-m", "evo_jax.main", "--config=tiny", *fields, folder=elsewhere)
  assert "diagonal:2" in table and (elsewhere / "runs" / "tiny" / "table.json").exists()

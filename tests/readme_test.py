"""The commands of the README, and of those beside the code, word for word and in order, as a newcomer runs them."""

import json
import pathlib
import re
import subprocess
import sys

from conftest import ROOT, environment, run
import pytest

FILES = [
  "README.md",
  *(
    f"evo_jax/{name}/README.md"
    for name in ("data", "decoding", "serving", "pretrained", "planning", "flow", "benchmarks")
  ),
]
PAGES = [*FILES, "experiments/README.md"]
READMES = {name: (pathlib.Path(ROOT) / name).read_text() for name in FILES}
BLOCKS = [block for text in READMES.values() for block in re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.M | re.S)]
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", "").splitlines()]
INSTALLS = [command for command in COMMANDS if "pip install" in command]
LONG = [command for command in COMMANDS if re.search(r"-m (evo_jax\.(main|plan)|pytest)\b", command)]
SHORT = [command for command in COMMANDS if command not in LONG + INSTALLS]


def shell(command, folder, timeout=600):
  """Runs a command in a folder, where `python` is this environment's."""
  variables = environment() | {"PATH": f"{folder / 'bin'}:{environment()['PATH']}"}
  if "evo_jax.evaluate" in command:
    variables.pop("XLA_FLAGS")  # it computes for longer than it compiles
  return subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A folder that looks like a fresh checkout, with a `runs/tiny` that was trained for three steps by the README's
  first command with more flags."""
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("evo_jax", "configs", "README.md", "pyproject.toml"):
    (folder / name).symlink_to(pathlib.Path(ROOT) / name)
  (folder / "bin").mkdir()
  (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  (folder / "bin" / "python").chmod(0o755)
  shorter = {
    "train.steps": 3,
    "train.log_every": 1,
    "data.batch_size": 4,
    "eval.sequences": 4,
    "eval.batch_size": 4,
    "eval.samples": 1,
    "eval.sample_tokens": 20,
  }
  done = shell(" ".join([LONG[0], *(f"--config.{field}={value}" for field, value in shorter.items())]), folder)
  assert done.returncode == 0, done.stderr
  assert re.findall(r"^(\w+(?::\d+)?) +\d\.\d+ ", done.stdout, re.M) == [
    "ar",
    "diagonal:1",
    "diagonal:4",
    "diagonal:16",
    "rolling:8",
  ]
  assert "--- ar" in done.stdout and "--- flow" in done.stdout and "tokens/s" in done.stderr
  return folder


@pytest.mark.slow
def test_short_commands(checkout):
  assert LONG[0] == "python -m evo_jax.main --config=tiny"
  assert len(SHORT) >= 11 and sum("evo_jax.generate" in command for command in SHORT) >= 4
  for command in SHORT:
    done = shell(command, checkout)
    assert done.returncode == 0 and "Traceback" not in done.stderr, (command, done.stdout, done.stderr)
  texts = json.loads((checkout / "texts.json").read_text())
  assert [text["prompt"] for text in texts] == ["import ", "class "]
  assert (checkout / "text.html").stat().st_size > 1000


@pytest.mark.slow
def test_python(checkout):
  for code in [text for kind, text in BLOCKS if kind == "python"]:
    done = subprocess.run(
      [checkout / "bin" / "python", "-c", code], cwd=checkout, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_ci_runs_the_test_command():
  assert "-m pytest" in INSTALLS[-1] and INSTALLS[-1] in (pathlib.Path(ROOT) / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
  """GitHub's anchors are headings in lower case, without punctuation, with hyphens for spaces."""
  root = pathlib.Path(ROOT)
  text = re.sub(r"`[^`]*`", "", (root / name).read_text())  # without code
  links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text)
  assert links
  for path, anchor in links:
    if "://" not in path:
      file = (root / name).parent / path if path else root / name
      assert file.exists(), (name, path)
      if anchor:
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
        anchors = ["#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in anchors, (name, path, anchor)


@pytest.mark.parametrize("name", PAGES)
def test_rows_of_tables_have_the_cells_of_their_headings(name):
  text = re.sub(r"^```.*?^```$", "", (pathlib.Path(ROOT) / name).read_text(), flags=re.M | re.S)
  text = re.sub(r"`[^`\n]*`", "code", text)  # a bar in code separates no cells
  bars = lambda row: len(re.findall(r"(?<!\\)\|", row))
  for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
    heading, rule, *rows = table.splitlines()
    assert rows and re.fullmatch(r"\|(-+\|)+", rule), (name, heading)
    for row in (rule, *rows):
      assert bars(row) == bars(heading), (name, row)


@pytest.mark.extended
def test_long_commands(tmp_path):
  """In a fresh clone and a fresh environment, which they make; all but the tests themselves and plans of pods."""
  assert subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"]).returncode == 0
  folder = tmp_path / "clone"
  commands = [c for c in COMMANDS if "pytest" not in c and "evo_jax.plan" not in c]
  assert "-m venv" in commands[0] and commands[1] == LONG[0]
  for command in commands:
    done = shell(f"PATH=$PWD/.venv/bin:$PATH; {command}", folder, timeout=1800)
    assert done.returncode == 0 and "Traceback" not in done.stderr, (command, done.stdout, done.stderr)
    print(done.stdout[-2000:])


@pytest.mark.extended
def test_plan(tmp_path):
  """By the compiler where there is one, which takes a quarter of an hour; otherwise from shapes alone."""
  (command,) = [c for c in COMMANDS if "evo_jax.plan" in c]
  done = run("evo_jax.plan", *command.split()[3:])
  assert done.returncode == 0 and "HBM" in done.stdout, done.stderr

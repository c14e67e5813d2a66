"""Runs programs that a model wrote: without network, with limits, in a folder that is thrown away.

Each runs in processes of its own (`jail`), which are all killed when it ends or its time is over. It needs Linux 5.12
with user namespaces that any user may make, and nothing else.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
import secrets
import subprocess
import sys
import tempfile

import numpy as np

from evo_jax.benchmarks import jail
from evo_jax.errors import UserError

_JAIL = Path(jail.__file__)


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Limits of a program: seconds on the clock and of a processor, bytes of a process's memory, of a file, and of the
  folder, and the number of processes at once."""

  seconds: float = 10.0
  cpu_seconds: int = 5
  memory_bytes: int = 1 << 30
  file_bytes: int = 1 << 24
  folder_bytes: int = 1 << 26
  processes: int = 8

  def run(self, program: str) -> bool:
    """Whether a program comes to its end without an exception, within the limits. Raises UserError where the machine
    cannot shut it in."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="evo_jax_sandbox_") as folder:
      os.chmod(folder, 0o755)  # what is written lies in memory, above it
      asked = dataclasses.asdict(self) | {"program": program, "token": token, "folder": os.path.realpath(folder)}
      with subprocess.Popen(
        [sys.executable, "-I", _JAIL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
      ) as process:
        try:
          out, problem = process.communicate(json.dumps(asked).encode() + b"\n", timeout=self.seconds)
        except subprocess.TimeoutExpired:
          return False
        finally:
          process.kill()  # and with it, by the kernel, all others
    if not out.startswith(jail.READY):
      reason = problem.decode(errors="replace").strip().splitlines()[-1:] or ["it ends at once"]
      raise UserError(
        f"--run_code: programs cannot be shut in on this machine ({reason[0]}); it takes Linux 5.12 with user "
        "namespaces that any user may make"
      )
    return out == jail.READY + token.encode()

  def check(self) -> None:
    """Raises UserError where the machine cannot shut programs in."""
    if not self.run("pass"):
      raise UserError(
        "--run_code: an empty program did not come to its end; the machine is too slow, or its limits low"
      )


class CodeEval:
  """The metric `code_eval` that the harness's tasks load: programs and their tests, run in a sandbox."""

  def __init__(self, sandbox: Sandbox):
    self._sandbox = sandbox

  def compute(
    self, references: list[str], predictions: list[list[str]], k: list[int] = (1, 10, 100), **_
  ) -> tuple[dict[str, float], dict]:
    """pass@k of programs, several for each test, which is run behind each of them; and by test what each did.

    An unbiased estimate from n programs of which c pass, 1 - C(n - c, k) / C(n, k) (Chen et al., "Evaluating large
    language models trained on code", 2021).
    """
    results = {
      i: [(j, {"passed": self._sandbox.run(f"{program}\n{test}")}) for j, program in enumerate(programs)]
      for i, (test, programs) in enumerate(zip(references, predictions))
    }
    counts = [(len(result), sum(what["passed"] for _, what in result)) for result in results.values()]
    pass_at = {
      f"pass@{number}": float(np.mean([1.0 - math.comb(n - c, number) / math.comb(n, number) for n, c in counts]))
      for number in k
      if all(n >= number for n, _ in counts)
    }
    return pass_at, results

"""The sandbox: whatever a program does, it is wrong, nothing is left of it, and the next one runs."""

import contextlib
import ctypes
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from evo_jax.benchmarks import sandbox as sandbox_lib
from evo_jax.benchmarks.sandbox import CodeEval, Sandbox
from evo_jax.errors import UserError

SANDBOX = Sandbox(seconds=2.0, cpu_seconds=1, memory_bytes=1 << 29, file_bytes=1 << 20, folder_bytes=1 << 22)


@pytest.fixture(scope="module", autouse=True)
def needs_namespaces():
  try:
    SANDBOX.check()
  except UserError as error:
    pytest.skip(str(error))


def runs(program):
  return SANDBOX.run(textwrap.dedent(program))


def test_a_program_that_comes_to_its_end_passes():
  assert runs("assert sorted([2, 1]) == [1, 2]")
  assert runs("import tempfile; open('a', 'w').write('x'); tempfile.NamedTemporaryFile().write(b'x')")
  assert runs("import asyncio; asyncio.run(asyncio.sleep(0))")  # by a pair of sockets
  assert runs("import threading; t = threading.Thread(target=print); t.start(); t.join()")


@pytest.mark.parametrize(
  "program",
  [
    "assert sorted([2, 1]) == [2, 1]",
    "raise SystemExit(0)",
    "import os; os._exit(0)",
    "import os; os._exit(1)",
    "import os; os.closerange(3, 64)",
    "def f(:",
    "print('\\ud800', open)\nimport no_such_module",
  ],
)
def test_one_that_does_not_is_wrong(program):
  assert not runs(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(100)"], ids=["busy", "asleep"])
def test_loops_end(program):
  started = time.monotonic()
  assert not runs(program)
  assert time.monotonic() - started < 10


@pytest.mark.parametrize(
  "program",
  [
    "x = bytearray(1 << 30)",
    "open('a', 'wb').write(bytes(1 << 21))",  # a file that is too large
    "for i in range(9): open(str(i), 'wb').write(bytes(1 << 19))",  # a folder that is too large
    "files = [open(str(i), 'w') for i in range(100)]",
    "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
    "import socket; s = socket.socket(); s.connect(('10.0.0.1', 80))",
    "import os; os.setuid(0)",
    "open('/proc/sys/kernel/hostname', 'w').write('x')",
  ],
)
def test_what_is_limited_fails(program):
  assert not runs(program)


def test_the_network_is_not_that_of_the_machine():
  import socket

  with socket.create_server(("127.0.0.1", 0)) as server:
    assert not runs(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)")
    server.settimeout(0.1)
    with pytest.raises(TimeoutError):
      server.accept()


def test_services_of_the_machine_are_not_spoken_to(tmp_path):
  """Through sockets and named pipes, which lie among the files, whoever may write to them."""
  import socket

  os.mkfifo(tmp_path / "pipe")
  with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
    server.bind(str(tmp_path / "socket"))
    server.listen()
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("socket", "pipe"):
      os.chmod(tmp_path / name, 0o777)
    assert not runs(f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})")
    if _has_landlock():
      assert not runs(f"open({str(tmp_path / 'pipe')!r}, 'w').write('x')")
      assert os.read(reader, 1) == b""
    os.close(reader)


def _has_landlock():
  return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0  # its version


def test_processes_are_few_and_all_of_them_die():
  marker = f"evo_jax_sandbox_test_{os.getpid()}"
  count = """
    import os, time
    n = 0
    try:
      while n < 100:
        if os.fork() == 0:
          time.sleep(100)
        n += 1
    except OSError:
      pass
    assert 3 < n < 10
  """
  assert runs(count)
  stays = f"""
    import ctypes, os, signal, time
    ctypes.CDLL(None).prctl(15, b'{marker[:8]}x{os.getpid() % 10**6}')
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
      signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
      os.setsid()
      if os.fork() == 0:
        time.sleep(100)
      os._exit(0)
    while True:
      time.sleep(1)
  """
  assert not runs(stays)
  deadline = time.monotonic() + 20  # the kernel kills one after another
  while (name := f"{marker[:8]}x{os.getpid() % 10**6}") in running():
    assert time.monotonic() < deadline, name
    time.sleep(0.1)


def running():
  """The names of all processes."""
  names = []
  for path in pathlib.Path("/proc").glob("[0-9]*/comm"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
      names.append(path.read_text().strip())
  return names


def test_other_processes_are_not_seen_and_not_killed():
  assert not runs(f"import os; os.kill({os.getpid()}, 9)")
  assert runs("import os; assert len([name for name in os.listdir('/proc') if name.isdigit()]) <= 2")


def test_files_outside_stay(tmp_path):
  tmp_path.chmod(0o777)
  mine = tmp_path / "mine"
  mine.write_text("kept")
  mine.chmod(0o666)
  for act in (f"open('{mine}', 'w')", f"open('{tmp_path}/new', 'w')", f"import os; os.remove('{mine}')"):
    assert not runs(act)
  again = f"""
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mount(b'none', b'/', None, 32 | 4096, None)
    libc.unshare(0x10000000 | 0x00020000)
    libc.mount(b'none', b'/', None, 32, None)
    open('{mine}', 'w')
  """
  assert not runs(again)
  assert mine.read_text() == "kept" and [*tmp_path.iterdir()] == [mine]


def test_the_folder_is_thrown_away():
  before = {*pathlib.Path("/tmp").glob("evo_jax_sandbox_*")}
  assert runs("open('a', 'w').write('x')") and not runs("open('a', 'w').write('x'); raise SystemExit")
  assert {*pathlib.Path("/tmp").glob("evo_jax_sandbox_*")} <= before


def test_a_program_dies_with_the_evaluation():
  code = "from evo_jax.benchmarks.sandbox import Sandbox; Sandbox(seconds=100, cpu_seconds=100).run({!r})"
  program = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'orphan{os.getpid() % 10**6}'); time.sleep(100)"
  alive = lambda: any(
    f"orphan{os.getpid() % 10**6}" in _name(path) for path in pathlib.Path("/proc").glob("[0-9]*/comm")
  )
  root = pathlib.Path(__file__).parents[1]
  with subprocess.Popen([sys.executable, "-c", code.format(program)], cwd=root) as process:
    try:
      _wait_for(alive)
    finally:
      process.kill()
  _wait_for(lambda: not alive())


def _name(path):
  try:
    return path.read_text()
  except OSError:
    return ""


def _wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_machine_that_cannot_shut_programs_in_is_named(monkeypatch, tmp_path):
  jail = tmp_path / "jail.py"
  jail.write_text("import sys; sys.stdin.read(); sys.exit('unshare: Operation not permitted')")
  monkeypatch.setattr(sandbox_lib, "_JAIL", jail)
  with pytest.raises(UserError, match=r"--run_code: programs cannot be shut in .*unshare: Operation not permitted"):
    SANDBOX.check()


def test_pass_at_k_is_the_unbiased_estimate():
  programs = [["x = 1", "x = 2", "x = 1"], ["x = 2"] * 3]
  found, results = CodeEval(SANDBOX).compute(["assert x == 1"] * 2, programs, k=[1, 2])
  assert found == pytest.approx({"pass@1": (2 / 3 + 0) / 2, "pass@2": (1.0 + 0) / 2})
  assert [what["passed"] for _, what in results[0]] == [True, False, True]

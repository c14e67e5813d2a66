"""The lease of a work directory: one run at a time, on this machine and across machines; what is left by dead ones."""

import json
import os
import subprocess
import sys
import threading
import time

from conftest import LONG, assert_refused, call, train_flags
from etils import epath
import pytest

from evo_jax import run as run_lib
from evo_jax.errors import UserError
from evo_jax.training import lease as lease_lib


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """Times that a test can wait for."""
  for name, seconds in (("RENEWAL", 0.05), ("LEASE", 0.4), ("SETTLING", 0.05), ("POLL", 0.02)):
    monkeypatch.setattr(lease_lib, name, seconds)


def read(folder):
  return json.loads((folder / "lease.json").read_text())


def left(workdir, **changes):
  """A lease as a run of this process would leave it, with changes."""
  with lease_lib.held(epath.Path(workdir)):
    values = read(workdir)
  overwrite(workdir, values | {"token": "another"} | changes)


def overwrite(folder, values):
  """At once: who reads meanwhile finds the old lease or the new one, never an empty file."""
  new = folder / "new"
  new.write_text(json.dumps(values) + "\n")
  new.replace(folder / "lease.json")


def dead():
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def takes(folder):
  with lease_lib.held(epath.Path(folder)):
    assert read(folder)["pid"] == os.getpid() and read(folder)["token"] != "another"
  assert not (folder / "lease.json").exists()


@pytest.mark.parametrize(
  "changes, line",
  [
    (lambda: {"pid": dead()}, "which is gone"),
    (lambda: {"began": "1"}, "which is gone"),  # its number is another process's now
    (lambda: {"folder": "1:1"}, "of which this folder is a copy"),
    (lambda: {"host": "elsewhere"}, "which gave no sign for 0.4 s"),
    (lambda: {"boot": "another"}, "which gave no sign for 0.4 s"),
    (lambda: {"process_ids": "pid:[1]", "pid": dead()}, "which gave no sign for 0.4 s"),  # another container's
    (lambda: {"pid": "1"}, "another run, which gave no sign"),  # of another version
  ],
  ids=["dead", "number used again", "copied folder", "other host", "other boot", "other container", "foreign"],
)
def test_what_a_run_leaves_is_taken_over(tmp_path, capsys, changes, line):
  left(tmp_path, **changes())
  takes(tmp_path)
  assert line in capsys.readouterr().out


def test_a_killed_process_that_nobody_waits_for_is_dead(tmp_path, capsys):
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
  with open(f"/proc/{process.pid}/stat") as file:
    left(tmp_path, pid=process.pid, began=file.read().rpartition(")")[2].split()[19])
  with pytest.raises(UserError, match=f"is in use by process {process.pid} on "):
    takes(tmp_path)
  process.kill()
  time.sleep(0.2)
  takes(tmp_path)
  assert "which is gone" in capsys.readouterr().out
  process.communicate()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3"], ids=repr)
def test_a_damaged_lease_is_watched_and_taken_over(tmp_path, capsys, content):
  (tmp_path / "lease.json").write_bytes(content)
  takes(tmp_path)
  out = capsys.readouterr().out.splitlines()
  assert len(out) == 2 and "was held by another run; 0.4 s will show" in out[0] and "gave no sign" in out[1]


def test_another_machine_that_renews_is_not_disturbed(tmp_path, capsys):
  """Whatever its clock says: only changes count."""
  left(tmp_path, host="elsewhere", since="1970-01-01 00:00:00 UTC")
  foreign = read(tmp_path)
  threading.Timer(0.2, overwrite, (tmp_path, foreign | {"renewals": "2"})).start()
  with pytest.raises(UserError, match=r"is in use by process \d+ on elsewhere \(since 1970"):
    takes(tmp_path)
  assert "0.4 s will show" in capsys.readouterr().out and read(tmp_path)["token"] == "another"


@pytest.mark.parametrize("local", [True, False], ids=["folder", "bucket"])
@pytest.mark.parametrize("before", [{}, {"began": "1"}, {"host": "elsewhere"}], ids=["free", "dead", "stale"])
def test_of_several_at_the_same_time_one_wins(tmp_path, monkeypatch, before, local):
  monkeypatch.setattr(lease_lib.files, "is_local", lambda folder: local)
  if not local:  # a busy machine may stop a thread between reading and writing for as long as others settle
    monkeypatch.setattr(lease_lib, "SETTLING", 0.5)
    monkeypatch.setattr(lease_lib, "LEASE", 1.0)
  for round in range(2 if local else 1):
    folder = tmp_path / str(round)
    folder.mkdir()
    if before:
      left(folder, **before)
    held, refused, barrier = [], [], threading.Barrier(8)

    def start():
      try:
        barrier.wait()
        with lease_lib.held(epath.Path(folder)) as lease:
          time.sleep(4 * lease_lib.RENEWAL)
          lease.check()
          held.append(lease)
          time.sleep(2 * lease_lib.SETTLING)
      except UserError as error:
        refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(held) == 1 and len(refused) == 7, refused
    assert all("is in use by" in text for text in refused), refused  # by another run: while that writes its name


@pytest.mark.parametrize("asleep", [False, True])
def test_a_run_whose_lease_was_taken_over_stops(tmp_path, monkeypatch, asleep):
  """At its next renewal, or, where it did not move for long, before its next step. The other's lease stays."""
  if asleep:
    monkeypatch.setattr(lease_lib, "RENEWAL", 100.0)
  with lease_lib.held(epath.Path(tmp_path)) as lease:
    lease.check()
    time.sleep(0.1)
    lease.check()
    overwrite(tmp_path, read(tmp_path) | {"token": "another", "host": "elsewhere"})
    time.sleep(0.3)
    with pytest.raises(UserError, match="was taken over by process .* on elsewhere .*; this run stops"):
      lease.check()
  assert read(tmp_path)["token"] == "another"


def test_a_lost_lease_is_written_again(tmp_path):
  """Someone tidied up, or a disk failed: the run goes on, and holds the folder again."""
  with lease_lib.held(epath.Path(tmp_path)) as lease:
    for damage in ((tmp_path / "lease.json").unlink, lambda: (tmp_path / "lease.json").write_text("")):
      damage()
      time.sleep(0.2)
      lease.check()
      assert read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/no/such/place")])
def test_a_lease_that_is_no_file_is_named(tmp_path, make):
  make(tmp_path / "lease.json")
  with pytest.raises(UserError, match="lease.json: cannot be read"):
    takes(tmp_path)


def test_a_second_command_is_refused_and_readers_are_not(trained, text, tmp_path):
  for path in trained.iterdir():
    (tmp_path / path.name).symlink_to(path)
  with lease_lib.held(epath.Path(tmp_path)):
    refusal = f"is in use by process {os.getpid()} on "
    assert_refused(call("evo_jax.main", *train_flags(tmp_path, "/no/text*", **LONG)), refusal)  # before any text
    assert run_lib.load_run(str(tmp_path)).step == 120


def test_a_command_that_loses_its_lease_writes_nothing_more(text, tmp_path):
  workdir = tmp_path / "a[1], \u00e9"  # a name with whatever names may have

  ended = threading.Event()

  def take_over():
    while not (workdir / "config.json").exists():
      time.sleep(0.005)
    other = read(workdir) | {"token": "another", "host": "elsewhere"}
    while not ended.wait(0.02):  # renews it: the run may be in the middle of a renewal of its own
      overwrite(workdir, other)

  thread = threading.Thread(target=take_over)
  thread.start()
  done = call("evo_jax.main", *train_flags(workdir, text))
  ended.set()
  thread.join()
  assert_refused(done, f"{workdir}: was taken over by process {os.getpid()} on elsewhere")
  assert sorted(p.name for p in workdir.iterdir()) == ["checkpoints", "config.json", "lease.json", "metrics.jsonl"]
  assert not list((workdir / "checkpoints").iterdir()) and not (workdir / "metrics.jsonl").read_text()

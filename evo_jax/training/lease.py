"""The lease of a folder, as a work directory: at most one run writes there, whichever machine it is on.

`lease.json` names the run that holds the folder, and changes with every renewal. A run that finds another's lease asks
the operating system whether that run is alive, where it can (same machine, same process ids); elsewhere it watches
whether the file changes, so that no clocks are compared. The lease of a run that is gone is taken over. The newest
lease counts: a run whose lease was taken over, since it did not move for too long, finds that out and stops.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import platform
import threading
import time
from typing import Any
import uuid

from etils import epath
import numpy as np

from evo_jax.errors import UserError
from evo_jax.parallel import distributed
from evo_jax.training import files

FILE = "lease.json"
RENEWAL = 10.0  # seconds between renewals
LEASE = 60.0  # seconds without a renewal after which a lease may be taken over
SETTLING = 3.0  # seconds after which a lease that may have been written by two at once is read again
POLL = 1.0  # seconds between two looks at another's lease


@contextlib.contextmanager
def held(folder: epath.Path, flag: str = "workdir") -> Iterator["Lease"]:
  """Holds the lease of an existing folder while the block runs; of several processes number 0 does so for all.

  flag: that names the folder. Raises UserError where another run holds it, or the folder cannot be written.
  """
  lease = Lease(folder, flag)
  try:
    while not _agreed(lease):
      time.sleep(POLL)
    yield lease
  finally:
    lease.release()


class Lease:
  """The lease of one folder; held once `attempt` has returned True, until `release`."""

  def __init__(self, folder: epath.Path, flag: str = "workdir"):
    self.folder, self._flag = folder, flag
    self._path = folder / FILE
    self._local = files.is_local(folder)
    self._me = _this_process() | {"folder": _identity(folder) if self._local else ""}
    self._renewals, self._late = 0, 0
    self._watched, self._since = None, 0.0  # another's lease that may be stale, and when it was first read
    self._problem = ""  # why it is not this run's any more
    self._tried = None  # when a renewal was last tried; None: not held
    self._lock, self._ends = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._renew_until_released, daemon=True)

  def attempt(self) -> tuple[bool, str]:
    """Tries to take the lease: (whether it is held now, a line for the user or ""). To be called until it is.

    Raises UserError where another run holds it, or it cannot be read or written.
    """
    try:
      with _excluding(self.folder, self._local) as excluding:
        found = self._read()
        takes, line, certain = (True, "", self._local) if found is None else self._judge(found)
        if not takes:
          return False, line
        if found is None and self._local:
          self._create()
        else:
          self._write()
      if not (certain and excluding):
        time.sleep(SETTLING)
        if self._token(found := self._read()) != self._me["token"]:
          raise UserError(self._in_use(found))
    except FileExistsError as error:  # another was faster, and is looked at in the next attempt
      self._late += 1
      if self._late > 10:
        raise UserError(f"{self._path}: cannot be read") from error
      return False, ""
    except OSError as error:
      raise UserError(f"{self._path}: cannot be read or written: {error.strerror or error}") from error
    self._tried = _now()
    self._thread.start()
    return True, line

  def check(self) -> None:
    """Raises UserError if another run has taken over. Asks no file system while renewals go well."""
    if self._tried is not None and _now() - self._tried > LEASE / 2:
      self._renew()  # the machine was asleep, or the process stopped
    if self._problem:
      raise UserError(self._problem)

  def release(self) -> None:
    """Ends the renewals, and removes the lease if it is this run's."""
    self._ends.set()
    if self._thread.is_alive():
      self._thread.join(RENEWAL)  # not for ever: its file system may be gone
    self._tried = None
    with contextlib.suppress(OSError):
      if self._token(self._read()) == self._me["token"]:
        self._path.unlink()

  def _judge(self, found: bytes) -> tuple[bool, str, bool]:
    """(whether another's lease may be taken over, a line for the user, whether nobody elsewhere can do so, too)."""
    other, name = _parse(found), _name(found)
    if other and _knows(self._me, other) and (alive := _is_alive(other)) is not None:
      if alive and other["folder"] == self._me["folder"]:
        raise UserError(self._in_use(found))
      why = "of which this folder is a copy" if alive else "which is gone"
      return True, f"{self.folder}: is taken over from {name}, {why}", True
    if self._watched is None:
      self._watched, self._since = found, _now()
      return False, f"{self.folder}: was held by {name}; {LEASE:g} s will show whether that still runs", False
    if found != self._watched:
      raise UserError(self._in_use(found))
    if _now() - self._since < LEASE:
      return False, "", False
    return True, f"{self.folder}: is taken over from {name}, which gave no sign for {LEASE:g} s", False

  def _in_use(self, found: bytes | None) -> str:
    return f"{self.folder}: is in use by {_name(found)}; stop that run, or use another --{self._flag}"

  def _renew_until_released(self) -> None:
    while not self._ends.wait(RENEWAL):
      self._renew()

  def _renew(self) -> None:
    with self._lock:
      self._tried = _now()
      if self._problem or self._ends.is_set():
        return
      with contextlib.suppress(OSError):  # the file system may answer next time
        found = self._read()
        if found is None:
          self._create()
        elif self._token(found) in ("", self._me["token"]):
          self._write()
        else:
          self._problem = f"{self.folder}: was taken over by {_name(found)}; this run stops and writes nothing more"

  def _token(self, found: bytes | None) -> str:
    return _parse(found or b"").get("token", "")

  def _read(self) -> bytes | None:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return None

  def _create(self) -> None:
    """Writes a new file. Raises FileExistsError where there is one."""
    if not self._local:
      self._path.write_bytes(self._text())
      return
    with open(self._path, "xb") as file:
      try:
        file.write(self._text())
        file.flush()
      except OSError:
        self._path.unlink()
        raise

  def _write(self) -> None:
    """Overwrites what is there: in place, so that it takes no room on a full disk."""
    if not self._local:
      self._path.write_bytes(self._text())
      return
    with open(self._path, "r+b") as file:
      file.write(self._text())
      file.truncate()

  def _text(self) -> bytes:
    """Differs from time to time, but not in length."""
    self._renewals += 1
    return json.dumps(self._me | {"renewals": f"{self._renewals:09d}"}).encode() + b"\n"


def _agreed(lease: Lease) -> bool:
  """Whether process 0 holds the lease now; the same in all processes. Raises UserError in all if in process 0."""

  def attempt() -> np.ndarray:
    held, line = lease.attempt()
    if line:
      print(line, flush=True)
    return np.array(held)

  return bool(distributed.in_first_process(attempt, np.array(False), f"{lease.folder}: process 0 may not write there"))


@contextlib.contextmanager
def _excluding(folder: epath.Path, local: bool) -> Iterator[bool]:
  """Excludes other processes of this machine; gives whether it does: not all file systems have locks."""
  if not local:
    yield False
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
      yield False
    else:
      yield True
  finally:
    os.close(descriptor)


def _now() -> float:
  """Seconds that go on while the machine is asleep, where the system counts those."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _this_process() -> dict[str, Any]:
  """Who holds a lease. began: in the kernel's ticks, which together with `pid` no other process of a boot has."""
  known = dict.fromkeys(("boot", "process_ids", "began"), "")
  with contextlib.suppress(OSError):  # systems without /proc
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = {"boot": boot, "process_ids": os.readlink("/proc/self/ns/pid"), "began": _stat(os.getpid())[1]}
  since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
  return {"host": platform.node(), "pid": os.getpid(), "since": since, "token": uuid.uuid4().hex, **known}


def _stat(pid: int) -> tuple[str, str]:
  """The state of a process, as R or Z, and when it began."""
  fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
  return fields[0], fields[19]


def _knows(me: dict[str, Any], other: dict[str, Any]) -> bool:
  """Whether the other's process id means a process here."""
  return all(me[name] and me[name] == other[name] for name in ("host", "boot", "process_ids"))


def _is_alive(other: dict[str, Any]) -> bool | None:
  """Whether a process of this machine runs; None where that cannot be found out."""
  try:
    os.kill(other["pid"], 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # another user's
  try:
    state, began = _stat(other["pid"])
  except OSError:
    return None
  return state not in "ZX" and began == other["began"]


def _parse(found: bytes) -> dict[str, Any]:
  """A lease's fields; {} where it is damaged."""
  try:
    values = json.loads(found)
    texts = ("host", "since", "token", "boot", "process_ids", "began", "folder")
    well = isinstance(values["pid"], int) and 0 < values["pid"] < 2**31
    return values if well and all(isinstance(values[name], str) for name in texts) else {}
  except (ValueError, KeyError, TypeError, RecursionError):
    return {}


def _name(found: bytes | None) -> str:
  other = _parse(found or b"")
  return f"process {other['pid']} on {other['host']} (since {other['since']})" if other else "another run"


def _identity(folder: epath.Path) -> str:
  """What a folder keeps where it is renamed, and a copy does not share."""
  status = os.stat(folder)
  return f"{status.st_dev}:{status.st_ino}"

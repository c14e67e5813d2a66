"""What runs a program of a model in `sandbox`: a script of its own, which needs no package, on Linux.

It takes namespaces of its own, for users, processes, mounts, the network, and communication between processes: there is
no network, no process but its own can be seen, and no file can be written but in a folder in memory. Sockets of
services lie among the files: none can be made that connects to them, and where the kernel has Landlock no named pipe
can be written to either. The program then runs with limits and without capabilities; where it is root's, as a user who
can read root's files, since the number of root's processes has no limit. The first process of the process namespace
takes all others there with it when it ends, and it ends with the script, as the script with whoever started it.

The script reads a line of JSON from standard input (`sandbox.Sandbox`). It writes READY when all is shut, before the
program, which may end with any status; and its "token" when that has come to its end without an exception.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

READY = b"ready "
_LIBC = ctypes.CDLL(None, use_errno=True)
_NOBODY = 65534
_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # USER NS PID NET IPC UTS
_PDEATHSIG, _KEEPCAPS, _SECCOMP, _NO_NEW_PRIVS = 1, 8, 22, 38  # options of prctl
_WRITE_FILE = 1 << 1  # what Landlock calls opening for writing
_READS_ALL = 1 << 2  # CAP_DAC_READ_SEARCH
_READ_ONLY, _NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 1, 2, 4, 0x4000, 0x40000  # flags of mount


def main() -> None:
  asked = json.loads(sys.stdin.readline())
  _die_with_parent()
  entered, mapped = os.pipe(), os.pipe()
  inside = os.fork()
  if inside == 0:
    os._exit(_report(lambda: _inside(asked, entered[1], mapped[0])))
  os.close(entered[1])
  if os.read(entered[0], 1):
    _map_users(inside)
    os.write(mapped[1], b"1")
  sys.exit(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]))


def _inside(asked: dict, entered: int, mapped: int) -> None:
  """Enters the namespaces, and starts what is to run there."""
  _die_with_parent()
  _call(_LIBC.unshare, _NAMESPACES)
  os.write(entered, b"1")
  os.read(mapped, 1)
  _close_files(asked["folder"], asked["folder_bytes"])
  first = os.fork()
  if first == 0:
    os._exit(_report(lambda: _first_process(asked)))
  if os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) > 0:
    os._exit(1)


def _first_process(asked: dict) -> None:
  """The first of the process namespace: waits for the program's."""
  _die_with_parent()
  flags = _READ_ONLY | _NO_SUID | _NO_DEVICES
  try:
    _mount("proc", "/proc", "proc", flags)
  except OSError:  # in a container that hides parts of it
    _mount("tmpfs", "/proc", "tmpfs", flags)
  program = os.fork()
  if program == 0:
    os._exit(_report(lambda: _run(asked)))
  while (ended := os.wait())[0] != program:  # children whose parents are gone come here
    pass
  if os.waitstatus_to_exitcode(ended[1]) == 1:
    os._exit(1)


def _run(asked: dict) -> None:
  os.setsid()
  os.chdir(asked["folder"])
  os.environ.update(HOME=asked["folder"], TMPDIR=asked["folder"], OPENBLAS_NUM_THREADS="1")
  _become_nobody()
  limits = {
    resource.RLIMIT_CPU: asked["cpu_seconds"],
    resource.RLIMIT_AS: asked["memory_bytes"],
    resource.RLIMIT_FSIZE: asked["file_bytes"],
    resource.RLIMIT_NPROC: asked["processes"] + (2 if os.getuid() != _NOBODY else 0),  # with those that lead here
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
  }
  for limit, value in limits.items():
    resource.setrlimit(limit, (value, value))
  _refuse_sockets()
  _write_only(asked["folder"])
  out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
  for number in range(3):
    os.dup2(null, number)
  pid = os.getpid()
  os.write(out, READY)
  try:
    exec(compile(asked["program"], "<program>", "exec"), {})
  except BaseException:  # also SystemExit: the program has not come to its end
    os._exit(0)
  if os.getpid() == pid:
    os.write(out, asked["token"].encode())


def _report(body) -> int:
  """The exit status of a process: 1, with a line on standard error, where the namespaces or limits cannot be had."""
  try:
    body()
  except OSError as error:
    sys.stderr.write(f"{error.strerror or error}\n")
    return 1
  return 0


def _die_with_parent() -> None:
  _call(_LIBC.prctl, _PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _map_users(pid: int) -> None:
  """Root is root in the namespaces, too, beside nobody; any other user is itself."""
  user, group = os.geteuid(), os.getegid()
  nobody = f"\n{_NOBODY} {_NOBODY} 1" if user == 0 else ""
  if user:
    _write(f"/proc/{pid}/setgroups", "deny")
  _write(f"/proc/{pid}/uid_map", f"{user} {user} 1{nobody}")
  _write(f"/proc/{pid}/gid_map", f"{group} {group} 1{nobody}")


def _become_nobody() -> None:
  """Gives up what the first user of a user namespace may do; root stays able to read files."""
  kept = 0
  if os.getuid() == 0:
    kept = _READS_ALL
    _call(_LIBC.prctl, _KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
  _call(_LIBC.prctl, _NO_NEW_PRIVS, 1, 0, 0, 0)
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  _call(_LIBC.capset, header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0))


def _refuse_sockets() -> None:
  """Refuses to make sockets by which a program speaks to others through the file system (AF_UNIX), and io_uring, which
  would make them unseen. Pairs of sockets can be made."""
  machines = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
  machine = os.uname().machine
  if machine not in machines:
    raise OSError(0, f"seccomp is not set up for {machine}")
  architecture, socket = machines[machine]
  load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # of classic BPF
  refused, allowed, killed = 0x00050000 | 13, 0x7FFF0000, 0x80000000  # EACCES
  program = [
    (load, 0, 0, 4),  # the architecture
    (equal, 1, 0, architecture),
    (give, 0, 0, killed),
    (load, 0, 0, 0),  # the call's number
    (at_least, 5, 0, 0x40000000),  # of another interface of the same kernel
    (equal, 4, 0, 425),  # io_uring_setup
    (equal, 0, 2, socket),
    (load, 0, 0, 16),  # its first argument
    (equal, 1, 0, 1),  # AF_UNIX
    (give, 0, 0, allowed),
    (give, 0, 0, refused),
  ]
  code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
  filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
  _call(_LIBC.prctl, _SECCOMP, 2, filter_, 0, 0)


def _write_only(folder: str) -> None:
  """Refuses to open anything for writing outside of a folder but /dev/null, by Landlock, where the kernel has it."""
  create, add, restrict = 444, 445, 446
  ruleset = _LIBC.syscall(create, (ctypes.c_uint64 * 1)(_WRITE_FILE), ctypes.c_size_t(8), 0)
  if ruleset < 0:
    return
  for path in (folder, os.devnull):
    place = os.open(path, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", _WRITE_FILE, place))
    _call(_LIBC.syscall, add, ruleset, 1, rule, 0)
    os.close(place)
  _call(_LIBC.syscall, restrict, ruleset, 0)
  os.close(ruleset)


def _close_files(folder: str, size: int) -> None:
  """All mounts become read-only, but for a new folder in memory; sockets of services are hidden."""
  _mount("none", "/", None, _RECURSIVE | _PRIVATE)
  attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
  _call(_LIBC.syscall, 442, -100, b"/", 0x8000, attributes, ctypes.c_size_t(32))  # mount_setattr, recursively
  for hidden in ("/run", "/var/run"):
    if os.path.isdir(hidden) and not os.path.islink(hidden) and not folder.startswith(hidden):
      _mount("tmpfs", hidden, "tmpfs", _READ_ONLY)
  _mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEVICES, f"size={size},mode=0777")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
  kind = None if kind is None else kind.encode()
  _call(_LIBC.mount, source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data.encode())


def _write(path: str, text: str) -> None:
  with open(path, "w") as file:
    file.write(text)


def _call(function, *args) -> None:
  if function(*args) < 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
  sys.exit(_report(main))

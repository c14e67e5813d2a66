"""Exact copies of documents: found by hash, in files on disk, in a fixed amount of memory, by any number of hosts.

First each host writes the hashes of its groups' documents, sorted, in runs. Then each takes parts of all hashes (those
whose first bits have some value) from all runs, and writes where the copies stand: all of each document but the first
in file order. Behind each step hosts wait for each other, by looking for what the others write. What is compared is
named by all files as they were hashed: where one has changed since, or another was added, all is compared again.
"""

import hashlib
import json
import sys
import time
from typing import NamedTuple

import numpy as np

from evo_jax.data import encoding, items
from evo_jax.data.passes import Passes
from evo_jax.data.plan import WORK, Group, Plan
from evo_jax.data.storage import Folder
from evo_jax.errors import UserError

_RUN = 1 << 18  # hashes
_PART = 1 << 28  # bytes of files whose hashes are compared at a time
_ITEM = 1 << 24  # more than the documents of an item
_HASHES, _COPIES = f"{WORK}/hashes", f"{WORK}/copies"
_HASH = np.dtype([("high", ">u8"), ("low", ">u8"), ("group", "<u4"), ("place", "<u8")])
_PLACE = np.dtype([("group", "<u4"), ("place", "<u8")])


class Copies(NamedTuple):
  """Copies in a group. places: (n,), sorted: number of the item * 2^24 + number among its good documents."""

  places: np.ndarray

  def of(self, item: int) -> frozenset[int]:
    """The numbers of those in an item."""
    start, stop = np.searchsorted(self.places, [item * _ITEM, (item + 1) * _ITEM])
    return frozenset((self.places[start:stop] - item * _ITEM).tolist())


NONE = Copies(np.zeros(0, np.int64))


def find(passes: Passes, folder: Folder, plan: Plan, mine: list[Group], hosts: int, host: int) -> str:
  """Writes down where copies stand; returns, when all hosts have, a name of what was compared: all files as they were.
  mine: the groups of this host."""
  parts = 1 + plan.size // _PART
  for group in mine:
    if _is_stale(folder, group):
      folder.remove(_marker(group))  # before others take it for what the files hold now
  passes.each(mine, lambda group: _hash_group(passes, folder, group, parts))
  _wait(folder, _HASHES, [_marker(group) for group in plan.groups], "groups of files")
  compared = _compared(folder, plan)
  for part in range(host, parts, hosts):
    if not folder.exists(_copies(part, compared)):
      _compare(folder, plan, part, parts, compared)
  _wait(folder, _COPIES, [_copies(part, compared) for part in range(parts)], "parts of the comparison")
  return compared


def read(folder: Folder, group: Group, compared: str) -> Copies:
  """The copies in a group. compared: what `find` gave. Raises UserError where its files have changed since."""
  if _is_stale(folder, group):
    raise UserError(f"{group.files[0]}: or a file after it has changed; start the same command again")
  found = [np.zeros(0, np.int64)]
  for name in folder.names(_COPIES):
    if not name.rsplit("/", 1)[1].startswith(f"{compared}-"):  # of other files, or an attempt that was killed
      continue
    count = int(_read(folder, name, "<u8", 0, 1)[0])
    start, stop = _read(folder, name, "<u8", 1 + group.number, 2)
    found.append(_read(folder, name, _PLACE, start, stop - start, 8 * (count + 2))["place"].astype(np.int64))
  return Copies(np.sort(np.concatenate(found)))


def _is_stale(folder: Folder, group: Group) -> bool:
  """Whether a group was hashed before its files changed."""
  try:
    return json.loads(folder.read(_marker(group)))["versions"] != group.versions()
  except FileNotFoundError:
    return False


def _compared(folder: Folder, plan: Plan) -> str:
  """Names all files as they were hashed."""
  markers = folder.read_all(sorted(_marker(group) for group in plan.groups))
  return hashlib.sha256(b"\0".join(markers)).hexdigest()[:16]


def _hash_group(passes: Passes, folder: Folder, group: Group, parts: int) -> None:
  versions, runs, waiting = group.versions(), 0, []
  if folder.exists(_marker(group)):
    passes.skip(group)
    return

  def submit(item: items.Item):
    return None if item.part else passes.submit(encoding.hash_documents, item.blocks)

  for item, digests in passes.results(passes.read(group), submit):
    if item.part is not None:
      good = item.part.last and item.part.text_bytes and not item.part.problem
      digests = [item.part.digest] if good else []
    waiting += [(digest, item.number * _ITEM + i) for i, digest in enumerate(digests)]
    if len(waiting) >= _RUN:
      _write_run(folder, group, runs, waiting, parts)
      runs, waiting = runs + 1, []
  _write_run(folder, group, runs, waiting, parts)
  folder.write_all(_marker(group), json.dumps({"versions": versions, "runs": runs + 1}).encode())


def _write_run(folder: Folder, group: Group, number: int, found: list[tuple[bytes, int]], parts: int) -> None:
  """Where the hashes of each part begin, and all hashes, sorted."""
  hashes = np.zeros(len(found), _HASH)
  numbers = np.frombuffer(b"".join(digest for digest, _ in found), ">u8").reshape(-1, 2)
  hashes["high"], hashes["low"] = numbers.T
  hashes["group"], hashes["place"] = group.number, [place for _, place in found]
  hashes = hashes[np.argsort(hashes["high"], kind="stable")]
  part = ((hashes["high"].astype(np.uint64) >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)
  starts = np.searchsorted(part, np.arange(parts + 1, dtype=np.uint64))
  folder.write_all(_run(group, number), starts.astype("<u8").tobytes() + hashes.tobytes())


def _compare(folder: Folder, plan: Plan, part: int, parts: int, compared: str) -> None:
  """Writes, of a part of all hashes, where copies stand in each group."""
  found = [np.zeros(0, _HASH)]
  for group in plan.groups:
    for number in range(json.loads(folder.read(_marker(group)))["runs"]):
      name = _run(group, number)
      start, stop = _read(folder, name, "<u8", part, 2)
      found.append(_read(folder, name, _HASH, start, stop - start, 8 * (parts + 1)))
  hashes = np.concatenate(found)
  hashes = hashes[np.lexsort((hashes["place"], hashes["group"], hashes["low"], hashes["high"]))]
  same = (hashes["high"][1:] == hashes["high"][:-1]) & (hashes["low"][1:] == hashes["low"][:-1])
  hashes = hashes[1:][same]
  hashes = hashes[np.lexsort((hashes["place"], hashes["group"]))]
  copies = np.zeros(len(hashes), _PLACE)
  copies["group"], copies["place"] = hashes["group"], hashes["place"]
  count = len(plan.groups)
  header = np.concatenate([[count], np.searchsorted(copies["group"], np.arange(count + 1))]).astype("<u8")
  folder.write_all(_copies(part, compared), header.tobytes() + copies.tobytes())


def _read(folder: Folder, name: str, dtype, start: int, count: int, offset: int = 0) -> np.ndarray:
  """`count` numbers or records from number `start` on, behind `offset` bytes."""
  size = np.dtype(dtype).itemsize
  start, count = int(start), int(count)
  raw = folder.read_range(name, offset + start * size, offset + (start + count) * size) if count else b""
  return np.frombuffer(raw, dtype)


def _wait(folder: Folder, below: str, wanted: list[str], what: str) -> None:
  """Waits until other hosts have written files, and says so."""
  seconds = 0
  while missing := set(wanted) - set(folder.names(below)):
    if seconds % 60 == 0:
      print(
        f"evo_jax: waiting for other hosts, for {len(missing)} of {len(wanted)} {what}", file=sys.stderr, flush=True
      )
    time.sleep(1)
    seconds += 1


def _marker(group: Group) -> str:
  return f"{_HASHES}/{group.name}.json"


def _run(group: Group, number: int) -> str:
  return f"{_HASHES}/{group.name}-{number:05d}"


def _copies(part: int, compared: str) -> str:
  return f"{_COPIES}/{compared}-{part:05d}"

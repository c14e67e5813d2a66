"""The plan of a preparation: sources, which of their text is held out, and groups of files that hosts share."""

from collections.abc import Mapping
from concurrent import futures
import dataclasses
import os

from evo_jax.data import blocks as blocks_lib
from evo_jax.data import documents as documents_lib
from evo_jax.data import files as files_lib
from evo_jax.data import formats
from evo_jax.data.conversations import MESSAGES
from evo_jax.errors import UserError

GROUP = 1 << 28  # bytes of files, as they stand
FEW = 100  # documents: of less, chance could hold out none
WORK = ".work"  # folder of records, in the output
_FLAGS = {"valid": "--valid", "test": "--test", "train": "--input"}
_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be prepared; the fields are flags of evo_jax.prepare. Shares are of documents, between 0 and 1."""

  input: str
  valid: str = ""
  test: str = ""
  field: str = documents_lib.FIELD
  valid_share: float = 0.05
  test_share: float = 0.05
  max_skipped: float = documents_lib.BAD_SHARE
  deduplicate: bool = False
  chat: str = ""  # what answers are, of conversations; "": documents are text

  @property
  def read_field(self) -> str:
    """The field or column that documents are read from."""
    return MESSAGES if self.chat else self.field

  def __post_init__(self):
    for name in ("valid_share", "test_share", "max_skipped"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f"--{name}={getattr(self, name)}: is not between 0 and 1")
    if self.valid_share + self.test_share >= 1:
      raise UserError(f"--valid_share={self.valid_share}: with --test_share={self.test_share} nothing is left to train")
    if self.chat and self.field != documents_lib.FIELD:
      raise UserError(f"--field={self.field}: is for text; with --chat lines have messages, or prompt and completion")


@dataclasses.dataclass(frozen=True)
class Group:
  """Files that one host prepares. number: among all groups, in file order. place: among those of its source."""

  number: int
  source: int
  place: int
  files: tuple[str, ...]
  sizes: tuple[int, ...]
  rule: str  # of held-out text; see `encoding.Encoder.ranges`

  @property
  def name(self) -> str:
    return f"{self.source:03d}-{self.place:05d}"

  @property
  def size(self) -> int:
    return sum(self.sizes)

  def versions(self) -> list[str]:
    """Names what the files hold now. Raises UserError where one cannot be read."""
    return [formats.version_of(file) for file in self.files]


@dataclasses.dataclass(frozen=True)
class Plan:
  """names: of the sources. groups: of all sources, in file order, held-out files first."""

  names: tuple[str, ...]
  groups: tuple[Group, ...]

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(group.size for group in self.groups)

  def share(self, hosts: int, host: int) -> list[Group]:
    """The groups of one of several hosts: the largest first, each to the host that has least to do."""
    loads, mine = [0] * hosts, []
    for group in sorted(self.groups, key=lambda group: (-group.size, group.number)):
      least = loads.index(min(loads))
      loads[least] += max(1, group.size)
      mine += [group] if least == host else []
    return sorted(mine, key=lambda group: group.number)


def make_plan(job: Job, binary: bool, output: str, fields: Mapping[str, str] = _FLAGS) -> Plan:
  """What the files are, and how they are divided. Raises UserError where there are none, or some cannot be read.

  What lies in the folder `output` is no input. fields: that name the files of each split in errors.
  """
  names, groups, seen = [], [], set()
  for split, patterns in (("valid", job.valid), ("test", job.test), ("train", job.input)):
    for name, files in files_lib.find_sources(patterns, fields[split], seen) if patterns or split == "train" else ():
      files = [file for file in files if not _is_in(file, output)]
      if not files:
        raise UserError(f"{fields[split]}: all files of {name} are in --output={output}")
      if job.chat:
        _check_lines(files, fields[split])
      rule = split
      if split == "train" and not job.valid and not job.test and job.valid_share + job.test_share:
        rule = "end" if not job.chat and _has_few(files, job.field, binary) else "hash"
      groups += _groups(len(groups), len(names), files, rule)
      names.append(name)
  return Plan(tuple(names), tuple(groups))


def _check_lines(files: list[str], field: str) -> None:
  """Raises UserError for a file that can hold no conversations."""
  for file in files:
    if formats.suffix_of(file)[0] not in formats.LINES:
      raise UserError(
        f"{field}: {formats.shown(file)} has no lines of JSON ({', '.join(formats.LINES)}), as chat needs"
      )


def _is_in(file: str, folder: str) -> bool:
  if "://" in file or "://" in folder:
    return file.startswith(folder.rstrip("/") + "/")
  return os.path.abspath(file).startswith(os.path.abspath(os.path.expanduser(folder)) + os.sep)


def _groups(number: int, source: int, files: list[str], rule: str) -> list[Group]:
  groups, waiting, size = [], [], 0
  with futures.ThreadPoolExecutor(_THREADS) as threads:  # a bucket is asked for each
    sizes = list(threads.map(formats.size_of, files))
  for i, (file, file_size) in enumerate(zip(files, sizes)):
    waiting.append((file, file_size))
    size += file_size
    if size >= GROUP or i == len(files) - 1:
      groups.append(Group(number + len(groups), source, len(groups), *zip(*waiting), rule))
      waiting, size = [], 0
  return groups


def _has_few(files: list[str], field: str, binary: bool) -> bool:
  """Whether files have less than FEW documents, good or bad, read no further than that."""
  count = 0
  for file in files:
    if formats.suffix_of(file)[0] not in (*formats.LINES, formats.ROWS):
      count += 1
    else:
      for block in blocks_lib.read_blocks(file, field, binary):
        whole = block.begins and block.ends
        count += sum(1 for _ in documents_lib.documents_of(block, field, binary)) if whole else block.ends
        if count >= FEW:
          break
    if count >= FEW:
      return False
  return True

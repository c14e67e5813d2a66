"""Items of work: the blocks of several files in order, cut and put together so that each takes about the same time.

An item is a list of blocks with whole documents, or a part of a long document. Items depend on the files alone.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools

from evo_jax.data import blocks as blocks_lib
from evo_jax.data import encoding
from evo_jax.data.blocks import Block
from evo_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a long document. last: the document ends behind it; then the rest describes the document.

  problem: why it cannot be used. digest: hash of its content. text_bytes: of it.
  """

  file: str
  text: str | bytes
  begins: bool
  last: bool = False
  line: int = 0
  problem: str = ""
  digest: bytes = b""
  text_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Item:
  """number: from 0, among the items of the files. size: bytes of content. Blocks, or a part of a long document."""

  number: int
  size: int
  blocks: list[Block] = dataclasses.field(default_factory=list)
  part: Part | None = None

  @property
  def ends_document(self) -> bool:
    return self.part is None or self.part.last


def read_items(files: list[str], field: str, tokenizer: Tokenizer, moved: Callable[[int], None]) -> Iterator[Item]:
  """The items of files. moved: is told how many bytes of the files have been read, as they stand."""
  number, waiting, size = itertools.count(), [], 0
  for block in _blocks(files, field, tokenizer.binary, moved):
    if isinstance(block, _Long):
      if waiting:
        yield Item(next(number), size, waiting)
        waiting, size = [], 0
      for part in block.parts(tokenizer):
        yield Item(next(number), len(part.text), part=part)
      continue
    waiting.append(block)
    size += len(block.content)
    if size >= blocks_lib.SIZE or len(waiting) >= 1024:
      yield Item(next(number), size, waiting)
      waiting, size = [], 0
  if waiting:
    yield Item(next(number), size, waiting)


def _blocks(files: list[str], field: str, binary: bool, moved: Callable[[int], None]) -> Iterator["Block | _Long"]:
  """Blocks with whole documents, and long documents, which must be read before the next is asked for."""
  done = 0
  for file in files:
    position = 0

    def at(place: int, before: int = done) -> None:
      nonlocal position
      position = place
      moved(before + place)

    blocks = blocks_lib.read_blocks(file, field, binary, at)
    for block in blocks:
      yield block if block.begins and block.ends else _Long(block, blocks)
    done += position


class _Long:
  """A document of several blocks."""

  def __init__(self, first: Block, blocks: Iterator[Block]):
    self._first, self._blocks = first, blocks

  def parts(self, tokenizer: Tokenizer) -> Iterator[Part]:
    """Its parts, where the tokenizer can take them one by one, then one without text that describes the document."""
    file, self._hash, self._size, self._problem = self._first.file, hashlib.sha256(), 0, ""
    texts = self._contents()
    if not tokenizer.binary:
      texts = encoding.cut((text.decode() for text in texts), tokenizer, encoding.PART)
    for i, text in enumerate(texts):
      yield Part(file, text, i == 0)
    digest = self._hash.digest()[: encoding.BYTES_OF_HASH]
    yield Part(file, b"", False, True, self._first.first, self._problem, digest, self._size)

  def _contents(self) -> Iterator[bytes]:
    for block in itertools.chain([self._first], self._blocks):
      self._hash.update(block.content)
      self._size += len(block.content)
      if block.content:
        yield block.content
      if block.ends:
        self._problem = block.problem
        return

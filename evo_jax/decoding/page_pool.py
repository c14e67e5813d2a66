"""Which pages hold which texts: memory for keys and values by the page, shared between texts with the same beginning.

On the host. A page that holds W tokens of a prompt, each with what stands before it, is found again by a digest of all
of them, and is kept when its text is done, until its memory is wanted: the least recently used goes first, of one text
the last. What a model has written is not shared: its keys and values come from passes of other shapes, and differ in
the last bits from those of a prompt.
"""

from collections import OrderedDict
import dataclasses
import hashlib

import numpy as np

SCRATCH = 0  # a page that belongs to no text: slots that mean nothing write there


def page_digests(tokens: np.ndarray, width: int) -> list[bytes]:
  """Of each whole page of tokens (L,) int32, a digest of it and of all before it."""
  digests, before = [], b""
  for start in range(0, len(tokens) - width + 1, width):
    before = hashlib.blake2b(before + tokens[start : start + width].tobytes(), digest_size=16).digest()
    digests.append(before)
  return digests


@dataclasses.dataclass
class _Page:
  users: int = 0
  digest: bytes | None = None


class PagePool:
  """`pages` pages, of which number SCRATCH is never given out."""

  def __init__(self, pages: int):
    self._pages = [_Page() for _ in range(pages)]
    self._free = list(range(pages - 1, SCRATCH, -1))
    self._shared: dict[bytes, int] = {}
    self._unused: OrderedDict[int, None] = OrderedDict()  # shared pages without users, the next to go first
    self.evicted = 0

  @property
  def size(self) -> int:
    """Pages that texts may have."""
    return len(self._pages) - 1

  @property
  def available(self) -> int:
    """Pages that `take` can give."""
    return len(self._free) + len(self._unused)

  def find(self, digests: list[bytes]) -> list[int]:
    """The pages that hold a text's first tokens, as far as there are any. They are not taken yet."""
    found = []
    for digest in digests:
      if (page := self._shared.get(digest)) is None:
        break
      found.append(page)
    return found

  def take(self, found: list[int], new: int) -> list[int] | None:
    """Takes pages that were found, and `new` others behind them, for a text; None where there are not so many."""
    if new > self.available - sum(self._pages[page].users == 0 for page in found):
      return None
    for page in found:
      self._pages[page].users += 1
      self._unused.pop(page, None)
    return found + [self._take_one() for _ in range(new)]

  def _take_one(self) -> int:
    if not self._free:
      page, _ = self._unused.popitem(last=False)
      del self._shared[self._pages[page].digest]
      self._pages[page].digest = None
      self._free.append(page)
      self.evicted += 1
    page = self._free.pop()
    self._pages[page].users = 1
    return page

  def share(self, page: int, digest: bytes) -> None:
    """Says what a page holds, from now on. Where another one holds it already, that one stays the one to be found."""
    if digest not in self._shared:
      self._shared[digest] = page
      self._pages[page].digest = digest

  def release(self, pages: list[int]) -> None:
    """Gives back the pages of a text."""
    for page in reversed(pages):
      self._pages[page].users -= 1
      if self._pages[page].users:
        continue
      if self._pages[page].digest is None:
        self._free.append(page)
      else:
        self._unused[page] = None

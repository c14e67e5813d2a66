"""Likelihoods of continuations given their contexts by autoregression, many in one pass.

Pairs that begin alike share the slots of what they have in common: a pass reads trees of tokens, each slot behind its
ancestors alone, as many trees as fit its slots. So four answers to a question cost one reading of it, and short texts
are products as large as long ones.

Letters in names: B packs of a pass, S slots of a pack.
"""

from collections.abc import Iterator, Sequence
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.errors import UserError
from evo_jax.evaluation.batches import BatchScorer, Bound, Pair, power_of_two
from evo_jax.parallel import sharding
from evo_jax.run import Run

_SLOTS = 512  # of a pack, where no pair is longer: enough for products at full speed
_STEP = 64  # predictions of a pack whose logits are in memory at a time; packs have a multiple of it


class PrefixTreeScorer(BatchScorer):
  """Exact likelihoods, as of `ar`; a `Bound` without noise."""

  def __init__(self, run: Run, context: int = 0, rows: int = 8, share: bool = True):
    """Prepares the model.

    Args:
      context: tokens that are read of a pair at most, of which the last is only predicted; 0: what the model can read.
      rows: packs of a pass, at most; on a CPU one for each shard of the batch.
      share: whether pairs share what they have in common.

    Raises UserError for a model that has no autoregression.
    """
    # A CPU takes as long to slice a layer out of the stack as to read dozens of slots.
    on_cpu = sharding.Layout.of(run.mesh).platform == "cpu"
    super().__init__(run, stacked=not on_cpu)
    if run.config.diffusion_alone:
      raise UserError("a model of diffusion alone has no likelihoods by autoregression")
    self.limit = min(context or run.config.model.position_limit, run.config.model.position_limit) + 1
    shards = sharding.batch_shards(self._mesh)
    self.rows, self._share = shards if on_cpu else -(-rows // shards) * shards, share
    self._program = self._make_program()

  def _make_program(self):
    def program(params, statistics, tokens_BxS, position_BxS, visible_BxSxS, source_BxS, target_BxS, steps):
      net = self._network(params, tokens_BxS.shape[1])
      hidden_BxSxD = net.trees(tokens_BxS, position_BxS, visible_BxSxS)

      def predict(step, found):
        some = lambda x: jax.lax.dynamic_slice_in_dim(x, step * _STEP, _STEP, axis=1)
        logits = net.logits(jnp.take_along_axis(hidden_BxSxD, some(source_BxS)[..., None], axis=1))
        target = some(target_BxS)
        own = jnp.take_along_axis(logits, target[..., None], axis=2)[..., 0]
        new = jax.nn.logsumexp(logits, axis=2) - own, jnp.argmax(logits, axis=2) == target
        return tuple(jax.lax.dynamic_update_slice_in_dim(old, x, step * _STEP, axis=1) for old, x in zip(found, new))

      nothing = jnp.zeros(tokens_BxS.shape), jnp.zeros(tokens_BxS.shape, bool)
      return jax.lax.fori_loop(0, jnp.max(steps), predict, nothing)

    return jax.jit(program, out_shardings=sharding.replicated(self._mesh))

  def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Bound]]]:
    """Those of large packs come first."""
    self._check(pairs)
    for _, packs in itertools.groupby(self._packs(pairs), lambda pack: pack.room):
      while some := list(itertools.islice(packs, self.rows)):
        arrays = _stack(some, self.rows, self._size(max(pack.used for pack in some)))
        self._send(arrays)
        nats, greedy = self._run_batch(arrays)
        numbers, bounds = [], []
        for pack, of_pack, is_best in zip(some, nats, greedy):
          for number, begin, end in pack.spans:
            numbers.append(number)
            total = float(np.sum(of_pack[begin:end], dtype=np.float64))
            bounds.append(Bound(total, None, bool(is_best[begin:end].all()), float(end - begin)))
        yield numbers, bounds

  def _run_batch(self, batch: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return self._run_program(self._program, batch)

  def _packs(self, pairs: Sequence[Pair]) -> Iterator["_Pack"]:
    """All pairs in packs, those of long texts first."""
    ids = [np.array((*context, *continuation), np.int32) for context, continuation in pairs]
    longest: dict[tuple[int, ...], int] = {}  # by context, so that all that continues it may share it
    for (context, _), whole in zip(pairs, ids):
      longest[tuple(context)] = max(longest.get(tuple(context), 0), len(whole) - 1)
    room = [self._size(max(longest[tuple(context)], _SLOTS)) for context, _ in pairs]
    pack = None
    for number in sorted(range(len(pairs)), key=lambda i: (-room[i], ids[i].tolist())):
      pair = number, ids[number], len(pairs[number][0])
      if pack is not None and pack.room == room[number] and pack.add(*pair):
        continue
      if pack is not None:
        yield pack
      pack = _Pack(room[number], self._share)
      pack.add(*pair)
    if pack is not None:
      yield pack

  def _size(self, slots: int) -> int:
    """Slots of the smallest pack that has so many: a power of 2, or three quarters of one, so that few programs are
    compiled; no more than the longest pair needs."""
    power = power_of_two(max(slots, _STEP))
    between = power * 3 // 4
    size = between if slots <= between and between % _STEP == 0 else power
    return min(size, -(-(self.limit - 1) // _STEP) * _STEP)


class _Pack:
  """Trees of tokens. room: slots at most; spans: by pair, its number and its predictions from begin to end."""

  def __init__(self, room: int, share: bool):
    self.room, self._share = room, share
    self.tokens: list[int] = []
    self.positions: list[int] = []
    self.parents: list[int] = []  # slots; -1: none
    self.sources: list[int] = []  # of predictions, the slots that make them
    self.targets: list[int] = []
    self.spans: list[tuple[int, int, int]] = []
    self._ids, self._path = np.zeros(0, np.int32), []  # of the newest pair: all but its last token, and their slots

  @property
  def used(self) -> int:
    """Slots, or predictions, that are taken."""
    return max(len(self.tokens), len(self.sources))

  def add(self, number: int, ids: np.ndarray, first: int) -> bool:
    """Adds a pair, of whose ids those from `first` on are predicted, if there is room. Pairs come sorted by their ids:
    so a pair has in common with the newest what it has in common with any."""
    read = ids[:-1]
    n = min(len(read), len(self._ids)) if self._share else 0
    differ = np.flatnonzero(read[:n] != self._ids[:n])
    shared = int(differ[0]) if len(differ) else n
    slot, begin = len(self.tokens), len(self.sources)
    if max(slot + len(read) - shared, begin + len(ids) - first) > self.room:
      return False
    path = [*self._path[:shared], *range(slot, slot + len(read) - shared)]
    self.tokens += read[shared:].tolist()
    self.positions += range(shared, len(read))
    self.parents += [path[depth - 1] if depth else -1 for depth in range(shared, len(read))]
    self.sources += path[first - 1 :]
    self.targets += ids[first:].tolist()
    self.spans.append((number, begin, len(self.sources)))
    self._ids, self._path = read, path
    return True

  def visible(self, size: int) -> np.ndarray:
    """(S, S) bool: each slot sees itself and its ancestors; one that is not taken, itself."""
    visible = np.eye(size, dtype=bool)
    for slot, parent in enumerate(self.parents):
      if parent >= 0:
        visible[slot] |= visible[parent]
    return visible


def _stack(packs: Sequence[_Pack], B: int, S: int) -> tuple[np.ndarray, ...]:
  """Arrays of some packs, filled up to B of S slots: tokens, positions (B, S) int32, visible (B, S, S) bool, sources
  and targets of predictions (B, S) int32, and how many steps of predictions are taken (B,) int32."""
  tokens, position, source, target = np.zeros((4, B, S), np.int32)
  visible, steps = np.broadcast_to(np.eye(S, dtype=bool), (B, S, S)).copy(), np.zeros(B, np.int32)
  for i, pack in enumerate(packs):
    for array, values in ((tokens, pack.tokens), (position, pack.positions), (source, pack.sources)):
      array[i, : len(values)] = values
    target[i, : len(pack.targets)] = pack.targets
    visible[i] = pack.visible(S)
    steps[i] = -(-len(pack.sources) // _STEP)
  return tokens, position, visible, source, target, steps

"""How mode verify drafts when the length is not given: what promises most tokens a second, by what was measured.

On the host, between looks: seconds of passes, as a base and a price per slot, corrected by what each program took; and
acceptance by source and position, which the decoding state counts. A draft that was not tried begins, and one that
was not tried for long ends, with a hopeful prior, so that each is tried, briefly and seldom. With noise keyed by
position no text depends on any of this.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
import dataclasses
import statistics

import numpy as np

from evo_jax.decoding.speculative import PRIORS, UNLIMITED, Budget, Drafting, every_outcome, no_record, survival

_ROUNDS = 8  # between two looks of the host
_PROBE_ROUNDS = 2  # where little is known of windows: a round with them takes about two passes on a CPU
_TIMED_ROUNDS = 4  # the first of a program, one a step, so that rounds without and with a draft have their own prices
_LITTLE = 4.0  # windows' drafts that were judged
_HOPE = 0.8  # acceptance of windows that were not tried, where what they cost is known: else they look cheap
# T of drafts from the text alone, the first where nothing is known: of many texts each draft costs all of them.
_TEXT_LENGTHS = (8, 16, 4, 2)
_TEXT_LENGTHS_OF_MANY = (4, 2, 8, 16)
_WINDOW_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_FEW_WINDOW_LENGTHS = (1, 3)  # of which one is nearly as good as the best of all, on a CPU and on accelerators
_GAIN = 1.05  # that another compiled program must promise
_GAIN_TO_COMPILE = 1.15
_SLOT_SHARE = 0.1  # of a pass's seconds that a slot more of each row takes, where nothing was measured: a CPU's share
_STEPS = 32  # steps whose seconds are remembered
_CREDIT = 2.0  # passes that drafts may cost before they have given anything


class PassTimes:
  """Seconds of passes by their slots of each row: a base and a price per slot, and a factor for each program."""

  def __init__(self):
    self._steps = deque(maxlen=_STEPS)  # (passes, slots, seconds)
    self._last: dict[Drafting, tuple[int, int, float]] = {}  # of each program, also long ago
    self._factors = defaultdict(lambda: deque(maxlen=7))
    self._base, self._slot = 1.0, _SLOT_SHARE  # an arbitrary unit before anything was measured

  def add(self, program: Drafting, passes: int, slots: int, seconds: float) -> None:
    """A step of `passes` passes over `slots` slots altogether."""
    self._steps.append((passes, slots, seconds))
    self._last[program] = self._steps[-1]
    self._base, self._slot = self._fit()
    self._factors[program].append(seconds / (passes * self._base + slots * self._slot))

  @property
  def measured(self) -> bool:
    """Whether anything was."""
    return bool(self._steps)

  def seconds(self, program: Drafting, slots: int) -> float:
    """Of a pass over so many slots."""
    factor = statistics.median(self._factors[program]) if program in self._factors else 1.0
    return (self._base + slots * self._slot) * factor

  def _fit(self) -> tuple[float, float]:
    """Seconds of a pass and of a slot, by least squares of relative errors; a slot's share is drawn to the usual."""
    passes, slots, seconds = np.array([*self._steps, *self._last.values()]).T
    scale = np.median(passes / seconds)
    usual = 0.3 * scale * np.array([_SLOT_SHARE, -1.0])
    rows = np.concatenate([np.stack([passes, slots], 1) / seconds[:, None], usual[None]])
    base, slot = np.linalg.lstsq(rows, np.append(np.ones(len(seconds)), 0.0))[0]
    return max(float(base), 0.05 / scale), max(float(slot), 1e-4 / scale)


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a drafting promises. rate: tokens a second of one text. costs: of rounds, see `speculative.Budget`."""

  drafting: Drafting
  rate: float
  costs: tuple[float, float]


class DraftPolicy:
  """Chooses how a sampler's batches are drafted.

  Where the length is given, drafts have it, windows follow every outcome, and the text drafts where more of it was
  accepted: what is most tokens a pass. Else `choose` adapts all three.
  """

  def __init__(self, drafting: Drafting, adapts: bool, max_tokens: int, from_windows: bool, few: bool = False):
    """drafting: as given; where it is adapted, its other fields. max_tokens: T of the longest drafts. few: a choice
    among few, whose programs can all be compiled and timed beforehand."""
    self._drafting, self.adapts, self.max_tokens = drafting, adapts, max_tokens
    if few:
      one = many = list(_few_candidates(drafting, _FEW_WINDOW_LENGTHS if from_windows else ()))
    else:
      windows = _WINDOW_LENGTHS if from_windows else ()
      one, many = (list(_candidates(drafting, n, windows)) for n in (_TEXT_LENGTHS, _TEXT_LENGTHS_OF_MANY))
    self._candidates, self._candidates_of_many = one, many
    self._windows = _HOPE if few else PRIORS[0]  # their acceptance, before they were tried
    self._times = defaultdict(PassTimes)  # by rows of a batch
    self._compiled = Counter[tuple[int, Drafting]]()  # steps of each
    self._compile_seconds = self._seconds = 0.0
    self._current: Drafting | None = None
    self._credit = _CREDIT
    self.record = no_record(max_tokens)  # of one text: offered, taken, matched

  @property
  def candidates(self) -> list[Drafting]:
    """All that `choose` may give."""
    return self._candidates if self.adapts else [self._drafting]

  def assume_compiled(self, rows: int) -> None:
    """Says that the programs of all candidates are compiled for so many rows."""
    self._compiled.update({(rows, drafting): _TIMED_ROUNDS for drafting in self.candidates})

  def choose(self, rows: int, active: int) -> tuple[Drafting, int, Budget]:
    """The next step of a batch of so many rows, of which `active` are written: drafting, rounds, budget."""
    if not self.adapts:
      return self._drafting, _ROUNDS, UNLIMITED
    survive = survival(*self.record[:2], self.max_tokens, self._windows)
    best, best_rate = None, 0.0
    for drafting in self._candidates if rows == 1 else self._candidates_of_many:
      if patience := self._patience(drafting, rows):
        forecast = self._forecast(drafting, self._times[rows], survive[:, : drafting.tokens], max(active, 1))
        if forecast.rate * patience > best_rate:
          best, best_rate = forecast, forecast.rate * patience
    self._current = best.drafting
    return best.drafting, self._rounds(best.drafting, rows), Budget.of(best.costs, self._credit)

  def add_step(
    self,
    drafting: Drafting,
    rows: int,
    rounds: tuple[int, int],
    seconds: float,
    compile_seconds: float,
    record: tuple[np.ndarray, np.ndarray, np.ndarray],
    credit: float,
  ) -> None:
    """What a step showed. rounds: without and with a draft. record: the means over the batch's texts. credit: what is
    left of the budget's."""
    self.record, self._credit = record, credit
    self._compile_seconds += compile_seconds
    self._seconds += seconds
    self.add_time(drafting, rows, rounds, seconds)

  def add_time(self, drafting: Drafting, rows: int, rounds: tuple[int, int], seconds: float) -> None:
    """What a step took."""
    self._compiled[rows, drafting] += 1
    plain, drafted = map(int, rounds)
    if plain + drafted:
      slots = plain * drafting.rows(False) + drafted * drafting.rows(True)
      self._times[rows].add(drafting, plain + drafted, slots, seconds)

  def _rounds(self, drafting: Drafting, rows: int) -> int:
    """Rounds of a step: few, where little is known yet."""
    if drafting.outcomes:
      return _ROUNDS if self.record[0][0, 0] >= _LITTLE else _PROBE_ROUNDS
    return _ROUNDS if self._compiled[rows, drafting] >= _TIMED_ROUNDS else 1

  def _patience(self, drafting: Drafting, rows: int) -> float:
    """What a rate is multiplied by: changes must be worth it, and compilation must not take longer than decoding.

    The first program without windows, which is `ar` where the text drafts nothing, comes before all others, until its
    speed is known; it, and the first one with windows, are compiled whatever that takes.
    """
    kinds = {bool(d.outcomes) for n, d in self._compiled if n == rows}
    if drafting.outcomes and (self._credit <= 0.0 or not self._times[rows].measured):
      return 0.0
    if drafting == self._current or (bool(drafting.outcomes) not in kinds and not drafting.outcomes):
      return 1.0
    if (rows, drafting) in self._compiled:
      return 1.0 / _GAIN if drafting.outcomes else 1.0
    if bool(drafting.outcomes) not in kinds or self._compile_seconds < self._seconds:
      return 1.0 / _GAIN_TO_COMPILE
    return 0.0

  def _forecast(self, drafting: Drafting, times: PassTimes, survive_xT: np.ndarray, active: int) -> Forecast:
    """Tokens a second of each row in the long run: rounds without and with a draft follow as a Markov chain.

    A round has a draft for all rows if it has one for any, so that of many rows nearly all rounds have.

    survive_xT: (1 + MATCH, T), see `survival`.
    """
    plain, drafted = (times.seconds(drafting, drafting.rows(kind)) for kind in (False, True))
    autoregression = times.seconds(self._candidates[0] if drafting.outcomes else drafting, 1)
    least = drafted / plain - 1.0
    expected = survive_xT.sum(axis=1)
    worth = expected[0] if drafting.outcomes else least if active == 1 else 0.0
    uses = self.record[2] * (expected > worth) * drafting.from_text
    uses[0] = 0.0  # nothing matched
    by_text = float(uses.sum())
    share = (1.0 - by_text) if drafting.outcomes else 0.0
    reach = (share * survive_xT[0] + uses @ survive_xT) / max(share + by_text, 1e-9)
    if drafting.outcomes:
      outcome = np.append(1.0, reach) - np.append(reach, 0.0)  # probabilities of 0, ..., T accepted tokens
      follows = float(outcome[list(drafting.outcomes)].sum())
      again = follows + (1.0 - follows) * by_text  # of one row, that it has a draft after a round with drafts
      any_again = 1.0 - (1.0 - again) ** active
      share_drafted = 1.0 / (2.0 - any_again)  # a round without a draft always leaves one to all rows
      rows_drafted = share_drafted * (1.0 - any_again + again)
    else:
      share_drafted, rows_drafted = _rounds_by_text(by_text, float(reach.sum()), least, active)
    tokens = 1.0 + rows_drafted * float(reach.sum())
    seconds = share_drafted * drafted + (1.0 - share_drafted) * plain
    return Forecast(drafting, tokens / seconds, (plain / autoregression, drafted / autoregression))


def _rounds_by_text(by_text: float, expected: float, least: float, active: int) -> tuple[float, float]:
  """The share of rounds with drafts from the text, and of rows and rounds in which a row has one.

  by_text: probability that a row's text has a draft, of which `expected` tokens are accepted. A round has drafts where
  those of all rows together promise more than `least` tokens for each of the active ones.
  """
  k, p = np.arange(active + 1), min(max(by_text, 1e-9), 1.0 - 1e-9)
  log_choose = np.concatenate([[0.0], np.cumsum(np.log((active + 1 - k[1:]) / k[1:]))])
  binomial = np.exp(log_choose + k * np.log(p) + (active - k) * np.log1p(-p)) * (k * expected > least * active)
  return float(binomial.sum()), float(binomial @ k) / active


def _candidates(given: Drafting, text_lengths: tuple[int, ...], window_lengths: tuple[int, ...]) -> Iterator[Drafting]:
  """All draftings that may be chosen, first those without windows."""
  for tokens in text_lengths if given.from_text else text_lengths[:1]:
    yield dataclasses.replace(given, tokens=tokens, outcomes=())
  for tokens in window_lengths:
    for outcomes in dict.fromkeys([(0,), (tokens,), (0, tokens), every_outcome(tokens)]):
      yield dataclasses.replace(given, tokens=tokens, outcomes=outcomes)


def _few_candidates(given: Drafting, window_lengths: tuple[int, ...]) -> Iterator[Drafting]:
  """Some of them, first the one without windows."""
  yield dataclasses.replace(given, tokens=_TEXT_LENGTHS[0], outcomes=())
  for tokens in window_lengths:
    yield dataclasses.replace(given, tokens=tokens, outcomes=every_outcome(tokens))


def mean_record(
  offered_Bx: np.ndarray, taken_Bx: np.ndarray, matched_Bx: np.ndarray, active_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Means of the records of rows that are active; of all, if none is."""
  rows = active_B if active_B.any() else np.ones_like(active_B)
  return tuple(a[rows].mean(axis=0) for a in (offered_Bx, taken_Bx, matched_Bx))

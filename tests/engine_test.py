"""An engine: every text is what it is alone, whatever the other rows do; nothing is compiled later; pages come back."""

import asyncio
import concurrent.futures
import dataclasses
import json
import threading

from conftest import call
from decode_test import one_device, run
import jax
import jax.numpy as jnp
import numpy as np
from processes_test import assert_well, ends, processes
import pytest

from evo_jax import config as config_lib
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.page_pool import SCRATCH, PagePool, page_digests
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.evaluation.continuations import ContinuationScorer, parts
from evo_jax.network import attention
from evo_jax.network.attention import Visibility
from evo_jax.network.pages import Pages, attend_pages
from evo_jax.parallel import sharding

V, CONTEXT = 20, 96
MODES = (
  Sampling(),
  Sampling(mode="verify"),
  Sampling(mode="verify", draft=3),
  Sampling(mode="adaptive", threshold=1.0),
  Sampling(mode="flow", steps=3),
)

PATHS = ("left:3", "diagonal:2")


def model():
  return run(V, model__context=CONTEXT)


@pytest.fixture(scope="module")
def engine():
  with Engine(
    model(), rows=4, modes=MODES, page=16, infill=True, traces=True, cache_tokens=288, mesh=one_device(), paths=PATHS
  ) as engine:
    yield engine
    assert engine.compilations == 0
    assert engine.pages_free == engine.shape.shards * (engine.shape.pages - 1)  # all came back


def random_request(rng):
  """Arguments of `submit`, of any mode; prompts often begin alike."""
  prompt = "abcdefghijklmnopqrs" * int(rng.integers(3)) + "".join(rng.choice(list("abcdefgh"), rng.integers(8)))
  changes = dict(
    max_tokens=int(rng.integers(1, 30)),
    temperature=float(rng.choice([0.7, 1.0, 2.0])),
    top_k=int(rng.choice([0, 0, 3])),
    top_p=float(rng.choice([1.0, 1.0, 0.8])),
    greedy=bool(rng.integers(4) == 0),
    endless=bool(rng.integers(2)),
    stop=("gh",) if rng.integers(4) == 0 else (),
  )
  settings = {"seed": int(rng.integers(3)), "number": int(rng.integers(3))}
  if rng.integers(4) == 0:
    settings["logit_bias"] = {int(rng.integers(1, V)): 3.0}
  return (prompt, dataclasses.replace(MODES[rng.integers(len(MODES))], **changes)), settings


def plain(generation):
  return dataclasses.replace(generation, seconds=0.0, passes=0, settled=[], accepted=0, rounds=0, drafted_rounds=0)


@pytest.mark.parametrize("mode", MODES, ids=lambda s: f"{s.mode}{s.draft or ''}")
def test_a_text_is_that_of_a_sampler(engine, mode):
  sampling = dataclasses.replace(mode, max_tokens=20, endless=True, temperature=0.8)
  prompts = ["abc", "", "abc", "abcdefghijklmnopqrs" * 2]
  wanted = Sampler(model(), sampling, one_device())(prompts, 1, 3)
  numbers = [0, 0, 1, 0]
  handles = [engine.submit(p, sampling, seed=3, number=n) for p, n in zip(prompts, numbers)]
  for want, handle in zip(wanted, handles):
    assert handle.result().text == want.text and handle.result().tokens == want.tokens
    assert (handle.result().accepted is None) == (mode.mode != "verify")


@pytest.mark.parametrize("mode", MODES[3:], ids=lambda s: s.mode)
def test_gaps_are_filled_as_by_a_sampler(engine, mode):
  sampling = dataclasses.replace(mode, temperature=0.8, stop=("fg",))
  texts = ["ab[...3]cd[...9]e", "[...20]", "abcdefghijklmnopqrs[...]bc", "ab[...3]cd[...9]e"]
  wanted = Sampler(model(), sampling, one_device())(texts, 1, 3, infill=True)
  asked = [engine.submit(text, sampling, seed=3, number=n, infill=True) for text, n in zip(texts, (0, 0, 0, 1))]
  for want, handle in zip(wanted, asked):
    assert plain(handle.result()) == plain(want) and "".join(handle) == ""
  with pytest.raises(UserError, match="mode=ar infill: the engine has no such program"):
    engine.submit("a[...]b", infill=True)


def test_a_model_of_diffusion_alone_writes_whole_texts():
  r = run(V, loss__ar_weight=0.0, window__size=32, window__count=1)
  sampling = Sampling(mode="flow", steps=4, max_tokens=20, temperature=0.8)
  wanted = Sampler(r, sampling, one_device())(["abc", "", "abc"], 1, 3)
  with Engine(r, rows=2, modes=[sampling], mesh=one_device()) as engine:
    handles = [engine.submit(text, sampling, seed=3, number=n) for text, n in (("abc", 0), ("", 0), ("abc", 1))]
    assert [plain(handle.result()) for handle in handles] == [plain(want) for want in wanted]
    with pytest.raises(UserError, match="this engine has no scores"):
      engine.score("abc", "d")


def test_texts_are_what_they_are_alone_whatever_comes_and_goes(engine):
  """Requests of all modes arrive from several threads, some are cancelled; more than fit wait; prefixes are shared, and
  pages evicted. Then each one again, by itself."""
  rng = np.random.default_rng(1)
  requests = [random_request(rng) for _ in range(60)]
  cancelled = set(rng.choice(60, 12, replace=False).tolist())
  evicted = sum(pool.evicted for pool in engine._pools)
  handles, scores = {}, {}

  def submit(numbers):
    for number in numbers:
      args, settings = requests[number]
      handles[number] = engine.submit(*args, **settings)
      if number in cancelled:
        handles[number].cancel()
      if number % 5 == 0:
        scores[number] = engine.submit_score(args[0] or "a", "bcd")

  threads = [threading.Thread(target=submit, args=(range(first, 60, 3),)) for first in range(3)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  found, read = {}, {}
  for number, handle in handles.items():
    try:
      read[number] = "".join(handle)
      found[number] = plain(handle.result())
    except concurrent.futures.CancelledError:
      assert number in cancelled
  scored = {number: future.result() for number, future in scores.items()}
  assert len(found) >= 48 and sum(pool.evicted for pool in engine._pools) > evicted
  for number, generation in found.items():
    args, settings = requests[number]
    assert read[number] == generation.text
    assert plain(engine.submit(*args, **settings).result()) == generation
  for number, score in scored.items():
    again = engine.score(requests[number][0][0] or "a", "bcd")
    np.testing.assert_array_equal(again.log_p, score.log_p)  # bit for bit, with the prefix in pages or not


def test_scores_are_the_clean_streams(engine):
  tokens = jnp.array([[0, *range(1, 19), *range(1, 19), 4, 5, 6]])
  r = model()
  log_p = jax.nn.log_softmax(r.model.apply({"params": r.params}, tokens[:, :-1])[..., :V])
  want = np.take_along_axis(np.asarray(log_p), np.asarray(tokens[:, 1:, None]), axis=2)[0, :, 0]
  for length in (1, 3, 20, 39):
    score = engine.score(tokens[0, 1:-length].tolist(), tokens[0, -length:].tolist())
    np.testing.assert_allclose(score.log_p, want[-length:], atol=2e-5)
    assert score.total == pytest.approx(want[-length:].sum(), abs=1e-4)
    chosen = engine.submit_score(tokens[0, 1:-length].tolist(), score.tokens.tolist(), best=2).result().choices
    assert [c.log_p for c in chosen] == score.log_p.tolist() and all(len(c.best) == 2 for c in chosen)
    assert [c.best[0][0] == c.token for c in chosen] == score.greedy.tolist() and score.choices is None
    np.testing.assert_array_equal(score.greedy, np.asarray(log_p).argmax(-1)[0, -length:] == score.tokens)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_scores_by_its_bound(engine, path):
  """A window at a time, beside texts and other scores, each as if it were asked for alone."""
  context, continuations = "abcdef" * 2, ["g", "ghijklmnopqrs", "abcdefghijklmnopqrsa", "hgf"]
  asked = [engine.submit_score(context, text, path=path) for text in continuations]
  handle = engine.submit("abc", Sampling(max_tokens=20, endless=True), seed=3)
  exact = engine.score(context, "gh")
  scorer, encode = ContinuationScorer(model(), path, draws=4), lambda text: engine.run.tokenizer.encode(text).tolist()
  for text, future in zip(continuations, asked):
    found, again = future.result(), engine.score(context, text, path)
    assert found.nats == pytest.approx(again.nats, abs=1e-4) and found.total == -found.nats
    pieces = scorer(parts(([0, *encode(context)], encode(text)), model().config.window.size))
    assert found.nats == pytest.approx(sum(piece.nats for piece in pieces), abs=1e-4) and found.nats > 0
    assert found.passes == sum(piece.passes for piece in pieces) and len(pieces) == -(-len(text) // 8)
    assert found.stderr == pytest.approx(np.sqrt(sum(piece.stderr**2 for piece in pieces)), abs=1e-4)
  assert exact.total == engine.score(context, "gh", "ar").total
  assert handle.result().text == engine.submit("abc", Sampling(max_tokens=20, endless=True), seed=3).result().text
  with pytest.raises(UserError, match=r"path 'left:5'.* made for: left:3, diagonal:2"):
    engine.score(context, "g", "left:5")
  with pytest.raises(UserError, match="a bound has no most probable tokens"):
    engine.submit_score(context, "g", best=2, path=path)


def test_ids_that_are_none_are_not_scored(engine):
  for context, continuation in (([3], [25]), ([25], [3]), ([-1], [3])):
    with pytest.raises(UserError, match="(25|-1) is no id"):
      engine.score(context, continuation)


def test_a_score_may_have_the_most_probable_tokens_and_another_begin_token(engine):
  r, tokens = model(), [5, 1, 2, 3, 4]
  log_p = jax.nn.log_softmax(r.model.apply({"params": r.params}, jnp.array([tokens[:-1]]))[0, :, :V])
  score = engine.submit_score(tokens[1:3], tokens[3:], best=2, begin=tokens[0]).result()
  np.testing.assert_allclose(score.log_p, [log_p[2, 3], log_p[3, 4]], atol=2e-5)
  for choice, row in zip(score.choices, np.asarray(log_p)[2:]):
    assert [token for token, _ in choice.best] == np.argsort(-row)[:2].tolist()
    np.testing.assert_allclose([value for _, value in choice.best], np.sort(row)[:-3:-1], atol=2e-5)
  written = engine.submit("abc", Sampling(max_tokens=5, greedy=True, endless=True), begin=5, best=0).result()
  again = engine.submit_score("abc", written.tokens, begin=5).result()
  np.testing.assert_allclose([choice.log_p for choice in written.choices], again.log_p, atol=1e-5)
  with pytest.raises(UserError, match="best=21: is not from 0 to 20"):
    engine.submit_score("abc", "d", best=21)


def test_log_probabilities_of_what_was_written(engine):
  sampling = Sampling(max_tokens=20, endless=True, greedy=True)
  generation = engine.submit("abcdef" * 3, sampling, best=3).result()
  assert [choice.token for choice in generation.choices] == generation.tokens
  want = engine.score("abcdef" * 3, generation.tokens).log_p
  np.testing.assert_allclose([choice.log_p for choice in generation.choices], want, atol=1e-5)
  for choice in generation.choices:
    assert len(choice.best) == 3 and choice.best == sorted(choice.best, key=lambda pair: -pair[1])
    assert choice.best[0][1] == pytest.approx(choice.log_p, abs=1e-5) or choice.best[0][0] != choice.token


def test_settings_of_a_row(engine):
  write = lambda **settings: engine.submit("abc", Sampling(max_tokens=20, endless=True), **settings).result()
  assert set(write(logit_bias={7: 100.0}).text) == {"g"}
  assert "g" not in write(logit_bias={7: -100.0}).text
  ended = engine.submit("abc", Sampling(max_tokens=20), logit_bias={7: 100.0}, end_ids=[7], best=1).result()
  assert ended.text == "" and ended.end_id == 7 and [choice.token for choice in ended.choices] == [7]
  for bad, message in (
    (dict(logit_bias={V: 1.0}), f"logit_bias: {V} is no id"),
    (dict(logit_bias={1: np.inf}), "is not finite"),
    (dict(end_ids=[-1]), "end_ids: -1 is no id"),
    (dict(best=21), "best=21: is not from 0 to 20"),
  ):
    with pytest.raises(UserError, match=message):
      write(**bad)
  with pytest.raises(UserError, match="mode=verify draft=2.*the engine has no such program; it has mode=adaptive"):
    engine.submit("abc", Sampling(mode="verify", draft=2))
  with pytest.raises(UserError, match="do not fit the context"):
    engine.submit("abc", Sampling(max_tokens=CONTEXT))
  with pytest.raises(UserError, match="fit the context"):
    engine.score("a" * CONTEXT, "b")
  with pytest.raises(UserError, match="continuation to be scored is empty"):
    engine.score("a", "")


def test_prompts_as_ids(engine):
  sampling = Sampling(max_tokens=20, endless=True)
  ids = engine.run.tokenizer.encode("abc").tolist()
  want = engine.submit("abc", sampling, seed=2).result()
  assert engine.submit(ids, sampling, seed=2).result().tokens == want.tokens
  gaps = [*ids, None, None, *ids]
  filled = engine.submit(gaps, MODES[3], seed=2, infill=True).result()
  assert filled.text == engine.submit("abc[...2]abc", MODES[3], seed=2, infill=True).result().text
  for bad, infill, message in (
    ([1, V], False, f"prompt: {V} is no id"),
    ([True], False, "prompt: True is no id"),
    ([1, None], False, "prompt: None is no id"),
    (ids, True, "has no gap to fill"),
    ([1] * CONTEXT, False, "prompt: its 96 tokens leave no room"),
    ([*[1] * CONTEXT, None], True, "does not fit the context"),
  ):
    with pytest.raises(UserError, match=message):
      engine.submit(bad, MODES[3] if infill else None, infill=infill)


@pytest.mark.parametrize("tokens", [12, 24])
def test_a_short_texts_windows_are_those_of_a_long_one(engine, tokens):
  sampling = Sampling(mode="adaptive", threshold=1.0, max_tokens=tokens, endless=True)
  wanted = Sampler(model(), sampling, one_device())(["abc", ""], 1, 3)
  assert [engine.submit(prompt, sampling, seed=3).result().tokens for prompt in ("abc", "")] == [
    want.tokens for want in wanted
  ]


def test_thresholds_are_a_rows_own(engine):
  """One program has all of them; each text is what it is alone."""
  sampling = lambda threshold: dataclasses.replace(MODES[3], threshold=threshold, max_tokens=30, endless=True, window=0)
  with Engine(model(), rows=3, modes=["adaptive"], page=16, mesh=one_device()) as other:
    handles = [other.submit("abc", sampling(threshold), seed=1) for threshold in (0.0, 0.1, 0.3)]
    for threshold, handle in zip((0.0, 0.1, 0.3), handles):
      assert plain(other.submit("abc", sampling(threshold), seed=1).result()) == plain(handle.result())
    passes = [handle.result().passes for handle in handles]
    assert passes[0] == 30 and passes == sorted(passes, reverse=True) and other.compilations == 0
    assert handles[0].result().text == engine.submit("abc", Sampling(max_tokens=30, endless=True), seed=1).result().text
    with pytest.raises(UserError, match="the engine has no such program"):
      other.submit("abc", sampling(1.0))  # has a wider window by default
    with pytest.raises(UserError, match="trace: the engine was made without traces"):
      other.submit("abc", sampling(0.1), trace=True)


@pytest.mark.parametrize("mode", MODES, ids=lambda s: f"{s.mode}{s.draft or ''}")
def test_what_passes_do_is_told_on_the_way(engine, mode):
  """The text is the same; each pass is told once, and each token becomes known once, in the pass that committed it."""
  sampling = dataclasses.replace(mode, max_tokens=24, endless=True)
  handle, beside = engine.submit("abc", sampling, seed=4, trace=True), engine.submit("abc", sampling, seed=5)
  pieces = list(handle)
  generation = handle.result()
  assert plain(generation) == plain(engine.submit("abc", sampling, seed=4).result())
  assert "".join(pieces) == generation.text
  assert beside.trace == [] and [step.number for step in handle.trace] == list(range(1, generation.passes + 1))
  assert mode.mode == "flow" or len(pieces) == generation.passes  # a look for each, however late the reader comes
  known = {}
  for step in handle.trace:
    for index, t, piece, event in step.cells:
      assert index not in known and (t <= 0.0) == (event in (1, 3))
      if t <= 0.0:
        known[index] = (step.number, piece)
  number, tokens = zip(*(known[i] for i in range(24)))
  assert list(number) == generation.settled and "".join(tokens) == generation.text


def test_coroutines_and_cancellation(engine):
  async def write(number):
    handle = engine.submit("abc", Sampling(max_tokens=40, endless=True), number=number)
    pieces = [piece async for piece in handle]
    return "".join(pieces), (await handle.async_result()).text

  async def main():
    found = await asyncio.gather(*(write(number) for number in range(8)))
    handle = engine.submit("abc", Sampling(max_tokens=80, endless=True))
    handle.cancel()
    with pytest.raises(asyncio.CancelledError):
      await handle.async_result()
    handle = engine.submit("abc", Sampling(max_tokens=80, endless=True))
    with pytest.raises(asyncio.TimeoutError):
      await asyncio.wait_for(handle.async_result(), 1e-3)
    assert len((await handle.async_result()).text) == 80  # who no longer waits does not end it
    return found

  found = asyncio.run(main())
  assert all(read == text and len(text) == 40 for read, text in found) and len({text for _, text in found}) == 8


def test_who_closes_its_loop_ends_nothing_else(engine):
  loop = asyncio.new_event_loop()
  reader = aiter(engine.submit("abc", Sampling(max_tokens=80, endless=True)))
  loop.run_until_complete(anext(reader))
  loop.close()
  assert len(engine.submit("abc", Sampling(max_tokens=80, endless=True)).result().text) == 80


def test_what_never_fits_is_refused_and_what_does_not_fit_now_waits():
  engine = Engine(model(), rows=2, page=16, cache_tokens=64, mesh=one_device())
  assert "64 tokens fit" in engine.memory and engine.memory.startswith("keys and values: 256 bytes a token")
  with engine:
    with pytest.raises(UserError, match="a text of 74 tokens needs room for 80; the cache has 64"):
      engine.submit("abc", Sampling(max_tokens=70))
    with pytest.raises(UserError, match=r"seed=-3: is not in \[0, 2\^32\)"):
      engine.submit("abc", Sampling(max_tokens=3), seed=-3)
    handles = [engine.submit("abc", Sampling(max_tokens=40, endless=True), number=i) for i in range(3)]
    assert len({handle.result().text for handle in handles}) == 3
    waiting = engine.submit("abc", Sampling(max_tokens=40, endless=True))
  with pytest.raises(concurrent.futures.CancelledError):
    waiting.result()
  with pytest.raises(RuntimeError, match="the engine is closed"):
    engine.submit("abc", Sampling(max_tokens=3))


def test_smaller_passes_write_the_same():
  """Two texts at once, of one mode or two, and as many as there are rows."""
  with pytest.raises(UserError, match="pass_rows=1: is not from 2 to 3"):
    Engine(model(), rows=4, pass_rows=[1], mesh=one_device())
  modes = [Sampling(), Sampling(mode="adaptive", threshold=0.3), Sampling(mode="verify")]
  prompts = ["abcdefghijklmnopqrs" * (i % 2) + "abc"[: i % 4] for i in range(12)]
  asked = [dataclasses.replace(modes[i % 3], max_tokens=12 + i, endless=True) for i in range(12)]
  with Engine(
    model(), rows=4, modes=modes, page=16, pass_rows=[2], scores=False, share=False, mesh=one_device()
  ) as engine:
    submit = lambda i: engine.submit(prompts[i], asked[i], seed=i)
    together = [handle.result() for handle in [submit(i) for i in range(12)]]
    pairs = [(i, i + (1 if i % 4 else 3)) for i in range(0, 9, 2)]
    for pair in pairs:
      for i, handle in [(i, submit(i)) for i in pair]:
        found = handle.result()
        assert plain(found) == plain(together[i])
        assert found.rounds or found.settled == together[i].settled
    assert engine.compilations == 0


@pytest.mark.slow
def test_an_engine_over_a_mesh_writes_what_one_device_writes():
  """Rows, and the pages of their texts, lie on four shards of two devices each."""
  r = run(V, model__context=CONTEXT, model__kv_heads=2)
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  with pytest.raises(UserError, match="rows=6: is no positive multiple of the 4 shards"):
    Engine(r, rows=6, mesh=mesh)
  modes = [Sampling(), Sampling(mode="verify", draft=3)]
  with Engine(r, rows=8, modes=modes, page=16, mesh=mesh, paths=["left:3"]) as engine:
    prompts = ["abcdefghijklmnopqrs" * (i % 3) + "abc"[: i % 4] for i in range(20)]
    asked = [dataclasses.replace(modes[i % 2], max_tokens=5 + i, endless=True) for i in range(20)]
    handles = [engine.submit(prompt, sampling, seed=i) for i, (prompt, sampling) in enumerate(zip(prompts, asked))]
    score = engine.score("abcdefghijklmnopqrs" * 2, "cde")
    bound = engine.score("abcdefghijklmnopqrs" * 2, "cde", "left:3")
    mixed = [engine.submit_score("ab", "cdefgh" * (2 + i), (None, 1, 5)[i % 3]) for i in range(12)]
    assert [future.result().choices and len(future.result().choices[0].best) for future in mixed] == [None, 1, 5] * 4
    same = [engine.submit_score("ab", "abcdefghijklmnopqrs" * 2, path="left:3") for _ in range(4)]  # rows of one text
    assert [future.result().nats for future in same] == pytest.approx([same[0].result().nats] * 4, abs=1e-4)
    longest = [Sampler(r, dataclasses.replace(m, max_tokens=24, endless=True), one_device()) for m in modes]
    for i, handle in enumerate(handles):  # a shorter text is the beginning of a longer one
      assert handle.result().text == longest[i % 2](prompts[i : i + 1], 1, i)[0].text[: 5 + i]
    assert engine.compilations == 0 and engine.pages_free == 4 * (engine.shape.pages - 1)
  tokens = jnp.array([[0, *range(1, 20), *range(1, 20), 3, 4, 5]])
  log_p = jax.nn.log_softmax(r.model.apply({"params": r.params}, tokens[:, :-1])[0, ..., :V])
  np.testing.assert_allclose(score.log_p, log_p[[-3, -2, -1], [3, 4, 5]], atol=1e-5)
  (alone,) = ContinuationScorer(r, "left:3", draws=4)([(tokens[0, :-3].tolist(), [3, 4, 5])])
  assert bound.nats == pytest.approx(alone.nats, abs=1e-4) and bound.stderr == pytest.approx(alone.stderr, abs=1e-4)


@pytest.mark.slow
def test_several_processes_are_one_engine(trained):
  """Process 0 takes requests; rows lie on both, each of which has half of every matrix."""
  module, flags = "tests.engine_process", [f"--workdir={trained}"]
  with processes(2, [*flags, "--mesh=fsdp:2"], module) as started:
    ended = ends(started)
  assert_well(ended)
  alone = call(module, *flags)
  found, want = (json.loads(output.splitlines()[-1]) for output in (ended[0][1], alone.stdout))
  assert found[0] == want[0] and found[1] == pytest.approx(want[1], abs=1e-4)


def test_pages_are_shared_and_the_least_recently_used_goes_first():
  pool, tokens = PagePool(6), np.arange(12, dtype=np.int32)
  a, b, c = page_digests(tokens, 4)
  assert page_digests(tokens[:11], 4) == [a, b] and page_digests(tokens[::-1].copy(), 4)[0] != a
  first = pool.take([], 3)
  assert len(set(first)) == 3 and SCRATCH not in first and pool.available == 2
  for page, digest in zip(first, (a, b, c)):
    pool.share(page, digest)
  assert pool.find([a, b, c]) == first and pool.find([b]) == first[1:2]
  again = pool.take(pool.find([a, b]), 2)
  assert again[:2] == first[:2] and pool.take([], 1) is None
  pool.release(first)
  assert pool.available == 1  # only the third page has no user
  pool.release(again)
  assert pool.available == 5 and pool.find([a, b, c]) == first
  pool.release(pool.take([], 3))
  assert pool.find([a, b, c]) == first[:2] and pool.evicted == 1  # of one text the last page went first


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_over_pages_is_attention(groups):
  """Also to slots beside the text, and to what was written; and the same bits however many columns are read."""
  B, K, G, S, E, W, J, T = 4, 2, 3, 2, 8, 4, 5, 3
  keys = jax.random.split(jax.random.key(0), 7)
  q = jax.random.normal(keys[0], (B, K, G, S, E))
  k, v = (jax.random.normal(key, (B, K, J * W, E)) for key in keys[1:3])
  own = tuple(jax.random.normal(key, (B, K, T, E)) for key in keys[3:5])
  visible = jax.random.bernoulli(keys[5], 0.5, (B, S, T))
  length = jnp.array([3, 7, 12, 9])
  stop = jnp.stack([length - 1, length], axis=1)
  table = 1 + jax.random.permutation(keys[6], B // groups * J).reshape(B // groups, J)
  table = jnp.tile(table, (groups, 1))
  pages = Pages(jnp.zeros((groups, 30, K, E, W)), jnp.zeros((groups, 30, K, W, E)), table, jnp.int32(J))
  pages = pages.write(jnp.zeros(B, jnp.int32), k[:, :, :6], v[:, :, :6])
  pages = pages.write(jnp.full(B, 6), k[:, :, 6:], v[:, :, 6:])
  want = attention.attend_plain(
    q[:, :, :, None], (k, v), Visibility(stop[:, None], None, visible[:, None]), tuple(x[:, :, None] for x in own)
  )[:, :, :, 0]
  got = attend_pages(q, pages, stop, own, visible)
  np.testing.assert_allclose(got, want, atol=1e-6)
  few = attend_pages(q, pages.replace(read=jnp.int32(3)), stop, own, visible)
  np.testing.assert_array_equal(few, got)

"""Writing texts: exact caches, rows that do not touch each other, and autoregression's distribution in fewer passes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from model_test import build
import numpy as np
import pytest
from scipy import stats

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding import logits as logits_lib
from evo_jax.decoding import modes, settings, speculative
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import state as state_lib
from evo_jax.errors import UserError
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies
from evo_jax.flow.interface import WindowInputs
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding


class Letters:
  """Tokens 1, 2, ... are a, b, ...; the tokenizer of the networks here."""

  unit, identity, binary = "character", "letters", False
  begin_id, separator_id, end_ids, turn_end_ids = 0, 0, (0,), ()

  def __init__(self, vocab_size):
    self.vocab_size = vocab_size

  def encode(self, text):
    return np.array([ord(c) - 96 for c in text], np.int32)

  def decode(self, tokens):
    return "".join(chr(96 + t) for t in itertools.takewhile(lambda t: t > 0, np.asarray(tokens).tolist()))

  def lost(self, text):
    return "".join(c for c in text if not 0 < ord(c) - 96 < self.vocab_size)


@functools.cache
def run(vocab_size=20, **changes):
  """A small network with random parameters, as if it had been loaded."""
  net, statistics, config = build(vocab_size, **changes)
  return run_lib.Run(config, Letters(vocab_size), net.clone(), net.variables["params"], statistics, 0)


def one_device():
  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)


@functools.cache
def sampler(vocab_size=20, changes=(), **fields):
  return sampler_lib.Sampler(run(vocab_size, **dict(changes)), settings.Sampling(**fields), one_device())


MODES = (
  dict(mode="ar"),
  dict(mode="flow", steps=3),
  dict(mode="flow", path="streams:2"),
  dict(mode="flow", path="entropy:3"),
  dict(mode="flow", path="random:4"),
  dict(mode="flow", path="error:0.2", stepper="ode2"),
  dict(mode="adaptive", threshold=1.0),
  dict(mode="adaptive", path="maturity", threshold=0.7, stepper="ancestral"),
  dict(mode="verify"),
  dict(mode="verify", draft=2, temperature=0.7, top_k=5),
  dict(mode="verify", draft_passes=2),
)
name = lambda fields: "-".join(str(v) for v in fields.values())


@pytest.mark.parametrize("fields", MODES, ids=name)
def test_a_batch_gives_what_each_prompt_gives_alone(fields):
  """Token for token, with prompts and texts of different lengths, some of which end early."""
  write = sampler(max_tokens=14, **fields)
  rng = np.random.default_rng(0)
  prompts = ["".join(rng.choice(list("abcdefghijkl"), 2 + i % 16)) for i in range(60)] + ["", "a", "aaa", "aaa"]
  assert len(set(prompts)) == 63
  together = write(prompts, seed=5)
  assert len({tuple(g.tokens) for g in together}) >= 56
  for i, prompt in enumerate(prompts[:-2]):
    assert dataclasses.replace(together[i], seconds=0.0) == dataclasses.replace(
      write([prompt], seed=5)[0], seconds=0.0
    ), i
  assert [g.tokens for g in together[-2:]] == [g.tokens for g in write(["aaa"], num=2, seed=5)]
  assert all(
    len(g.settled) == len(g.tokens) == len(g.text) <= 14 and max(g.settled, default=0) <= g.passes for g in together
  )


@pytest.mark.parametrize("fields", (dict(mode="flow", steps=3), dict(mode="adaptive", threshold=1.0)), ids=name)
def test_models_that_condition_themselves_write_too(fields):
  write = sampler(changes=(("loss__self_conditioning", 0.5),), max_tokens=14, endless=True, **fields)
  together = write(["a", "bcdefghij"], seed=5)
  assert [g.tokens for g in together] == [write([p], seed=5)[0].tokens for p in ("a", "bcdefghij")]
  assert all(len(g.tokens) == 14 for g in together)


def test_learned_clocks_write_too():
  changes = (("model__progression", "learned"), ("paths__learned", 0.2))
  found = sampler(changes=changes, max_tokens=14, endless=True, mode="flow", path="learned", steps=3)(
    ["a", "bcdefghij"]
  )
  assert [(len(g.tokens), g.passes) for g in found] == [(14, 6), (14, 6)]


@pytest.mark.parametrize("path", ["spread", "entropy", "confidence", "maturity"])
def test_adaptive_at_threshold_zero_is_ar(path):
  """Token for token, pass for pass."""
  ar = sampler(max_tokens=14, mode="ar")(["a", "bcd"], seed=1)
  adaptive = sampler(max_tokens=14, mode="adaptive", path=path, threshold=0.0)(["a", "bcd"], seed=1)
  assert [(g.tokens, g.passes, g.settled) for g in adaptive] == [(g.tokens, g.passes, g.settled) for g in ar]


def test_adaptive_thresholds_go_from_ar_to_one_pass():
  count = lambda t, **fields: (
    sampler(max_tokens=16, mode="adaptive", threshold=t, endless=True, **fields)(["a"])[0].passes
  )
  passes = [count(t) for t in (0.0, 0.2, 0.7, 1.5, 64.0)]
  assert passes[0] == 16 and passes == sorted(passes, reverse=True)
  assert passes[-1] == 1 and count(64.0, window=8) == 2  # one window as wide as the text; two of training's 8


def exact(vocab_size, length, **fields):
  """(symbols ** length,) autoregression's probabilities of strings, document token ruled out, under a
  Sampling's shaping."""
  r = run(vocab_size)
  strings = np.array(list(itertools.product(range(1, vocab_size), repeat=length)))
  s = settings.Sampling(**fields)
  shaping = logits_lib.make_processor(s, suppressed=(0,))
  logits = r.model.apply({"params": r.params}, jnp.pad(strings, [(0, 0), (1, 0)])[:, :-1])
  p = np.exp(np.asarray(shaping(logits), np.float64))
  p = np.take_along_axis(p, strings[..., None], axis=-1)[..., 0].prod(axis=1)
  assert p.sum() == pytest.approx(1.0, abs=1e-4)
  return strings, p / p.sum()


@pytest.mark.parametrize(
  "fields",
  [dict(), dict(temperature=0.6), dict(top_k=2), dict(top_p=0.7), dict(draft=1), dict(draft_passes=3)],
  ids=name,
)
def test_verify_has_the_distribution_of_ar(fields):
  """Chi-square over the 81 strings of four tokens (method fact 7). 8,000 draws at level 1e-3 find frequencies that
  are off by 10 % with power above 0.9; the proposals of this untrained network are poor."""
  count, length = 8000, 4
  assert stats.ncx2.sf(stats.chi2.isf(1e-3, 80), 80, count * 0.1**2) > 0.9
  strings, p = exact(4, length, **{k: v for k, v in fields.items() if not k.startswith("draft")})
  fields = dict(draft=3) | fields
  found = sampler(4, max_tokens=length, mode="verify", endless=True, batch_size=8192, **fields)([""], num=count, seed=2)
  number = np.array([g.tokens for g in found]) @ 3 ** np.arange(length)[::-1] - (3**length - 1) // 2
  assert (strings[number[0]] == found[0].tokens).all()
  counts = np.bincount(number, minlength=81)
  assert counts[p == 0].sum() == 0
  likely = p * count >= 5  # the chi-square distribution wants a few in each cell: the rest share one
  pool = lambda x: np.append(x[likely], x[~likely].sum()) if (x[~likely].sum() > 0) else x[likely]
  assert stats.chisquare(pool(counts), pool(p * count)).pvalue > 1e-3
  assert 1.0 < np.mean([length * fields.get("draft_passes", 1) / g.passes for g in found]) <= 4.0


def test_verify_would_be_caught_without_its_corrections():
  """The same test finds proposals that are taken as they come."""
  count = 8000
  _, p = exact(4, 4)
  found = sampler(4, max_tokens=4, mode="flow", steps=1, window=4, endless=True, batch_size=8192)(
    [""], num=count, seed=2
  )
  counts = np.bincount(np.array([g.tokens for g in found]) @ 3 ** np.arange(4)[::-1] - 40, minlength=81)
  assert stats.chisquare(counts, p * count).pvalue < 1e-6


def test_greedy_verify_is_greedy_ar():
  prompts = ["a", "bcdefghij", "kl", ""]
  ar = sampler(max_tokens=16, mode="ar", greedy=True)(prompts)
  for draft, passes in ((1, 1), (4, 1), (4, 2)):
    found = sampler(max_tokens=16, mode="verify", greedy=True, draft=draft, draft_passes=passes)(prompts)
    assert [(g.tokens, g.text) for g in found] == [(g.tokens, g.text) for g in ar]
    assert all(g.passes <= passes * (len(g.tokens) + 1) for g in found)


def test_caches_hold_what_reading_anew_gives():
  """After fresh tokens were read beside windows, keys and values are those of the clean stream over the whole text."""
  r = run()
  model, shaping = r.model.clone(stacked=False), logits_lib.LogitsProcessor(1.0, 1.0, suppressed=(0,))
  params = evo_lib.unstack_layers(r.params)
  token = jnp.zeros((3, 64), jnp.int32).at[:, 1:6].set(jnp.arange(1, 6)).at[1, 4:6].set(0)
  known = jnp.arange(64) < jnp.array([6, 4, 6])[:, None]
  keys = jax.random.split(jax.random.key(0), 3)

  @functools.partial(jax.jit, static_argnames="mode")
  def write(params, statistics, mode):
    net = model.bind({"params": params})
    texts = state_lib.prefill(net, token, known, 8, jnp.array([6, 4, 6]), jnp.array([29, 31, 31]), keys, (0,))
    step = lambda t: modes.ar_pass(net, t, shaping)
    if mode == "adaptive":
      texts = state_lib.with_latents(texts, net.codes())
      step = lambda t: modes.adaptive_pass(
        net, statistics, t, modes.WindowSchedule(policies.make_policy("spread:1", 8, 0.5), 8), shaping
      )
    if mode == "verify":
      texts = texts.replace(draft=state_lib.Draft.empty(3, 3, model.rows))
      step = lambda t: speculative.verify_round(net, statistics, t, shaping, 3)
    texts = modes.run_passes(step, texts, 40)
    return texts, net.clean(texts.tokens)[1]

  for mode in ("ar", "adaptive", "verify"):
    texts, cache = write(params, r.statistics, mode)
    assert np.asarray(texts.done).all() and (np.asarray(texts.cached) >= np.array([20, 20, 20])).all()
    for row, n in enumerate(np.asarray(texts.cached)):
      for found, anew in zip(texts.k + texts.v, cache.k + cache.v):
        np.testing.assert_allclose(found[row, :, :n], anew[row, :, :n], atol=2e-5)


def test_layers_apart_compute_what_stacked_layers_do():
  tokens = jax.random.randint(jax.random.key(0), (2, 20), 1, 20)
  r = run()
  stacked = r.model.clone(stacked=True)
  apart = r.model.clone(stacked=False)
  np.testing.assert_allclose(
    stacked.apply({"params": r.params}, tokens),
    apart.apply({"params": evo_lib.unstack_layers(r.params)}, tokens),
    atol=1e-5,
  )


@pytest.mark.parametrize("fields", (dict(mode="ar"), dict(mode="adaptive", threshold=1.0)), ids=name)
def test_models_trained_with_rematerialization_decode(fields):
  """What the backward pass keeps in training changes no text."""
  prompts = ["a", "bcd"]
  plain = sampler(max_tokens=8, **fields)(prompts)
  rematerialized = sampler(changes=(("model__remat", "full"),), max_tokens=8, **fields)(prompts)
  assert [g.tokens for g in rematerialized] == [g.tokens for g in plain]


def test_shaping_is_what_its_names_say():
  logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05]))
  p = lambda **kw: np.exp(
    logits_lib.LogitsProcessor(kw.pop("temperature", 1.0), kw.pop("top_p", 1.0), **kw)(jnp.asarray(logits))
  )
  np.testing.assert_allclose(p(greedy=True), [1, 0, 0, 0, 0])
  np.testing.assert_allclose(p(temperature=0.5), np.exp(2 * logits) / np.exp(2 * logits).sum(), rtol=1e-5)
  np.testing.assert_allclose(p(top_k=2), [5 / 7, 2 / 7, 0, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(p(top_p=0.69, use_top_p=True), [5 / 7, 2 / 7, 0, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(p(top_p=0.71, use_top_p=True), [50 / 85, 20 / 85, 15 / 85, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(p(suppressed=(0,)), [0, 0.4, 0.3, 0.2, 0.1], rtol=1e-5)


@pytest.mark.parametrize("fields", (dict(mode="flow", steps=3), dict(mode="adaptive", threshold=1.0)), ids=name)
def test_infilling_keeps_the_text_around_its_gaps(fields):
  """Several gaps, one longer than a window, one at the beginning; a gap sees what stands behind it."""
  write = sampler(max_tokens=8, **fields)
  texts = ["abc[...3]defgh[...11]ij", "[...2]abcabcabcabcabcabcabc"]
  found = write(texts, infill=True, num=2)
  assert [len(g.text) for g in found] == [24, 24, 23, 23] and [len(g.tokens) for g in found] == [14, 14, 2, 2]
  for g in found[:2]:
    assert g.text[:3] == "abc" and g.text[6:11] == "defgh" and g.text[22:] == "ij"
  assert found[2].text[2:] == "abc" * 7 and all(0 < s <= g.passes for g in found for s in g.settled)
  greedy = sampler(max_tokens=8, greedy=True, **fields)
  assert (
    len({greedy([f"abc[...3]{rest}"], infill=True)[0].text[3:6] for rest in ("defg", "ssss", "abab", "qrqr", "hhhh")})
    > 1
  )


def test_stop_strings_end_texts_before_themselves():
  write = sampler(max_tokens=20, mode="ar", endless=True)
  text = write(["a"], seed=3)[0].text
  stop = text[7:9]
  cut = sampler(max_tokens=20, mode="ar", endless=True, stop=(stop,))(["a"], seed=3)[0]
  assert cut.text == text[: text.index(stop)] and len(cut.tokens) == len(cut.text)


def test_text_streams_as_it_is_settled():
  for fields in (
    MODES[0],
    MODES[6] | {"window": 8},
    MODES[8],
  ):  # all of which take more passes than lie between two looks
    pieces = {0: [], 1: []}
    found = sampler(max_tokens=20, endless=True, **fields)(
      ["a", "bc"], on_text=lambda i, piece: pieces[i].append(piece)
    )
    assert ["".join(pieces[i]) for i in (0, 1)] == [g.text for g in found] and len(pieces[0]) > 1


def test_calls_of_like_shape_share_compiled_code():
  write = sampler_lib.Sampler(run(), settings.Sampling(max_tokens=10), one_device())
  write(["a", "bc"])
  spent = write.compile_seconds
  write(["abcdefgh", "b"], seed=9)
  assert spent > 0 and write.compile_seconds == spent


def test_a_mesh_writes_the_same_texts():
  """Rows over data and fsdp, heads and vocabulary over tensor: the tokens of one device."""
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  changes = dict(model__kv_heads=2)
  for fields in (dict(mode="ar"), dict(mode="adaptive", threshold=1.0), dict(mode="verify", draft=2)):
    sampling = settings.Sampling(max_tokens=12, **fields)
    many, single = (
      sampler_lib.Sampler(run(20, **changes), sampling, m)(["a", "bcd", "efghij"], seed=4) for m in (mesh, one_device())
    )
    assert [g.tokens for g in many] == [g.tokens for g in single]


@pytest.mark.parametrize(
  "fields,problem",
  [
    (dict(mode="spiral"), "--mode=spiral"),
    (dict(temperature=0.0), "--temperature=0.0: is not positive"),
    (dict(top_p=0.0), "--top_p=0.0"),
    (dict(top_k=-1), "--top_k=-1"),
    (dict(mode="adaptive", threshold=-0.1), "--threshold=-0.1: is not"),
    (dict(mode="adaptive", path="confidence", threshold=1.5), "--threshold=1.5: is not in [0, 1]"),
    (dict(mode="adaptive", path="diagonal"), "--path=diagonal"),
    (dict(mode="verify", path="diagonal"), "--path=diagonal: goes with"),
    (dict(mode="flow", path="learned"), "has a shared clock"),
    (dict(mode="flow", grid="0.5,0.8"), "--grid=0.5,0.8"),
    (dict(mode="flow", path="streams:2", grid="precision"), "--grid=precision: does not go with"),
    (dict(window=64), "--window=64: is more than the context"),
    (dict(stepper="rk4"), "--stepper=rk4"),
    (dict(draft=99), "--draft=99"),
    (dict(stop=("",)), "--stop"),
  ],
  ids=lambda x: str(x)[:40],
)
def test_impossible_settings_are_named(fields, problem):
  with pytest.raises(UserError) as error:
    settings.check_sampling(settings.Sampling(**fields), run().config)
  assert problem in str(error.value)


@pytest.mark.parametrize(
  "prompt,infill,problem",
  [
    ("aé", False, "has no 'é'"),
    ("a" * 40, False, "do not fit the context of 32"),
    ("abc", True, "has no gap"),
    ("a[...40]", True, "do not fit the context of 32"),
  ],
)
def test_impossible_prompts_are_named(prompt, infill, problem):
  with pytest.raises(UserError, match=problem):
    sampler(max_tokens=8, mode="flow", steps=2)([prompt], infill=infill)


def test_grids_of_the_clock():
  """Even in t; even in log-precision, so that the ratios of precisions are alike; or given."""
  warp = run().statistics.warp
  steps = lambda **kw: settings.clock_steps(settings.Sampling(mode="flow", **kw), "diagonal:6", warp)
  assert steps() is None
  np.testing.assert_allclose(steps(grid="0.9,0.5"), [0.0, 0.1, 0.5, 1.0], atol=1e-6)
  s = np.asarray(steps(grid="precision"))
  assert s.shape == (7,) and (np.diff(s) > 0).all()
  ratios = np.diff(np.log(np.asarray(warp.precision(jnp.asarray(1.0 - s[1:-1])))))
  np.testing.assert_allclose(ratios, ratios[0], rtol=2e-2)
  found = sampler(max_tokens=8, mode="flow", grid="0.9,0.5", endless=True)(["a"])[0]
  assert found.passes == 3


def test_diffusion_alone_decodes_whole_texts():
  """A model without a clean stream reads its prompt inside the window: what it writes follows from the prompt and is
  known after as many passes as the path takes; other modes are refused."""
  r = run(loss__ar_weight=0.0, window__size=32, window__count=1)
  # Of random parameters, whose beliefs are all alike, others that tell tokens apart.
  r = dataclasses.replace(r, params=r.params | {"final_norm": 8.0 * r.params["final_norm"]})
  sampling = settings.Sampling(mode="flow", path="certain:7", max_tokens=14, greedy=True, endless=True)
  found = sampler_lib.Sampler(r, sampling, one_device())(["abcd", "lkji"])
  assert [(len(g.tokens), g.passes) for g in found] == [(14, 2), (14, 2)] and found[0].tokens != found[1].tokens
  tokens = jnp.zeros((1, 33), jnp.int32).at[0, 1:5].set(jnp.arange(1, 5))
  time = jnp.where((jnp.arange(33) < 5) | (jnp.arange(33) > 18), 0.0, 1.0)[None]

  @jax.jit
  def believes(params, statistics):
    net = r.model.bind({"params": params})
    (x,) = net.embed(
      (latents_lib.Latent(jnp.zeros((1, 33, 8)), time, tokens),), (net.codes(),), statistics.log_unigram_V
    )
    # Places behind the text are not there.
    hidden = net.window(None, WindowInputs(jnp.zeros((1, 1), jnp.int32), x[:, None, :19], time[:, None, :19]))
    return net.logits(hidden[0, 0, 4:18]).at[:, 0].set(-jnp.inf)

  p = jax.nn.softmax(believes(r.params, r.statistics))
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0.0), axis=-1)
  first = np.asarray(found[0].settled) == 1
  assert first[0] and first.sum() == 7  # the leftmost, and the most certain
  # Entropies spread over 0.1 nats; the flow starts at the least precision, whose noise moves them by less than 0.01.
  assert entropy[1:][first[1:]].max() < entropy[1:][~first[1:]].min() + 0.01
  assert (np.asarray(found[0].tokens)[first] == p.argmax(axis=-1)[first]).all()
  with pytest.raises(UserError, match="--mode=ar: the model is of diffusion alone"):
    settings.check_sampling(settings.Sampling(mode="ar"), r.config)

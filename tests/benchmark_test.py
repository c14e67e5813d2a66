"""Benchmarks: texts as pairs of ids, answers that are kept, bounds of continuations, tables, the harness and its tasks.

What needs lm-evaluation-harness is marked `extended`; sandbox_test.py has what runs a model's programs.
"""

import dataclasses
import functools
import itertools
import json
import random
import sys
import time
import types
from unittest import mock

from conftest import assert_refused, call, run
from decode_test import one_device
from decode_test import run as random_run
from huggingface_test import FOLDER, load
import jax
import jax.numpy as jnp
import numpy as np
from processes_test import assert_well, ends, processes
import pytest

from evo_jax import config as config_lib
from evo_jax.benchmarks import published, tasks
from evo_jax.benchmarks.answers import Likelihoods, Progress, Question, Texts, complete
from evo_jax.benchmarks.kept import KeptAnswers
from evo_jax.benchmarks.pairs import Encoder, Pair, fitted, fitted_prompt, windows
from evo_jax.benchmarks.table import format_table, make_rows
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
from evo_jax.evaluation import batches, continuations
from evo_jax.evaluation.continuations import ContinuationScorer, parts
from evo_jax.evaluation.prefix_trees import PrefixTreeScorer
from evo_jax.flow.bound import window_logits
from evo_jax.flow.latents import Latent
from evo_jax.flow.schedules import OwnPath
from evo_jax.parallel import sharding

V, CONTEXT = 20, 96
ADAPTIVE = Sampling(mode="adaptive", threshold=1.0, greedy=True, max_tokens=6)


def model():
  return random_run(V, model__context=CONTEXT)


@pytest.fixture(scope="module")
def engine():
  modes = [Sampling(), Sampling(mode="adaptive", threshold=1.0)]
  with Engine(model(), rows=2, modes=modes, page=16, infill=True, mesh=one_device()) as engine:
    yield engine


def nowhere():
  return KeptAnswers(None, "answers", {})


# Texts as ids.


@pytest.mark.parametrize("name", ["smollm", "llama3", "llama2", "mistral", "unigram"])
def test_a_pair_is_encoded_as_one_text(name):
  """White space at the context's end moves to the continuation, and the whole has at most one begin token."""
  tokenizer = load(name)
  encoder = Encoder(tokenizer)
  assert encoder.adds_begin == tokenizer.adds_begin
  for context, continuation in (
    ("The answer is", " 42"),
    ("The answer is ", "42"),
    ("Question:\n", " yes\n"),
    ("a", "b"),
  ):
    pair = encoder.pair(context, continuation)
    whole = encoder.encode(context + continuation)
    assert [*pair.continuation] == whole[len(pair.context) :]
    assert whole.count(tokenizer.begin_id) == tokenizer.adds_begin == (whole[0] == tokenizer.begin_id)
    assert [*pair.context] == encoder.encode(context.rstrip())
  assert encoder.pair("The answer is ", "42") == encoder.pair("The answer is", " 42")


@pytest.mark.parametrize("name", ["smollm", "llama3"])
def test_an_empty_context_is_a_begin_token(name):
  tokenizer = load(name)
  encoder = Encoder(tokenizer)
  assert encoder.prefix_id == tokenizer.special[tokenizer.named["bos_token"]]
  pair = encoder.pair("", "the river")
  assert pair == Pair((encoder.prefix_id,), tuple(tokenizer.encode("the river").tolist()))
  always = Encoder(tokenizer, "always")
  assert always.pair("the", " river").context[0] == always.prefix_id == tokenizer.begin_id
  assert encoder.encode_context("") == [encoder.prefix_id]
  with pytest.raises(UserError, match="--begin=never: is not one of auto, always"):
    Encoder(tokenizer, "never")


def test_special_tokens_are_meant_only_under_a_chat_template():
  tokenizer = load("smollm")
  begin = tokenizer.special["<|im_start|>"]
  assert begin in Encoder(tokenizer, special=True).encode("<|im_start|>user\nHello")
  assert begin not in Encoder(tokenizer).encode("<|im_start|>user\nHello")
  twice = Encoder(load("llama3"), special=True).encode("<|begin_of_text|>Hello")
  assert twice == Encoder(load("llama3")).encode("Hello")  # a template's own begin token is not doubled


def test_windows_predict_each_token_once_behind_as_many_as_fit():
  rng = random.Random(0)
  for _ in range(100):
    n, limit = rng.randint(1, 30), rng.randint(2, 12)
    ids = list(range(1, n + 1))
    pairs = windows((0,), ids, limit)
    assert [token for pair in pairs for token in pair.continuation] == ids
    for i, pair in enumerate(pairs):
      assert pair.context and len(pair.context) + len(pair.continuation) <= limit
      assert [*pair.context, *pair.continuation] == list(range(pair.context[0], pair.continuation[-1] + 1))
      assert i == 0 or len(pair.context) + len(pair.continuation) == limit


def test_what_is_too_long_is_cut_from_the_left_and_said():
  pair = Pair((0, 1, 2, 3, 4), (5, 6))
  assert fitted(pair, 7) == ([pair], False)
  assert fitted(pair, 5) == ([Pair((2, 3, 4), (5, 6))], True)
  long = Pair((0, 1), tuple(range(2, 10)))
  found, cut = fitted(long, 4)
  assert cut and [token for part in found for token in part.continuation] == [*range(2, 10)]
  assert fitted(Pair((0, 1), ()), 4) == ([], False)
  assert fitted_prompt([*range(10)], 5, 20) == ([*range(10)], 5, False)
  assert fitted_prompt([*range(18)], 5, 20) == ([*range(3, 18)], 5, True)
  assert fitted_prompt([*range(10)], 100, 20) == ([*range(10)], 10, False)
  assert fitted_prompt([*range(18)], 100, 20) == ([*range(8, 18)], 10, True)


# Answers.


@functools.cache
def tree_scorer(**options):
  return PrefixTreeScorer(model(), **options)


def test_likelihoods_are_the_engines(engine):
  encoder = Encoder(model().tokenizer)
  pairs = [("abcdefgh" * 3, letter) for letter in "abcabs"] + [("abc", "defg"), ("", "ab"), ("abc", "d"), ("", "a")]
  for (context, continuation), one in zip(pairs, Likelihoods(tree_scorer(), encoder, nowhere())(pairs)):
    score = engine.score(context, continuation)
    assert one.log_p == pytest.approx(score.total, abs=1e-5) and one.greedy == score.greedy.all() and not one.cut


def test_long_contexts_are_cut_and_long_texts_are_rolled():
  """So that as much is read as the model can read; the last token of a text is only predicted."""
  likelihoods, score = Likelihoods(tree_scorer(), Encoder(model().tokenizer), nowhere()), tree_scorer()
  text = "abcdefghijklmnopqrs" * 8
  ids = [0, *model().tokenizer.encode(text).tolist()]
  whole = ids + [1, 2, 3]
  (cut,) = likelihoods([(text, "abc")])
  (want,) = score([(whole[-CONTEXT - 1 : -3], whole[-3:])])
  assert cut.cut and cut.log_p == pytest.approx(want.total, abs=1e-5)
  (rolled,) = likelihoods.rolling([text])
  parts = [(ids[:1], ids[1 : CONTEXT + 1]), (ids[-CONTEXT - 1 : CONTEXT + 1], ids[CONTEXT + 1 :])]
  assert rolled.log_p == pytest.approx(sum(bound.total for bound in score(parts)), abs=1e-4)


def test_texts_are_the_samplers_and_repeated_questions_have_numbers(engine):
  r = model()
  texts = Texts(engine, Encoder(r.tokenizer), nowhere(), seed=5)
  sampling = Sampling(max_tokens=12, temperature=0.7)
  found = texts([Question("abc", sampling), Question("abc", sampling, number=1), Question("de", sampling)])
  want = Sampler(r, sampling, one_device())(["abc", "de"], 2, seed=5)
  assert [answer.text for answer in found] == [want[0].text, want[1].text, want[2].text]
  assert len({answer.text for answer in found}) > 1
  want = Sampler(r, dataclasses.replace(sampling, endless=True), one_device())(["abc"], 1, seed=5)[0].text
  stop = want[3:5], want[5:8]
  (stopped,) = texts([Question("abc", dataclasses.replace(sampling, endless=True, stop=stop))])
  assert stopped.text == min((want.split(string)[0] for string in stop), key=len) != want
  (short,) = texts([Question("abcdefghijkl" * 8, Sampling(max_tokens=200, greedy=True))])
  assert short.cut and short.tokens <= CONTEXT // 2


def test_a_gap_is_filled_in_the_length_whose_document_is_the_most_probable(engine):
  encoder, document = Encoder(model().tokenizer), ("abc", "fghij")
  question = Question("fghij\n\nabc", ADAPTIVE, document=document)
  (answer,) = Texts(engine, encoder, nowhere(), gaps=(2, 5))([question])
  alone = [Texts(engine, encoder, nowhere(), gaps=(gap,))([question])[0] for gap in (2, 5)]
  assert answer.passes == sum(one.passes for one in alone) + 2 and len(alone[0].text) == 2  # both were scored
  assert answer.tokens == next(one.tokens for one in alone if one.text == answer.text)
  score = lambda text: engine.score(document[0], text + document[1]).total
  assert answer.text == max((one.text for one in alone), key=score)
  assert Texts(engine, encoder, nowhere(), gaps=(5,))([question]) == alone[1:]


def test_a_killed_evaluation_goes_on_and_other_settings_are_not_mixed_up(tmp_path):
  asked = []

  def compute(numbers, fail_at=None):
    for place, number in enumerate(numbers):
      if place == fail_at:
        raise KeyboardInterrupt
      asked.append(number)
      yield place, number * 10

  requests, sizes = [("pair", f"{i % 4}") for i in range(6)], [1] * 6
  kept = KeptAnswers(str(tmp_path), "answers", {"seed": 0})
  with pytest.raises(KeyboardInterrupt):
    complete(kept, requests, lambda numbers: compute(numbers, 2), "answers", sizes)
  with pytest.raises(UserError, match="another process is writing there"):
    KeptAnswers(str(tmp_path), "answers", {"seed": 0})
  kept.close()
  (file,) = tmp_path.iterdir()
  with file.open("ab") as end:
    end.write(b'{"key": "half a li')  # as a killed process leaves it
  kept = KeptAnswers(str(tmp_path), "answers", {"seed": 0})
  assert complete(kept, requests, compute, "answers", sizes) == [0, 10, 20, 30, 0, 10] and asked == [0, 1, 2, 3]
  kept.close()
  assert complete(KeptAnswers(str(tmp_path), "answers", {"seed": 0}), requests, None, "answers", sizes)[3] == 30
  other = KeptAnswers(str(tmp_path), "answers", {"seed": 1})
  assert complete(other, requests[:1], compute, "answers", sizes) == [0] and len(asked) == 5
  file.write_bytes(file.read_bytes().replace(b'"value"', b'"valve"'))
  with pytest.raises(UserError, match="is damaged"):
    KeptAnswers(str(tmp_path), "answers", {"seed": 0}).close()


def test_the_time_left_follows_what_requests_take(monkeypatch, capsys):
  """The longest come first: half of the work may be a tenth of the requests."""
  now = 0.0
  monkeypatch.setattr(time, "monotonic", lambda: now)
  with Progress(12, 2, "texts", work=100) as progress:
    now = 120.0
    progress.advance(50)
    now = 130.0
    progress.advance(10)
  assert capsys.readouterr().err == "evo_jax: 3 of 12 texts, 2 minutes left\n"  # at most one a minute


# Bounds of continuations.


@functools.cache
def scorer(path, draws=1):
  return ContinuationScorer(model(), path, draws)


def random_pairs():
  rng = np.random.default_rng(0)
  sizes = [(1, 19), (10, 10), (19, 1), (12, 8)]  # all of one length, for few programs in the slow computation
  return [([0, *rng.integers(1, V - 1, c - 1).tolist()], rng.integers(1, V - 1, n).tolist()) for c, n in sizes]


def tree_pairs():
  """Continuations of one context, of one that goes on behind it, and of others; one pair twice."""
  rng = np.random.default_rng(1)
  context, *others = (rng.integers(1, V - 1, n).tolist() for n in (40, 8, 60, 1, 30))
  answers = [rng.integers(1, V - 1, n).tolist() for n in (1, 1, 5, 9)]
  pairs = [(context, answer) for answer in answers] + [(context + others[0], answer) for answer in answers]
  return [*pairs, *((other, answers[2]) for other in others), (context, answers[3]), (context[:30], context[30:])]


@pytest.mark.parametrize("share", [True, False])
def test_trees_give_each_pair_what_it_has_alone(engine, share):
  pairs = tree_pairs()
  with mock.patch.object(batches, "_QUERIES", (48, 48)):
    found = tree_scorer(share=share)(pairs)
  for (context, continuation), bound in zip(pairs, found):
    score = engine.submit_score(context[1:], continuation, begin=context[0]).result()
    assert bound.total == pytest.approx(score.total, abs=1e-4) and bound.greedy == score.greedy.all()
    assert (bound.stderr, bound.passes) == (None, len(continuation))


def test_what_pairs_have_in_common_is_read_once():
  context = [i % V for i in range(CONTEXT - 4)]
  pairs = [(context, [1 + i, 2]) for i in range(8)]
  passes = lambda **options: len(list(tree_scorer(**options).batches(pairs)))
  assert (passes(), passes(share=False)) == (1, 8)


def test_trees_over_a_mesh():
  """Packs are shared out among the devices, where the last pass has empty ones."""
  r = random_run(V, model__context=CONTEXT, model__kv_heads=2)
  over = PrefixTreeScorer(r.on(sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))))
  pairs = [([i, *context], answer) for i in range(5) for context, answer in tree_pairs()]
  for bound, want in zip(over(pairs), PrefixTreeScorer(r)(pairs)):
    assert bound.nats == pytest.approx(want.nats, abs=1e-4) and bound.greedy == want.greedy
  assert over.rows == 4 and over.compilations <= 2


def test_pairs_that_cannot_be_scored_are_refused():
  for pair in (([], [1]), ([1], []), ([1] * CONTEXT, [1, 1])):
    with pytest.raises(UserError, match=f"together at most {CONTEXT + 1}"):
      tree_scorer()([pair])
  with pytest.raises(UserError, match="'ar': has no windows"):
    scorer("ar")


@pytest.mark.parametrize("path, step", [("staircase", 1), ("left:3", 3)])
def test_the_bound_is_that_of_reading_the_windows_one_by_one(path, step):
  """Token by token, with an unpadded clean stream: in windows of 8, each known or not: those behind the end
  come last on such paths, and change nothing."""
  r = model()
  pairs = random_pairs()[1:]
  for (context, continuation), bound in zip(pairs, scorer(path, draws=2)(pairs)):
    tokens, nats, greedy, passes = [*context, *continuation], 0.0, True, 0
    for start in range(len(context), len(tokens), r.config.window.size):
      count = min(r.config.window.size, len(tokens) - start)
      for first in range(0, count, step):
        log_p = log_beliefs()(jnp.array(tokens), jnp.int32(start), jnp.int32(first))
        for i in range(first, min(first + step, count)):
          nats -= float(log_p[i, tokens[start + i]])
          greedy &= int(jnp.argmax(log_p[i])) == tokens[start + i]
        passes += 1
    assert bound.nats == pytest.approx(nats, abs=2e-4) and bound.greedy == greedy and bound.passes == passes
    assert bound.stderr == pytest.approx(0.0, abs=1e-5)  # nothing is drawn on such a path


@functools.cache
def log_beliefs():
  """Of the tokens (L,), those of the window from `start` on, (8, V), whose first `known` are known, the others not."""
  r = model()
  net, size = r.model.bind({"params": r.params}), r.config.window.size

  @jax.jit
  def program(tokens, start, known):
    _, cache = net.clean(tokens[None])
    part = jnp.take(tokens, start + jnp.arange(size), mode="clip")
    time = jnp.where(jnp.arange(size) < known, 0.0, 1.0)
    latent = Latent(jnp.zeros((1, 1, size, r.config.model.code_dim)), time[None, None], part[None, None])
    before = (start - 1)[None, None], tokens[start - 1][None, None]
    return jax.nn.log_softmax(window_logits(net, cache, *before, latent, net.codes(), r.statistics.log_unigram_V)[0, 0])

  return program


def test_a_bounds_noise_depends_on_the_pair_alone():
  noisy, pairs = scorer("diagonal:3", draws=3), random_pairs()
  found = noisy(pairs)
  (one,) = noisy(pairs[1:2])  # with fewer windows beside it
  assert one.nats == pytest.approx(found[1].nats, abs=1e-4) and one.stderr == pytest.approx(found[1].stderr, abs=1e-4)
  assert found[1].stderr > 1e-3 and len({bound.stderr for bound in found}) == len(found)
  own = OwnPath(lambda s, tokens: 1.0 - s + 0.0 * jnp.arange(tokens), 3)  # the diagonal, as one's own function
  assert [bound.nats for bound in scorer(own, draws=3)(pairs)] == [bound.nats for bound in found]
  with pytest.raises(UserError, match="together at most 96"):
    noisy([([0] * 90, [1] * 7)])
  with pytest.raises(UserError, match="shared clock"):
    ContinuationScorer(model(), "learned:3")


def test_a_context_is_read_once():
  """For all short continuations, and windows of long ones, whose noise does not depend on what is beside them."""
  (context, long), (other, short) = random_pairs()[:2]
  pairs = [(context, long), *((context, [i]) for i in range(2, 6)), (other, short), (context + long[:8], long[8:])]
  wanted = scorer("diagonal:3", draws=2)
  alone = [wanted([pair])[0] for pair in pairs]
  shared = dict(itertools.chain(*(zip(*batch) for batch in wanted.batches(pairs))))
  with mock.patch.object(continuations, "_MOST_WINDOWS", 2):
    apart = wanted(pairs)
  with mock.patch.object(continuations, "_PACK", (1, 1)):
    in_rows = wanted(pairs)
  for number, bound in enumerate(alone):
    for again in (shared[number], apart[number], in_rows[number]):
      assert again.nats == pytest.approx(bound.nats, abs=1e-4) and again.passes == bound.passes
      assert again.stderr == (bound.stderr and pytest.approx(bound.stderr, abs=1e-4))
  assert [sorted(numbers) for numbers, _ in wanted.batches(pairs[:5])] == [[0, 1, 2, 3, 4]]


def test_short_texts_are_read_together():
  pairs = [([i, *range(20)], [i]) for i in range(4)]
  few = ContinuationScorer(model(), "left:3", rows=1, lengths=(CONTEXT,))
  assert [sorted(numbers) for numbers, _ in few.batches(pairs)] == [[0, 1, 2, 3]]
  assert len(list(few.batches([([i, *range(50)], [i]) for i in range(4)]))) == 4  # two do not fit


def test_a_long_continuation_is_its_parts():
  pair = Pair((0, 1), (2, 3, 4, 5, 6))
  assert parts(pair, 2) == [Pair((0, 1), (2, 3)), Pair((0, 1, 2, 3), (4, 5)), Pair((0, 1, 2, 3, 4, 5), (6,))]
  context, continuation = random_pairs()[1]
  (whole,) = scorer("left:3", draws=2)([(context, continuation)])
  split = scorer("left:3", draws=2)(parts(Pair(tuple(context), tuple(continuation)), model().config.window.size))
  assert sum(bound.nats for bound in split) == pytest.approx(whole.nats, abs=1e-4) and len(split) == 2


def test_likelihoods_by_a_path_have_the_sign_of_likelihoods():
  by_path, tokenizer = scorer("left:3", draws=2), model().tokenizer
  (found,) = Likelihoods(by_path, Encoder(tokenizer), nowhere())([("abcdef", "ghijk")])
  (bound,) = by_path([([0, *tokenizer.encode("abcdef")], tokenizer.encode("ghijk").tolist())])
  assert found.log_p == pytest.approx(-bound.nats) and found.log_p < 0


# Suites and tables.


def test_suites_are_those_of_the_published_tables():
  assert len(tasks.EVO15) == 15 and {b.task: b.shots for b in tasks.EVO15}["mmlu"] == 5
  names = {benchmark.task for benchmark in tasks.EVO15}
  for model_name, figures in published.FIGURES.items():
    assert set(figures) <= names and model_name in published.SETTINGS
  assert [b.task for b in tasks.parse_tasks("quick,gsm8k,quick")][-1] == "gsm8k"
  assert tasks.parse_tasks("swag") == (tasks.Benchmark("swag"),)
  with pytest.raises(UserError, match="--tasks=a,,b: has an empty name"):
    tasks.parse_tasks("a,,b")
  assert tasks.local_documents("mmlu_anatomy").folder == "mmlu/anatomy"
  assert tasks.local_documents("cmmlu_anatomy").folder == "cmmlu/anatomy"
  assert tasks.local_documents("swag") is None


RESULTS = {
  "results": {
    "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.01},
    "mmlu_anatomy": {"sample_len": 3},
    "mmlu_law": {"sample_len": 5},
    "bbh": {"exact_match,get-answer": 0.25, "exact_match_stderr,get-answer": "N/A"},
    "bbh_navigate": {"sample_len": 1},
    "bbh_snarks": {"sample_len": 3},
    "gsm8k": {"sample_len": 4, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
    "lambada_openai": {"sample_len": 9, "perplexity,none": 12.5, "perplexity_stderr,none": 1.5, "acc,none": 1.0},
  },
  "n-shot": {"mmlu_anatomy": 5, "mmlu_law": 5, "bbh_navigate": 3, "bbh_snarks": 3, "gsm8k": 4, "lambada_openai": 0},
  "samples": {
    "bbh_navigate": [{"filter": "get-answer", "exact_match": 1.0}, {"filter": "other", "exact_match": 0.0}],
    "bbh_snarks": [{"filter": "get-answer", "exact_match": 0.0}] * 3,
    "gsm8k": [{"filter": "strict-match", "exact_match": 1.0}] * 2,
  },
}


def test_a_row_says_what_it_is_of():
  members = {"mmlu": ["mmlu_anatomy", "mmlu_law"], "bbh": ["bbh_navigate", "bbh_snarks"]}
  members |= {"gsm8k": ["gsm8k"], "lambada_openai": ["lambada_openai"]}
  counts = {
    "mmlu_law": {"requests": 4, "cut": 2, "draws_variance": 4 * 0.25},
    "gsm8k": {"tokens": 40, "passes": 10},
  }
  rows = make_rows(RESULTS, members, counts, "streams:2", {"mmlu_law": "validation for test"})
  mmlu, bbh, gsm8k, perplexity, _ = rows
  assert (mmlu["value"], mmlu["stderr"], mmlu["items"], mmlu["shots"], mmlu["cut"]) == (25.0, 1.0, 8, 5, 2)
  assert mmlu["draws_stderr"] == pytest.approx(0.5) and mmlu["published"]["Evo 8B"] == 78.6
  assert bbh["value"] == 25.0 and bbh["stderr"] == pytest.approx(25.0)  # of 1, 0, 0, 0; the harness says nothing
  assert gsm8k["passes_per_token"] == 0.25 and gsm8k["stderr"] is None and gsm8k["filter"] == "strict-match"
  assert (perplexity["metric"], perplexity["value"], perplexity["stderr"]) == ("perplexity", 12.5, 1.5)
  text = format_table(rows, {"gpqa_main_n_shot": "no documents"})
  assert "mmlu*" in text and "validation for test (mmlu)" in text and "2 requests were cut" in text
  assert "0.500 nats" in text and "gpqa_main_n_shot: left out: no documents" in text
  assert "LLaDA 8B: 2.3T tokens" in text and len({line.index("metric") for line in text.splitlines()[:1]}) == 1


# The command.

BAD = [
  (["--mode=ar,fast"], "--mode=ar,fast: 'fast' is not one of ar, flow, adaptive, verify"),
  (["--mode=adaptive", "--threshold=low"], "--threshold=low: is not a list of numbers"),
  (["--path=spiral"], "path 'spiral': not one of"),
  (["--tasks="], "--tasks=: has an empty name"),
  (["--limit=-1"], "--limit=-1: is negative"),
  (["--draws=0"], "--draws=0: is not positive"),
  (["--gap=0"], "--gap=0: is not a list of numbers of tokens"),
  (["--system_instruction=Hi"], "--system_instruction: is of a conversation"),
  (["--data=/no/such/folder"], "--data=/no/such/folder: is no folder"),
  (["--workdir=gs://bucket/run"], "--output: answers are kept in a local folder"),
  (["--output=/proc/answers"], "--output=/proc/answers: cannot be made"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_flags_are_one_line(arguments, message):
  assert_refused(call("evo_jax.benchmark", *arguments), message)


def test_without_the_extra_one_line_names_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.delitem(sys.modules, "evo_jax.benchmarks.harness", raising=False)
  assert_refused(
    call("evo_jax.benchmark", "--workdir=x"), "benchmarks need the package lm_eval: pip install 'evo_jax[bench]'"
  )


# With the harness.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A few documents of made-up tasks."""
  folder = tmp_path_factory.mktemp("bench")
  words = ["the", "flow", "token", "river", "time", "is", "known", "at", "last"]
  rng = random.Random(0)
  sentence = lambda n=5: " ".join(rng.choice(words) for _ in range(n))
  documents = {
    "piqa/validation": [dict(goal=sentence(), sol1=sentence(), sol2=sentence(3), label=i % 2) for i in range(6)],
    "gsm8k/test": [dict(question=sentence(), answer=f"{sentence()} #### {i}") for i in range(4)],
    "gsm8k/train": [dict(question=sentence(2), answer=f"{sentence(2)} #### {i}") for i in range(6)],
    "humaneval/test": [
      dict(task_id=str(i), prompt="def f():\n", entry_point="f", canonical_solution="", test="def check(f): pass")
      for i in range(2)
    ],
    "humaneval_infilling/single_line/test": [
      dict(
        task_id=str(i), prompt="def f():\n", suffix="  return 1\n", entry_point="f", canonical_solution="  x = 1\n",
        test="def check(f): assert f() == 1",
      )
      for i in range(2)
    ],
  }  # fmt: skip
  for subject in ("anatomy", "virology"):
    questions = [
      dict(question=sentence(), subject=subject, choices=[sentence(1) for _ in range(4)], answer=i % 4)
      for i in range(5)
    ]
    documents |= {f"mmlu/{subject}/dev": questions[:2], f"mmlu/{subject}/validation": questions[2:]}
  for name, lines in documents.items():
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


@pytest.mark.extended
def test_the_command_goes_on_behind_what_is_kept(trained, data, tmp_path):
  flags = [f"--workdir={trained}", f"--data={data}", f"--output={tmp_path / 'kept'}", "--rows=2", "--shots=1"]
  flags += ["--tasks=piqa,mmlu,gsm8k,arc_challenge", "--path=ar,streams:2", "--draws=2", "--mode=ar,adaptive"]
  flags += ["--threshold=0.2,0.4", f"--json={tmp_path / 'table.json'}"]
  done = run("evo_jax.benchmark", *flags)
  assert done.returncode == 0, done.stderr
  table = json.loads((tmp_path / "table.json").read_text())
  found = {(row["task"], row["by"]): row for row in table["rows"]}
  assert {by for _, by in found} == {"ar", "streams:2", "adaptive:0.2", "adaptive:0.4"}
  assert found["mmlu", "ar"]["items"] == 6 and found["mmlu", "ar"]["substituted"] == "validation for test"
  assert found["gsm8k", "ar"]["passes_per_token"] == 1.0 and found["gsm8k", "adaptive:0.4"]["passes_per_token"] < 1.0
  assert found["piqa", "streams:2"]["draws_stderr"] > 0  # of what is drawn behind the continuations' ends
  assert "arc_challenge: left out: no documents" in done.stdout
  kept = read_kept(tmp_path / "kept")
  assert len(kept) == 5  # two kinds of likelihoods, three of texts
  for file in (tmp_path / "kept").iterdir():
    lines = file.read_bytes()
    file.write_bytes(lines[: len(lines) * 2 // 3])  # as if it had been killed
  again = run("evo_jax.benchmark", *flags)
  assert again.stdout == done.stdout
  for name, values in read_kept(tmp_path / "kept").items():
    assert values.keys() == kept[name].keys()
    for key, value in values.items():  # a likelihood is rounded by what is scored beside it
      want = kept[name][key]
      if "log_p" in value:
        want |= {"log_p": pytest.approx(want["log_p"], abs=1e-4), "stderr": mock.ANY}
      assert value == want


def read_kept(folder):
  """Values by key of the files in which answers are kept."""
  lines = {file.name: map(json.loads, file.read_text().splitlines()) for file in folder.iterdir()}
  return {name: {line["key"]: line["value"] for line in some if "key" in line} for name, some in lines.items()}


@pytest.mark.extended
def test_infilling_stands_beside_the_text_from_left_to_right(trained, data, tmp_path):
  flags = [f"--workdir={trained}", f"--data={data}", f"--output={tmp_path / 'kept'}", "--rows=2", "--gap=4,8"]
  flags += ["--tasks=humaneval,humaneval_single_line_infilling", "--mode=adaptive"]
  assert_refused(run("evo_jax.benchmark", *flags), "nothing is left: humaneval: runs what the model writes; --run_code")
  done = run("evo_jax.benchmark", *flags, "--run_code")
  assert done.returncode == 0, done.stderr
  rows = [line.split() for line in done.stdout.splitlines()[1:4]]
  assert [row[0] for row in rows] == ["humaneval", "humaneval_single_line_infilling", "humaneval_single_line_infilling"]
  assert "adaptive:0.25 infilling" in done.stdout


@pytest.mark.extended
def test_the_harness_has_the_tasks_of_the_suites_and_their_splits():
  from lm_eval.tasks import TaskManager

  from evo_jax.benchmarks import harness

  index = TaskManager().task_index
  for benchmark in tasks.SUITES["all"]:
    assert benchmark.task in index
    for leaf in harness._leaves(index, benchmark.task):
      runs = bool((index[leaf].cfg or {}).get("unsafe_code"))
      assert runs == (benchmark.task in tasks.RUNS_CODE)
      documents = tasks.local_documents(leaf)
      if benchmark.task == "gpqa_main_n_shot":
        continue
      config = {**index[leaf].cfg, **documents.changes}
      asked = config.get("test_split") or config.get("validation_split")
      assert asked in documents.splits, leaf


@pytest.mark.extended
@pytest.mark.parametrize("name", ["smollm", "llama3", "llama2", "mistral"])
def test_pairs_are_those_of_the_harness(name):
  transformers = pytest.importorskip("transformers")
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM.__new__(HFLM)
  theirs.tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / name)
  theirs.custom_prefix_token_id, theirs.add_bos_token, theirs.backend = None, None, "causal"
  encoder = Encoder(load(name))
  texts = ["", "The answer is", "Question: why?\nAnswer:", "a  ", "é 世\n\n"]
  for context in texts[1:]:
    for continuation in (" yes", "A", " 42 is it.", "\n"):
      want = theirs._encode_pair(context, continuation)
      assert [list(part) for part in encoder.pair(context, continuation)] == [list(part) for part in want]
  assert encoder.prefix_id == theirs.prefix_token_id


@pytest.mark.extended
def test_several_processes_give_the_table_of_one(trained, data, tmp_path):
  flags = [f"--workdir={trained}", f"--data={data}", "--rows=2", "--tasks=piqa,gsm8k", "--shots=1", "--limit=3"]
  flags += ["--path=ar,left:2", "--draws=1"]
  alone = run("evo_jax.benchmark", *flags, f"--output={tmp_path / 'one'}")
  with processes(2, [*flags, f"--output={tmp_path / 'two'}", "--mesh=fsdp:2"], "evo_jax.benchmark") as started:
    ended = ends(started)
  assert_well(ended)
  table = lambda output: output[output.find("task ") :]  # Gloo prints in front of it
  assert table(ended[0][1]) == table(alone.stdout) and "gsm8k" in alone.stdout and "gsm8k" not in ended[1][1]


@pytest.mark.extended
@pytest.mark.parametrize("name", ["smollm", "llama3"])
def test_a_message_that_is_continued_is_that_of_transformers(name):
  """With the white space at its end, where the template keeps it."""
  transformers = pytest.importorskip("transformers")
  from evo_jax.benchmarks import harness

  ours, theirs = load(name), transformers.AutoTokenizer.from_pretrained(FOLDER / name)
  model = harness.Model(types.SimpleNamespace(tokenizer=ours), None)
  for prefix in ("\n```python\n", " yes ", "The best answer is"):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": prefix}]
    want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert model.apply_chat_template(messages, add_generation_prompt=False) == want


@pytest.mark.extended
def test_what_cannot_be_asked_is_refused_before_anything_is(trained, data, tmp_path):
  flags = [f"--workdir={trained}", f"--data={data}", f"--output={tmp_path / 'kept'}"]
  for more, message in (
    (["--tasks=mmlu_anatomy,mmlu"], "--tasks: mmlu_anatomy and mmlu have mmlu_anatomy in common"),
    (["--tasks=piqa", "--path=ar,left:2", "--window=500"], "window=500: is not from 1 to "),
  ):
    assert_refused(run("evo_jax.benchmark", *flags, *more), message)
  assert not (tmp_path / "kept").exists() or not any((tmp_path / "kept").iterdir())
  done = run("evo_jax.benchmark", *flags, "--tasks=ai2_arc,piqa")  # a tag, of tasks without documents
  assert done.returncode == 0 and "arc_challenge: left out" in done.stdout and "arc_easy: left out" in done.stdout


@pytest.mark.extended
def test_the_harness_asks_by_its_own_means(trained, data, tmp_path):
  """`simple_evaluate` with the registered name, and a conversation only where special tokens are meant as such."""
  import lm_eval

  from evo_jax.benchmarks import harness

  loaded = harness.load_tasks(tasks.parse_tasks("piqa"), str(data), None)
  arguments = {"workdir": str(trained), "rows": 8, "output": str(tmp_path)}
  results = lm_eval.simple_evaluate(
    model="evo_jax", model_args=arguments, tasks=[*loaded.tasks.values()], limit=2, bootstrap_iters=0
  )
  assert 0 <= results["results"]["piqa"]["acc,none"] <= 1 and len(results["samples"]["piqa"]) == 2
  with pytest.raises(UserError, match="needs chat=True"):
    lm_eval.simple_evaluate(
      model="evo_jax", model_args=arguments, tasks=[*loaded.tasks.values()], limit=2, apply_chat_template=True
    )

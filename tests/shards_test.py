"""Tokens on disk: what was written is read from any place, and whatever is damaged is found and named."""

import dataclasses
import re

import numpy as np
import pytest

from evo_jax.data import shards as shards_lib
from evo_jax.data.storage import Folder
from evo_jax.errors import UserError

SIZES = [5000, 1024, 1, 2 * 1024, 3000]


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
  return Folder(str(tmp_path / "data") if request.param == "local" else f"memory://{tmp_path}/data")


def write(folder, sizes=SIZES, dtype="<u2"):
  """Shards of random tokens, and all of them."""
  rng, shards, all_tokens = np.random.default_rng(0), [], []
  for i, size in enumerate(sizes):
    tokens = rng.integers(0, 2**16, size).astype(dtype)
    with shards_lib.shard_writer(folder, f"{i}.train", np.dtype(dtype)) as writer:
      for part in np.array_split(tokens, 7):
        writer.append(part)
      shards.append(writer.finish(3, 10))
    all_tokens.append(tokens)
  return tuple(shards), np.concatenate(all_tokens)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_range_is_read(folder, dtype):
  shards, tokens = write(folder, dtype=dtype)
  stream = shards_lib.TokenStream(folder, shards, np.dtype(dtype).name)
  assert stream.length == len(tokens)
  edges = sorted({0, *np.cumsum(SIZES).tolist(), 1023, 1024, 1025, 5 * 1024, stream.length - 1})
  for start in edges:
    for stop in [e for e in edges if e >= start]:
      read = stream.read(start, stop - start)
      assert read.dtype == np.dtype(dtype)
      np.testing.assert_array_equal(read, tokens[start:stop])
  assert [problem for _, problem in stream.check()] == [""] * len(shards)
  with pytest.raises(IndexError):
    stream.read(stream.length - 1, 2)


def flip(raw):
  return raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:]


@pytest.mark.parametrize(
  "damage, message",
  [
    (flip, "record 1 is damaged"),
    (lambda raw: raw[:4000], "cut off: it ends before record 1 does"),
    (lambda raw: raw[:-1], "cut off: it ends before record 4 does"),
    (lambda raw: b"", "cut off: it ends before record 0 does"),
    (lambda raw: raw[2052:] + raw[:2052], "record 0 is damaged"),
    (None, "is missing"),
  ],
)
def test_damage_is_named_when_it_is_read(folder, damage, message):
  shards, tokens = write(folder)
  raw = folder.read("0.train")
  folder.remove("0.train")
  if damage:
    folder.write_all("0.train", damage(raw))
  stream = shards_lib.TokenStream(folder, shards, "uint16")
  with pytest.raises(UserError, match=f"{re.escape(folder.path)}/0.train: .*{message}"):
    stream.read(0, 5000)
  np.testing.assert_array_equal(stream.read(5000, 100), tokens[5000:5100])  # the others can be read
  problems = [problem for _, problem in stream.check()]
  assert re.search(message, problems[0]) and problems[1:] == [""] * 4


def test_mistaken_shards_are_found(folder, tmp_path):
  shards, _ = write(folder, [3000, 3000])
  kept = folder.read("0.train")
  folder.write_all("0.train", folder.read("1.train"))
  with pytest.raises(UserError, match="0.train: record 0 is damaged: .* belongs to another data set"):
    shards_lib.TokenStream(folder, shards, "uint16").read(0, 1)
  folder.write_all("0.train", kept)
  other = dataclasses.replace(shards[0], checksum=shards[0].checksum[:-1] + "?")
  (problem,) = [problem for _, problem in shards_lib.TokenStream(folder, (other,), "uint16").check()]
  assert "is not the file that the manifest describes" in problem


@pytest.mark.parametrize("place", [0, 1500, 4999])
def test_a_shard_of_the_same_name_and_size_of_another_data_set_is_found_wherever_it_is_read(folder, tmp_path, place):
  """Though the two differ in one token alone."""
  tokens = np.random.default_rng(0).integers(0, 2**16, 5000).astype("<u2")
  shards, other = [], Folder(str(tmp_path / "other"))
  for one, value in ((folder, 7), (other, 8)):
    tokens[place] = value
    with shards_lib.shard_writer(one, "0.train", tokens.dtype) as writer:
      writer.append(tokens)
      shards.append(writer.finish(1, 5000))
  folder.write_all("0.train", other.read("0.train"))
  assert shards[0].tokens == shards[1].tokens and shards[0].checksum != shards[1].checksum
  stream = shards_lib.TokenStream(folder, (shards[0],), "uint16")
  for start in (0, 1024, 4998):
    with pytest.raises(UserError, match=r"0.train: record \d is damaged: .* belongs to another data set"):
      stream.read(start, 2)
  np.testing.assert_array_equal(shards_lib.TokenStream(folder, (shards[1],), "uint16").read(0, 5000), tokens)


def test_a_file_appears_when_it_is_complete(folder):
  folder.write_all("a", b"old")
  with pytest.raises(ZeroDivisionError), folder.write("a") as file:
    file.write(b"new")
    raise ZeroDivisionError
  assert folder.read("a") == b"old" and folder.names() == ["a"]


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "there is none"),
    (b"{", "is damaged"),
    (b"[]", "is damaged"),
    (b'{"version": 1}', "version 1 of the format, not 2: prepare the text again"),
  ],
)
def test_manifests_that_cannot_be_read_are_named(folder, content, message):
  if content is not None:
    folder.write_all("manifest.json", content)
  with pytest.raises(UserError, match=f"manifest.json: .*{message}"):
    shards_lib.read_manifest(folder.path)

"""Traces: the page and the picture hold what happened, and bad files are refused before anything is written."""

import json
import os
import re

import numpy as np
import pytest

from evo_jax.decoding import trace as trace_lib
from evo_jax.errors import UserError

PIECES = ["a", " ", "</script>", '"q"', "\n", "ß"]


def example(passes=5, tokens=6):
  """Each pass commits one token, from left to right, while the rest matures; the third is corrected."""
  k, i = np.mgrid[:passes, :tokens]
  time = np.where(i <= k, 0.0, np.clip(0.2 * (i - k), 0.1, 1.0))
  time[0, 4:] = np.nan
  event = np.where(i == k, trace_lib.JUMP, trace_lib.NONE).astype(np.int8)
  event[2, 2], event[3, 5] = trace_lib.CORRECTION, trace_lib.DRAFT
  pieces = [["" if np.isnan(t) else PIECES[j % 6] for j, t in enumerate(row)] for row in time]
  return trace_lib.Trace("say <b>", "é <i>", "flow & more", time, pieces, event)


def test_the_page_holds_the_trace(tmp_path):
  trace = example()
  trace_lib.write_trace(trace, str(tmp_path / "t.html"))
  page = (tmp_path / "t.html").read_text()
  assert "flow &amp; more" in page and "say &lt;b&gt;</b>é &lt;i&gt;</pre>" in page
  assert page.count("</script>") == 2  # those of the page itself
  assert not re.search(r"https?://", page) and "@@" not in page
  data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
  assert data["tokens"] == 6 and data["settled"] == [1] * 5
  pieces, time = np.full((5, 6), "", object), np.full((5, 6), np.nan)
  for k, row in enumerate(data["rows"]):  # a committed token has a cell only in the pass that committed it
    if k:
      committed = time[k - 1] <= 0.0
      time[k, committed], pieces[k, committed] = 0.0, pieces[k - 1, committed]
    for position, percent, piece, event in row:
      pieces[k, position], time[k, position] = data["pieces"][piece], percent / 100
      assert event == trace.event[k, position]
  np.testing.assert_allclose(time, trace.time, atol=0.01)
  assert pieces.tolist() == trace.pieces


@pytest.mark.parametrize("size", [(5, 6), (90, 300)])
def test_the_picture_is_drawn(tmp_path, size):
  trace_lib.write_trace(example(*size), str(tmp_path / "t.png"))
  assert (tmp_path / "t.png").stat().st_size > 10_000


def test_unusual_text_and_empty_text_are_drawn(tmp_path):
  """Dollar signs start no formula, half a character does not stop the page, and a text may have ended at once."""
  trace = example()
  dollars = [["$x_$" if piece else "" for piece in row] for row in trace.pieces]
  unusual = trace_lib.Trace("half \udcff", "", "ar", trace.time, dollars, trace.event)
  empty = trace_lib.Trace("", "", "ar", np.zeros((1, 0)), [[]], np.zeros((1, 0), np.int8))
  for i, trace in enumerate((unusual, empty)):
    for suffix in ("html", "png"):
      trace_lib.write_trace(trace, str(tmp_path / f"{i}.{suffix}"))
  assert "$x_$" in (tmp_path / "0.html").read_text()


def test_bad_files_are_refused_and_nothing_is_left(tmp_path):
  (tmp_path / "old.html").write_text("old")
  (tmp_path / "d.html").mkdir()
  (tmp_path / "link.PNG").symlink_to(tmp_path / "no" / "t.png")
  for path, problem in (
    (tmp_path / "t.pdf", "neither in .html nor in .png"),
    (tmp_path / "no" / "t.html", "no folder"),
    (tmp_path / "link.PNG", "no folder"),
    (tmp_path / "d.html", "is a folder"),
  ):
    with pytest.raises(UserError, match=f"--trace={re.escape(str(path))}: .*{problem}"):
      trace_lib.check_trace_file(str(path))
  trace_lib.check_trace_file(str(tmp_path / "old.html"))
  trace_lib.check_trace_file(str(tmp_path / "new.html"))
  assert (tmp_path / "old.html").read_text() == "old" and sorted(os.listdir(tmp_path)) == [
    "d.html",
    "link.PNG",
    "old.html",
  ]


@pytest.mark.parametrize("suffix", ["HTML", "PNG"])
def test_what_cannot_be_shown_is_drawn_without_a_word(tmp_path, recwarn, suffix):
  """Characters that no font has, controls, ends of lines; also where the file's name is in capitals."""
  trace = example()
  odd = [
    [["\x00", "\x1b[", "\u2028", "世", "\U0001f600", "\r\x85"][i] if piece else "" for i, piece in enumerate(row)]
    for row in trace.pieces
  ]
  file = tmp_path / f"t.{suffix}"
  trace_lib.write_trace(trace_lib.Trace("世\0", "\x1b", "ar", trace.time, odd, trace.event), str(file))
  assert file.stat().st_size > 1_000 and not recwarn.list

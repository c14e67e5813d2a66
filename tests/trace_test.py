"""The trace's page and picture hold what happened, and bad files are refused before anything is written."""

import json
import os
import re

import numpy as np
import pytest

from evo_jax.decoding import trace as trace_lib
from evo_jax.errors import UserError

PIECES = ["a", " ", "</script>", '"q"', "\n", "ß"]


def example(passes=5, tokens=6):
  """One token settles a pass from left to right; the rest matures; the third is corrected."""
  k, i = np.mgrid[:passes, :tokens]
  time = np.where(i <= k, 0.0, np.clip(0.2 * (i - k), 0.1, 1.0))
  time[0, 4:] = np.nan
  event = np.where(i == k, trace_lib.JUMP, trace_lib.NONE).astype(np.int8)
  event[2, 2], event[3, 5] = trace_lib.CORRECTION, trace_lib.DRAFT
  believed = [["" if np.isnan(t) else PIECES[j % 6] for j, t in enumerate(row)] for row in time]
  return trace_lib.Trace("say <b>", "flow & more", time, believed, event)


def test_the_page_holds_the_trace(tmp_path):
  one = example()
  trace_lib.write_trace(one, str(tmp_path / "t.html"))
  page = (tmp_path / "t.html").read_text()
  assert (
    "flow &amp; more" in page and "say &lt;b&gt;" in page and page.count("</script>") == 2
  )  # those of the page itself
  assert not re.search(r"https?://", page) and "@@" not in page
  data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
  assert data["tokens"] == 6 and data["settled"] == [1] * 5
  believed, time = np.full((5, 6), "", object), np.full((5, 6), np.nan)
  for k, row in enumerate(data["rows"]):  # a settled token is told once
    if k:
      old = time[k - 1] <= 0.0
      time[k, old], believed[k, old] = 0.0, believed[k - 1, old]
    for place, percent, piece, event in row:
      believed[k, place], time[k, place] = data["pieces"][piece], percent / 100
      assert event == one.event[k, place]
  np.testing.assert_allclose(time, one.time, atol=0.01)
  assert believed.tolist() == one.believed


@pytest.mark.parametrize("size", [(5, 6), (90, 300)])
def test_the_picture_is_drawn(tmp_path, size):
  trace_lib.write_trace(example(*size), str(tmp_path / "t.png"))
  assert (tmp_path / "t.png").stat().st_size > 10_000


def test_odd_text_and_no_text_are_drawn(tmp_path):
  """Dollars are no formulas, half a character does not stop the page, and a text may have ended at once."""
  one = example()
  odd = trace_lib.Trace(
    "half \udcff", "ar", one.time, [["$x_$" if piece else "" for piece in row] for row in one.believed], one.event
  )
  none = trace_lib.Trace("", "ar", np.zeros((1, 0)), [[]], np.zeros((1, 0), np.int8))
  for i, found in enumerate((odd, none)):
    for end in ("html", "png"):
      trace_lib.write_trace(found, str(tmp_path / f"{i}.{end}"))
  assert "$x_$" in (tmp_path / "0.html").read_text()


def test_bad_files_are_refused_and_nothing_is_left(tmp_path):
  (tmp_path / "old.html").write_text("old")
  (tmp_path / "d.html").mkdir()
  for path, problem in (
    (tmp_path / "t.pdf", "neither in .html nor in .png"),
    (tmp_path / "no" / "t.html", "no folder"),
    (tmp_path / "d.html", "is a folder"),
  ):
    with pytest.raises(UserError, match=f"--trace={re.escape(str(path))}: .*{problem}"):
      trace_lib.check_trace_file(str(path))
  trace_lib.check_trace_file(str(tmp_path / "old.html"))
  trace_lib.check_trace_file(str(tmp_path / "new.html"))
  assert (tmp_path / "old.html").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["d.html", "old.html"]

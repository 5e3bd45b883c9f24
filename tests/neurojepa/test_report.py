"""The kit of HTML pages: text stays text, numbers are set right, nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys

from neurojepa.report import Markup, page, paragraph, section, stack, table, tiles


def test_text_stays_text() -> None:
    html = page("a <b>", "c & d", [section("e <f>", paragraph("<script>")),
                                   tiles([("<1>", "<2>", "bad")]), table(["<h>"], [["<cell>"]])])
    for text in ("a <b>", "<script>", "<1>", "<2>", "<h>", "<cell>"):
        assert text not in html
    assert "a &lt;b&gt;" in html and "c &amp; d" in html and "class='tile bad'" in html


def test_numbers_are_set_right_and_markup_is_kept() -> None:
    html = table(["name", "scans", "share"], [["x", 12345, Markup("<i></i>")]])
    assert "<th class='n'>scans</th>" in html and "<td class='n'>12,345</td>" in html
    assert "<td class='bar'><i></i></td>" in html
    assert table(["name"], []) == "<p class='soft'>None.</p>"


def test_a_bar_is_as_long_as_its_share() -> None:
    assert "width:25.00%" in stack([(1, "#000"), (0, "#fff")], 4)
    assert "#fff" not in stack([(1, "#000"), (0, "#fff")], 4)


def test_it_needs_the_standard_library_alone() -> None:
    code = ("import sys, neurojepa.report; "
            "print([n for n in ('numpy', 'torch', 'matplotlib') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

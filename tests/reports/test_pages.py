"""The parts of a page."""

from __future__ import annotations

from vardistill.reports.pages import document, masthead, pairs, scroll_table

TEXT = "<i>&"
ESCAPED = "&lt;i&gt;&amp;"


def test_text_is_escaped() -> None:
    page = document(TEXT, "", TEXT)
    assert page.count(ESCAPED) == 2
    top = masthead("Bench", TEXT, {"steps": TEXT}, TEXT)
    assert top.count(ESCAPED) == 3
    assert pairs([(TEXT, TEXT)]).count(ESCAPED) == 2
    assert scroll_table([], [TEXT]).count(ESCAPED) == 1
    assert not any(TEXT in markup for markup in (page, top))


def test_a_style_of_its_own_follows_the_common_one() -> None:
    own = "p { color: red; }"
    style = document("t", "", "f", own).split("<style>")[1].split("</style>")[0]
    assert style == document("t", "", "f").split("<style>")[1].split("</style>")[0] + own


def test_facts_that_are_none_are_left_out() -> None:
    assert masthead("Bench", "t", {"steps": None, "seeds": 2}).count("<li>") == 1
    assert "<p>" not in masthead("Bench", "t", {})

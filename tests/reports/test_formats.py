"""How numbers and metrics read in a page."""

from __future__ import annotations

from vardistill.reports.formats import METRICS, duration, fixed, metric_of, percent, sentence_case, significant


def test_numbers_are_easy_to_read() -> None:
    assert [duration(v) for v in (4.26, 59.4, 3599, 3600 * 5.5)] == ["4.3 s", "59 s", "59 min 59 s", "5 h 30 min"]
    assert [percent(v) for v in (0.00034, 0.0064, 0.25, 1.0)] == ["0.034 %", "0.64 %", "25.0 %", "100.0 %"]
    assert [significant(v) for v in (1234.5, 0.00012345, -2.0)] == ["1,234", "0.000123", "−2"]
    assert [fixed(2)(-8.5), fixed(3, signed=True)(0.05)] == ["−8.50", "+0.050"]


def test_a_metric_that_is_not_known_has_its_name() -> None:
    assert metric_of("off_mode") is METRICS["off_mode"]
    assert metric_of("own").title == "own"
    assert metric_of("seconds", "Seconds").title == "Seconds"
    assert metric_of("own").show(0.5) == "0.5"


def test_a_sentence_begins_and_ends_as_one() -> None:
    assert [sentence_case(words) for words in ("one; two", "")] == ["One; two.", ""]

"""Progress of reading is a line now and then where there is no terminal."""

from kd_cli.data import reading_progress
from kd_cli.data.reading_progress import ReadingProgress


def test_a_line_says_how_much_is_read_and_how_long_the_rest_takes(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(reading_progress, "EVERY", 0.0)
    with ReadingProgress("decoded", "pictures", 2000) as progress:
        progress.add(1000)
    assert caplog.messages == ["decoded 1,000 of 2,000 pictures, 0 s left"]


def test_what_is_read_soon_is_not_reported(caplog):
    caplog.set_level("INFO")
    with ReadingProgress("decoded", "pictures", 10) as progress:
        progress.add(10)
    assert caplog.messages == []

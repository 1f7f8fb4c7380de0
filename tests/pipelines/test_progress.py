import logging

from pipelines.progress import Progress, format_seconds


def test_durations_are_formatted_in_hours_minutes_and_seconds():
    assert [format_seconds(value) for value in (0.4, 59.2, 93.4, 4000)] == ["0s", "59s", "1m33s", "1h06m"]


def test_progress_line_shows_count_rate_and_time_left(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        progress = Progress(logging.getLogger("x"), "encoded", "images", 100, start=20)
        now[0] += 2
        progress.update(30)  # too soon for a line
        now[0] += 8
        progress.update(60, "note")
        now[0] += 1
        progress.update(100)
    assert [record.getMessage() for record in caplog.records] == [
        "encoded 60 of 100 images, 4.0 images/s, 10s left, note",
        "encoded 100 of 100 images, 7.3 images/s, done",
    ]

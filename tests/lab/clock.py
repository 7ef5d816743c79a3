"""A clock that stands still until a test moves it."""

from datetime import UTC, datetime


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)

    def __call__(self):
        return self.now

"""Suites of problems: data, start, floor, and what others have reached."""

"""Fixtures of all tests; the models and texts are in models.py."""

pytest_plugins = ["models"]

"""What all tests share."""

from hypothesis import settings

# Examples are timed by nobody here: a loaded machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

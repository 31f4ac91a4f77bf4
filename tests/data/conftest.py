"""Property tests here write files: on a busy machine an example may take longer than Hypothesis grants it."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

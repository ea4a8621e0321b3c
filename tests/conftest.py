"""The same examples in every run; new ones with ``--hypothesis-profile random``."""

from __future__ import annotations

from hypothesis import settings

# "ci" is Hypothesis' own where it sees a CI machine; here it is the rule everywhere.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("ci")

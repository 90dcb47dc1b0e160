"""What every test shares: Hypothesis without deadlines (machines are noisy), and a printed way to reproduce."""

import os

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "gratis", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
# For `python -m tests.mutation`: whether a fault is found matters there, not how small its example is.
settings.register_profile(
    "mutation", settings.get_profile("gratis"), database=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("GRATIS_TEST_PROFILE", "gratis"))

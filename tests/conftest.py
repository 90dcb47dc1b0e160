"""What every test shares: Hypothesis without deadlines (this machine is noisy), and a printed way to reproduce."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "gratis", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("gratis")

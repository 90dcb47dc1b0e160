"""What the provider reported and charged, beside what was decided: every difference, explained or named as not."""

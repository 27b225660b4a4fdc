"""Running a model: scoring, sampling, generating, text."""

"""Small-scale pretraining of GLM-5."""

"""The HTTP server of `glm5 serve`, which answers as OpenAI's API does."""

"""The HTTP service: an OpenAI-compatible API and sessions, which keep what the model has learned across requests."""

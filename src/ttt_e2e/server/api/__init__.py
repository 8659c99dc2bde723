"""The HTTP endpoints and what they share: request and response schemas, streaming, uploads."""

"""ASGI middleware: access control and limits, request log and metrics."""

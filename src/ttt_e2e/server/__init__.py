"""Sessions as a service: memory that outlives a request, over HTTP."""

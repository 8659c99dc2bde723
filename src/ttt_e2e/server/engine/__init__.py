"""The sessions behind the HTTP API: storage, the thread that runs the model, and concurrent requests."""

"""Models that read and generate: one text as a `Session`, many at once in a `SessionPool`."""

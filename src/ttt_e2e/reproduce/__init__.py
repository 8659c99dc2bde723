"""The paper's comparisons of systems, latency, and needles in a haystack, each by one command."""

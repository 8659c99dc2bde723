"""Sessions as tools of the Model Context Protocol: a folder of them, and the server that offers it."""

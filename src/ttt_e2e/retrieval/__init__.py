"""The exact words of a text beside what the weights learned: a notebook that is searched for passages."""

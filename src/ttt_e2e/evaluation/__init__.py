"""Evaluation: whole documents, with learning and without."""

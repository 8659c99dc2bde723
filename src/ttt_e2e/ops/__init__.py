"""Operators of the model that have more than one implementation."""

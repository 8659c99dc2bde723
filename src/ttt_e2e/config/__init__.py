"""Settings of models and of training runs, presets, and how settings are parsed."""

"""The main job: read a text while learning from it, and report what learning was worth."""

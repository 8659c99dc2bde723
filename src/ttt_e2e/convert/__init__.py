"""Models of other formats, and standard models, converted into model folders."""

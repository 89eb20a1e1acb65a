"""Module and structure in, module out: tracing, resizing and proving."""

"""The loop that drives an objective, what it is fed with, and what it keeps."""

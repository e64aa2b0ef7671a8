"""Runs from a configuration."""

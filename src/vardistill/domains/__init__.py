"""Domains: what points and pictures provide."""

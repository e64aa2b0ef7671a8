"""Points: problems whose truth is known."""

"""What people look at: pages, figures, cards, verdicts."""

"""Pictures: data, and what needs them."""

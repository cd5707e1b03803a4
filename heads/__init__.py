"""Stage 2: heads, losses and metrics on stored features."""

"""Which images there are and which labels they have."""

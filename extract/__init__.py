"""Stage 1: images through a frozen backbone, once, into a store."""

"""A backbone and a head as one model, on images."""

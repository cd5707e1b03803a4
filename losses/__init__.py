"""Losses: one file per family, which ends with the table of its methods."""

"""Run folders -> tables; and how progress and results look on a terminal."""

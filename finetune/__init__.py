"""End to end: backbone and head trained together on images that are streamed."""

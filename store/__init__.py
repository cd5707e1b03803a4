"""The feature cache: one schema in two formats, HDF5 and Zarr v3."""

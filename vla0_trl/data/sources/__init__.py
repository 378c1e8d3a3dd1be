"""Readers of other formats: LeRobotDataset v2.1 and v3.0, and the HDF5 files of LIBERO. Each is a `Source`."""

"""Formats of robot recordings that the converters in data_prep/ read: LeRobot's datasets and LIBERO's HDF5."""

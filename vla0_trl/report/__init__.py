"""Evaluations -> tables (`summary`), pictures (`charts`) and one self-contained HTML page (`page`)."""

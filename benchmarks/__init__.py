"""The replication study: does every part of the method earn its place? See ``benchmarks/replication.py``."""

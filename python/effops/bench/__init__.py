"""Measurements and checks that ship with the library: benchmarks against floors and peers, the self-test, the demo."""

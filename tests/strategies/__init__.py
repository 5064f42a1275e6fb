"""Hypothesis strategies and inputs that the tests share."""

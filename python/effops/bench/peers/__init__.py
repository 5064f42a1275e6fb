"""Whom the ops are measured against. Each is optional: :class:`effops.bench.work.Missing` says why it is absent."""

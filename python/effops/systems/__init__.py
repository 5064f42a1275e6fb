"""Published systems built from the rooms of this package, each an experiment that repeats its paper's claim in small.

Importing this package needs no torch; a system's own module does.
"""

from effops.systems.catalogue import Entry, built, catalogue
from effops.systems.report import Curves, Report, Table

__all__ = ["Curves", "Entry", "Report", "Table", "built", "catalogue"]

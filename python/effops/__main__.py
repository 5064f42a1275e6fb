"""``python -m effops`` is the ``effops`` command."""

from effops.cli import main

raise SystemExit(main())

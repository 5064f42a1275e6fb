"""``effops demo``: real text decoded by plain torch and by effops, side by side."""

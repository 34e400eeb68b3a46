"""How fast an artifact is against the baseline. Imports no ML library."""

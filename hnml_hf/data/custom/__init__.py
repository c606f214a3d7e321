"""Your own folders and tables."""

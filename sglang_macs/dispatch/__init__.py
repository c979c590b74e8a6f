"""The plan in front of a dispatch: which layers are planned, and what carries the rows."""

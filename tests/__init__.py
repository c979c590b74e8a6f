"""The tests. Nothing outside of this folder imports from it."""

"""All that measures: `python -m benchmarks.run` lists it. Nothing here is imported by the package."""

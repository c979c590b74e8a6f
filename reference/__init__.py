"""What every implementation is compared with, in tests and on GPUs: the method in plain Python, random cases, bindings.

Written from docs/design/method.md alone. Imports the package's definitions and none of its operators.
"""

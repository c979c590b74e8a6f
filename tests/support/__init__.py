"""What tests share with each other and with benchmarks/gpu: cases, references, the kernels through ctypes, stand-ins.

Nothing here is a test, and nothing here imports one.
"""

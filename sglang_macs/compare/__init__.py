"""What clipping costs on one's own model and traffic: the same requests to a server with MACS off and on, beside what
two runs with it off differ by. Needs neither torch nor SGLang.
"""

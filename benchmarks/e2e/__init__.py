"""A server of real size, end to end: SGLang alone against SGLang with MACS."""

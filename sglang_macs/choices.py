"""Names and limits that the options, the operators, the counters and the tools share; nothing here needs torch."""

SCOPES = ("expert", "rank")
LOADS = ("rows", "effective")
IMPORTANCES = ("entropy", "gate", "entropy_gate")
REROUTES = ("none", "local", "global")
BUCKETS = (32, 64, 128, 256)
WEIGHT_ONE = 256  # fixed-point 1.0 of an entropy weight, and the units of one row under load=effective

MODALITIES = ("visual", "text")
CLAIMS = ("bound", "text_last")  # what is checked of the rows that are really sent

"""Names and limits that the options, the operators, the counters and the tools share; nothing here needs torch. Those
of csrc/include/macs must be the extension's (ops/definitions.py).
"""

SCOPES = ("expert", "rank")
LOADS = ("rows", "effective")
IMPORTANCES = ("entropy", "gate", "entropy_gate")
REROUTES = ("none", "local", "global")
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
BUCKETS = (32, 64, 128, 256)
WEIGHT_ONE = 256  # fixed-point 1.0 of an entropy weight, and the units of one row under load=effective
NUM_SUMS = 4  # N, N_visual, W_visual, W behind the histogram's [E, 2, B] cells

FORMATS = ("bf16", "fp8", "fp8_power_of_two", "fp8_ue8m0")  # of the fused dispatch's rows on their way
PHASES = ("both", "send", "receive")
FAULTS = (
    "none", "entropies", "assignments", "cuts", "proposals", "counts", "rows", "outputs",
    "bad tokens", "bad expert", "bad count", "overflow", "values",
)  # fmt: skip

MODALITIES = ("visual", "text")
CLAIMS = ("bound", "text_last")  # what is checked of the rows that are really sent
GAMMAS = (1.0, 1.05, 1.1, 1.2, 1.5)  # bounds for which counters say what is above them on the most loaded rank

"""What MACS would buy on a cluster one does not have: loads -> cuts -> times. docs/guide/simulate.md states the model.

loads.py    rows per layer, batch, modality and expert: published, or from a file
replicas.py copies of experts: where they lie, how many rows each gets
cuts.py     what the plan does to such rows: rows per bound, as in docs/design/method.md
times.py    what a layer costs on a machine
study.py    all of it over EP sizes, presets and gammas
picture.py  the study as a picture
"""

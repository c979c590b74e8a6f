"""The releases of SGLang whose internals are hooked and tested, each with the torch that it asks for.

PINNED is what `make build` installs, and `make format` writes it wherever a reader or an installer needs it by name
(tools/pins.py). So another release is one line here. Imports nothing: setup.py runs this file.
"""

TORCH_OF = {
    "0.5.21": "2.13.0",
    "0.5.22": "2.14.1",
    "0.5.23": "2.14.1",
}
SGLANG = tuple(TORCH_OF)
PINNED = "0.5.23"
TORCH = tuple(dict.fromkeys(torch.rpartition(".")[0] for torch in TORCH_OF.values()))  # minor releases

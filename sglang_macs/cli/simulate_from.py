"""`sglang-macs simulate --from`: loads of a running server, of a trace, or of SGLang's expert distribution recorder."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MacsError
from ..observe.server_info import Server, State, missing_ranks
from ..simulate.loads import Loads, checked, noise_of

FLAG = "--from"


def of_server(server: Server) -> Loads:
    """Of its counters since its start, at infinite gamma by modality, under --macs-preset observe by expert alone."""
    states = server.states()
    if missing := missing_ranks(states):
        raise MacsError(FLAG, f"{server.url}, {missing}", "those of all ranks", "Ask a server whose ranks all answer.")
    try:
        return checked(_of_states(states, server.url), FLAG, server.url)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, MacsError):
            raise
        raise MacsError(FLAG, f"{server.url} ({error!r})", "counters of MACS", "Is it of the same version?") from error


def _of_states(states: Sequence[State], url: str) -> Loads:
    first = states[0]
    if any(state.get("expert_rows") for state in states):
        by_layer = _by_layer([state["expert_rows"] for state in states])
        rows = {layer: np.array(table, dtype=float).T for layer, table in by_layer.items()}  # [2, E]
    elif first.get("demand"):
        rows = {int(layer): _split(np.array(table, float), _visual(first)) for layer, table in first["demand"].items()}
    else:
        fix = f"sglang-macs set {url} --gamma inf, or --preset observe; then send it traffic."
        raise MacsError(FLAG, f"{url}, whose counters are by rank alone", "rows by expert", fix)
    measured = {int(layer): facts for layer, facts in first["layers"].items()}
    layers = sorted(layer for layer, table in rows.items() if table.sum() and measured.get(layer, {}).get("dispatches"))
    if not layers:
        raise MacsError(FLAG, f"{url} without a measured prefill pass", "some", "Send it traffic.")
    stacked = np.stack([rows[layer] for layer in layers])
    uneven = [measured[i]["max_over_mean_before"] / measured[i]["dispatches"] for i in layers]
    noise = noise_of(stacked.sum(axis=1), len(measured[layers[0]]["rows_before"]), np.array(uneven))
    source = f"{url}, counters since its start; spread between batches {noise:.2f}, from its max over mean"
    return Loads(source, int(first["top_k"]), stacked[:, None], noise)


def _by_layer(tables: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
    """[E, 2] of each layer, summed over ranks."""
    found: dict[int, np.ndarray] = {}
    for table in tables:
        for layer, rows in table.items():
            found[int(layer)] = found.get(int(layer), 0) + np.array(rows, dtype=float)
    return found


def _visual(state: State) -> float:
    """The visual share of the tokens, of R_v where a visual token weighs 0.5."""
    share = state["observed_share"] / max(state["observed_passes"], 1)
    return 2 * share / (1 + share)


def _split(rows: np.ndarray, visual: float) -> np.ndarray:
    """[..., 2, E] of rows [..., E]: both modalities over the experts alike."""
    return np.stack([visual * rows, (1 - visual) * rows], axis=-2)


def of_trace(folder: str) -> Loads:
    """Of the latest run of --macs-trace: each pass is a batch."""
    from ..observe import trace

    read = trace.load(folder)
    rows = np.stack([step.experts for step in read.steps], axis=1)  # [L, B, 2, E]
    rows = rows[:, (rows.sum(axis=(2, 3)) > 0).all(axis=0)]
    return checked(Loads(f"{folder}, run {read.run}, {rows.shape[1]} passes", read.top_k, rows), FLAG, folder)


def of_dump(path: str, visual_share: float, top_k: int) -> Loads:
    """Of what POST /dump_expert_distribution_record writes in mode stat: each pass is a batch, of both modalities
    alike. Nothing that the file holds is run.
    """
    try:
        import torch
    except ImportError as error:
        raise MacsError(FLAG, f"{path}, and no torch", "torch to read .pt files with", "pip install torch") from error
    try:
        counts = torch.load(path, map_location="cpu", weights_only=True)["logical_count"].double().numpy()
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise _no_dump(path, error) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _no_dump(path, error) from error
    if counts.ndim != 3:
        raise _no_dump(path, f"counts of shape {counts.shape}")
    counts = counts[(counts.sum(axis=2) > 0).any(axis=1)]  # of passes that ran
    counts = counts[:, (counts.sum(axis=2) > 0).any(axis=0)]  # layers with experts
    counts = counts[(counts.sum(axis=2) > 0).all(axis=1)]
    rows = _split(counts.swapaxes(0, 1), visual_share)
    return checked(Loads(f"{path}, {len(counts)} passes", top_k, rows), FLAG, path)


def _no_dump(path: str, why: object) -> MacsError:
    what = " ".join(str(why).split())[:160]
    fix = "Start SGLang with --expert-distribution-recorder-mode stat."
    return MacsError(FLAG, f"{path} ({what})", "a .pt of SGLang's expert distribution recorder", fix)


def source(text: str) -> str:
    """Of what kind it is: "server", "trace" or "dump". Raises MacsError for what is none."""
    if text.startswith(("http://", "https://")):
        return "server"
    if text and Path(text).is_dir():
        return "trace"
    if Path(text).suffix == ".pt":
        return "dump"
    raise MacsError(FLAG, repr(text), "an address, a folder of --macs-trace, or a .pt of SGLang's", "")

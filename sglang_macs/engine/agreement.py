"""Proof, in the first passes of a server, that all ranks have the same options and decide alike which batches are
planned, and in which of DeepEP's modes a pass is.

The plan's exchange is collective, and so is a dispatch: a rank that enters one alone waits for ever. What ranks decide
from depends on SGLang's parallel flags, so the first passes compare the decisions themselves, until one had ranks of
unequal load.
"""

import hashlib

import torch
import torch.distributed as dist

from ..errors import MacsNotActive
from ..plan.batch import SKIP_REASONS, Batch

PASSES = 32  # at most this many are compared: where attention is not data-parallel, loads are always equal


class Agreement:
    """Compares the decisions of the ranks of one EP group. Collective while it lasts, and all ranks end it together.

    Args:
        group: process group on the host.
        flags: the launch's parallel flags, for the error.
        options: what must be the same on every node, in words.
    """

    def __init__(self, group: dist.ProcessGroup, flags: str, options: str = "") -> None:
        self._group, self._flags, self._left = group, flags, PASSES
        self._options = _number_of(options)

    def again(self, options: str) -> None:
        """The next passes are compared, too: options have changed, on all ranks before the same pass."""
        self._options, self._left = _number_of(options), PASSES

    def check(self, decided: Batch, own_tokens: int, prefill_in_group: bool = False) -> None:
        """Before a pass. own_tokens: of this rank; prefill_in_group: whether any rank prefills, as SGLang has it
        (`is_extend_in_batch`), by which `--deepep-mode auto` chooses. Raises MacsNotActive, on every rank, where they
        do not agree.
        """
        if not self._left:
            return
        skip = SKIP_REASONS.index(decided.skip) if decided.skip else -1
        left = _number_of(str(sorted(decided.no_gain)))
        decision = [
            skip,
            decided.group_tokens,
            decided.leaves_alone + 2 * decided.makes_room,
            decided.measured,
            prefill_in_group,
        ]
        mine = [self._options, *decision, left, own_tokens]
        everyone = torch.empty((dist.get_world_size(self._group), len(mine)), dtype=torch.int64)
        dist.all_gather(list(everyone.unbind()), torch.tensor(mine), group=self._group)
        if bool((everyone[:, 0] != everyone[0, 0]).any()):
            other = int((everyone[:, 0] != everyone[0, 0]).nonzero()[0])
            raise MacsNotActive(
                f"rank {other} has other --macs options, profile or expert locations than rank 0; pass the same"
            )
        if bool((everyone[:, :-2] != everyone[0, :-2]).any()):
            raise MacsNotActive(f"{self._disagreement(everyone)}; serve without MACS, and report {self._flags}")
        if bool((everyone[:, -2] != left).any()):
            raise MacsNotActive(
                f"the ranks do not agree which layers are planned; pass --macs-act always, and report {self._flags}"
            )
        self._left = 0 if bool((everyone[:, -1] != own_tokens).any()) else self._left - 1

    @staticmethod
    def _disagreement(everyone: torch.Tensor) -> str:
        said = [
            f"rank {rank} {'plans' if skip < 0 else 'skips as ' + SKIP_REASONS[skip]} {tokens} tokens ({own} its own), "
            f"{'with' if prefill else 'without'} a prefill"
            for rank, (_, skip, tokens, _, _, prefill, _, own) in enumerate(everyone.tolist())
        ]
        return f"the ranks do not agree on a batch: {', '.join(said[:8])}"


def _number_of(text: str) -> int:
    """Of 56 bits, which tells texts apart."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

"""SGLang's top-k: which ways of routing a plan can follow, and what its outputs leave out."""

from ..errors import MacsNotActive
from . import moe_config, worker
from .hooks import Hook
from .refusal import or_exit


@or_exit
def _topk_init(result, self, *args, **kwargs):
    """AFTER TopK.__init__: how this layer routes, whatever the model's configuration made the launcher believe."""
    config, topk = worker.current().config, self.topk_config
    if config.reroute == "none" or config.changes_nothing:
        return
    special = ""
    if topk.custom_routing_function is not None:
        special = "a routing function of the model's own"
    elif topk.correction_bias is not None:
        special = "a correction bias in the selection"
    elif topk.scoring_func != "softmax":
        special = f"{topk.scoring_func} scores"
    elif topk.use_grouped_topk:
        special = moe_config.group_limit(topk.num_expert_group, topk.topk_group)
    if special:
        raise MacsNotActive(f"re-routing cannot follow {special}; pass --macs-reroute none")


def logits_of(topk_output):
    """[T, E] router logits or None. SGLang's empty output carries K columns where E belong."""
    return topk_output.router_logits if topk_output.topk_ids.shape[0] else None


def routed_nowhere(topk_output, rows: int):
    """The top-k, or as many rows of none: with two-batch overlap, SGLang pads an idle rank's rows in decode and hands
    over a top-k of no rows, on which DeepEP dies.
    """
    if not topk_output.topk_ids.shape[0] < rows:
        return topk_output
    top_k = topk_output.topk_ids.shape[1]
    nowhere = topk_output.topk_ids.new_full((rows, top_k), -1)
    return topk_output._replace(topk_ids=nowhere, topk_weights=topk_output.topk_weights.new_zeros((rows, top_k)))


HOOKS = (Hook("sglang.srt.layers.moe.topk.TopK.__init__", _topk_init, "after"),)

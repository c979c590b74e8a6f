"""The MoE runner `--moe-runner-backend macs`. On CPU it hands the rows to SGLang's native expert loop."""

from . import worker
from .hooks import Hook

RUNNER = "macs"
_UNQUANT = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"


def register_name() -> None:
    """In SGLang's list of backends, which is asked before the runner itself is needed."""
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    register_moe_runner_backend_name(RUNNER)


def register() -> None:
    """Our core in SGLang's registry."""
    from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    class RunnerCore(DispatchMoeRunnerCore):
        @property
        def runner_backend(self):
            return resolve_moe_runner_backend(RUNNER)

        def run_from_dispatch(self, dispatch_output, quant_info, runner_config, hooks=None):
            from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
            from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

            worker.current().stats.runner_calls += 1
            topk, rows = dispatch_output.topk_output, dispatch_output.hidden_states
            return StandardCombineInput(moe_forward_native(quant_info.layer, rows, topk, runner_config))

    register_moe_runner_core(RUNNER, RunnerCore)


def _create_moe_runner(result, self, layer, moe_runner_config):
    """AFTER UnquantizedFusedMoEMethod.create_moe_runner: the registered core where the flag asks for it."""
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    backend = get_moe_runner_backend()
    if backend.value == RUNNER:
        self.runner = MoeRunner(backend, moe_runner_config)


def _forward_moe(original, self, layer, dispatch_output):
    """AROUND UnquantizedFusedMoEMethod.forward_cpu and forward_native, which bypass the runner: through ours where
    asked for.
    """
    from sglang.srt.layers.moe.moe_runner.base import MoeQuantInfo

    if self.runner.runner_backend.value != RUNNER:
        return original(self, layer, dispatch_output)

    class LayerInfo(MoeQuantInfo):
        """The expert weights, unquantised: the layer itself."""

        def __init__(self, layer) -> None:
            self.layer = layer

    return self.runner.run(dispatch_output, LayerInfo(layer))


HOOKS = (
    Hook(f"{_UNQUANT}.create_moe_runner", _create_moe_runner, "after"),
    Hook(f"{_UNQUANT}.forward_cpu", _forward_moe, "around"),  # with AMX
    Hook(f"{_UNQUANT}.forward_native", _forward_moe, "around"),  # without
)

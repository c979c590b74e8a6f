"""Run as a program: `sglang.Engine` in this process, with MACS configured from Python. Prints one JSON line.

python engine_program.py MODEL < list of prompts as JSON
"""

import json
import sys


def main() -> None:
    import sglang

    from sglang_macs.config import MacsConfig, configure

    configure(MacsConfig.from_preset("rank", gamma=float("inf"), min_tokens=0, verify=True))
    engine = sglang.Engine(
        model_path=sys.argv[1],
        device="cpu",
        tp_size=2,
        moe_a2a_backend="macs",
        max_total_tokens=4096,
        max_running_requests=4,
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": 12}
        ids = [engine.generate(text, sampling)["output_ids"] for text in json.load(sys.stdin)]
        state = engine.get_server_info()["internal_states"][0]["macs"]
    finally:
        engine.shutdown()
    print(json.dumps({"ids": ids, "macs": state}))


if __name__ == "__main__":
    main()

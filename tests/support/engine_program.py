"""Run as a program: one `sglang.Engine` with MACS in this process and, if asked for, then one without. Prints one JSON
line.

python engine_program.py MODEL [another] < list of prompts as JSON
"""

import json
import sys

SAMPLING = {"temperature": 0, "max_new_tokens": 12}


def main() -> None:
    import sglang

    prompts = json.load(sys.stdin)
    common = {"model_path": sys.argv[1], "device": "cpu", "max_total_tokens": 4096, "max_running_requests": 4}
    options = {"macs_gamma": float("inf"), "macs_min_tokens": 0, "macs_verify": True}
    engine = sglang.Engine(**common, tp_size=2, moe_a2a_backend="macs", **options)
    try:
        ids = [engine.generate(text, SAMPLING)["output_ids"] for text in prompts]
        state = engine.get_server_info()["internal_states"][0]["macs"]
    finally:
        engine.shutdown()
    found = {"ids": ids, "macs": state}
    if "another" in sys.argv:
        engine = sglang.Engine(**common)
        try:
            found["after"] = engine.generate(prompts[0], SAMPLING)["output_ids"]
            found["without"] = "macs" not in engine.get_server_info()["internal_states"][0]
        finally:
            engine.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

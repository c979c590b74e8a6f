"""The subcommands of `sglang-macs`, one module each: HELP, `add_arguments(parser)` and `run(args) -> int`."""

#!/usr/bin/env bash
# Compiles the plugin. It needs a C++20 compiler and nothing else: neither CUDA nor NCCL.
#
#   tools/rma_tcp/build.sh [LIBRARY]     LIBRARY: default build/librma_tcp.so
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
library=${1:-$here/../../build/librma_tcp.so}
mkdir -p "$(dirname "$library")"
"${CXX:-g++}" -std=c++20 -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden "$here"/*.cc -o "$library" -ldl

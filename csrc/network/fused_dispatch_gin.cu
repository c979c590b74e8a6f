// fused_dispatch with rows and signals over NCCL's GIN where a peer is not direct. Compiled by `make check-network`, not
// part of the extension: it has not been run.
#include "gin_network.cuh"
#define MACS_NETWORK GinNetwork
#include "../cuda/fused_dispatch.cu"

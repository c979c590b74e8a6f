// Stands in for CUDA's header of this name: clusters only.
#pragma once
#include "emulator/scheduler.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return static_cast<unsigned>(emulator::cluster_blocks()); }
  unsigned block_rank() const { return static_cast<unsigned>(emulator::cluster_rank()); }
  void sync(emulator::Where where = emulator::Where::current()) const {
    emulator::cluster_arrive();
    emulator::cluster_wait(where);
  }
  template <class T>
  T* map_shared_rank(T* shared, int block) const {
    return static_cast<T*>(emulator::map_to_block(shared, block));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

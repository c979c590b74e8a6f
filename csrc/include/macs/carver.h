// Parts that lie behind one another in one piece of memory. No torch.
#pragma once

namespace macs {

// Offsets in bytes, each a multiple of `alignment`.
template <class Offset>
class Carver {
 public:
  explicit Carver(Offset alignment) : alignment_(alignment) {}

  Offset take(Offset bytes) {
    const Offset mine = end_;
    end_ += (bytes + alignment_ - 1) / alignment_ * alignment_;
    return mine;
  }
  // Of all parts.
  Offset bytes() const { return end_; }

 private:
  const Offset alignment_;
  Offset end_ = 0;
};

}  // namespace macs

// Frames between ranks, and a TCP connection that carries them without blocking.
#pragma once
#include <chrono>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "abi.h"

namespace rma_tcp {

using Clock = std::chrono::steady_clock;

enum class Kind : uint32_t { kPut, kGet, kDone, kData, kBye };

// In front of `length` bytes of payload if `kind` is kPut or kData. Regions are named by id.
struct Frame {
  uint32_t magic;
  Kind kind;
  uint64_t request;  // of the rank that asked; comes back with kDone and kData
  uint64_t length;
  uint64_t offset;
  uint64_t signal_offset;
  uint64_t signal_add;
  uint32_t region;
  uint32_t signal_region;
  uint32_t signals;   // 0 or 1
  uint32_t checksum;  // of the fields before it
};

// How long a peer may be silent while something is awaited of it (RMA_TCP_TIMEOUT, seconds).
Clock::duration patience();

// What to do with a whole frame and its payload; called from pump().
using Receive = std::function<void(const Frame&, const std::vector<char>&)>;
// Whether the frame may be taken in: raises Error where not. Called before its payload is.
using Admit = std::function<void(const Frame&)>;

class Connection {
 public:
  // Owns `fd`. index: among the connections to this peer.
  Connection(int fd, int peer, int index);
  ~Connection();
  Connection(const Connection&) = delete;

  // Queues a frame. plain: a put without a signal, which may leave after later ones. awaited: an answer will come.
  void send(Frame frame, const char* payload, bool plain, bool awaited);
  // Writes what may leave and reads what has come. Raises Error where the peer is gone or silent.
  void pump(const Admit& admit, const Receive& receive);
  // Tells the peer that nothing follows, so that it does not take the end for a fault.
  void bye();

  const int peer, index;
  uint64_t sent_bytes = 0;

 private:
  struct Message {
    std::vector<char> bytes;
    Clock::time_point queued;
  };

  void release();  // what is held back, in reverse order
  void write_due();
  void read_come(const Admit& admit, const Receive& receive);
  void check_silence() const;
  [[noreturn]] void lost(int error) const;
  std::string who() const;

  const int fd_;
  std::deque<Message> out_;
  size_t written_ = 0;  // of the first message
  std::vector<Message> held_;
  std::vector<char> in_;
  bool admitted_ = false, ended_ = false;
  int awaited_ = 0;
  Clock::time_point heard_ = Clock::now();
};

// ---- Sockets, blocking, for what all ranks do together. `who` stands in errors. ----

int listen_here(char* address, size_t bytes);  // on RMA_TCP_ADDRESS; writes "address:port"
int connect_to(const std::string& address, const std::string& who);
// -1 where nobody has come by `deadline`.
int accept_before(int listener, Clock::time_point deadline);
void send_all(int fd, const void* data, size_t bytes, const std::string& who);
void receive_all(int fd, void* data, size_t bytes, const std::string& who);

}  // namespace rma_tcp

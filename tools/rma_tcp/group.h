// The ranks of a communicator: what they do together, and the contexts through which they write to each other.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "wire.h"

namespace rma_tcp {

class Group;

struct Request {
  uint64_t id;
  int peer;
  const Region* into = nullptr;  // of a get
  uint64_t offset = 0, length = 0;
  bool done = false;
  class Context* context = nullptr;
};

// Connections to the ranks of a group, some a peer; a put's context chooses among them.
class Context {
 public:
  Context(Group& group, const ContextConfig& config);
  ~Context();

  Request* put(int index, const Region* from, uint64_t at, size_t bytes, const Region* to, uint64_t offset, int rank,
               const Region* signal, uint64_t signal_offset, uint64_t add);
  Request* get(int index, const Region& from, uint64_t at, size_t bytes, const Region& into, uint64_t offset, int rank);
  void progress();
  void forget(Request* done) { open_.erase(done->id); }
  std::string report() const;  // what was carried

  Group& group;

 private:
  void connect(int stride);
  Connection& to(int index, int rank);
  Request* ask(Connection&, Frame, const char* payload, bool plain);
  void admit(const Connection&, const Frame&) const;
  void answer(Connection&, const Frame&, const std::vector<char>& payload);

  const int width_;                               // connections to each peer
  std::vector<std::vector<Connection*>> to_;      // [ranks][width_], empty where there are none
  std::vector<std::unique_ptr<Connection>> all_;  // these, and this rank's other ends of those to itself
  std::map<uint64_t, std::unique_ptr<Request>> open_;
  uint64_t puts_ = 0, signals_ = 0, gets_ = 0, next_request_ = 1;
};

// Where a group's ranks meet. Calls of register_memory() and of Context's constructor are collective.
class Group {
 public:
  // addresses: of all ranks, as listen_here() wrote them. listener: its socket, which the group takes.
  Group(const std::vector<std::string>& addresses, int rank, int listener);
  ~Group();

  const Region* register_memory(char* data, size_t size, bool on_gpu);
  void deregister(const Region* region);
  const Region& region(uint32_t id) const;

  bool failed() {
    std::lock_guard lock(mutex);
    return !error.empty();
  }

  // Sends `value` to all ranks and returns theirs. Raises Error where another rank is not doing `what`.
  std::vector<uint64_t> gather(const std::string& what, uint64_t value);

  int connect(int to, uint32_t meeting, uint32_t index);
  // The connection that `from` has made for this meeting.
  int accept(int from, uint32_t meeting, uint32_t index);

  const std::vector<std::string> addresses;
  const int ranks, rank;
  std::recursive_mutex mutex;  // of what follows, and of the contexts: NCCL's threads and the application's
  std::string error;           // the first; every later call fails by it
  uint32_t contexts = 0;

 private:
  struct Hello {
    uint32_t rank, meeting, index;
    auto operator<=>(const Hello&) const = default;
  };

  const int listener_;
  std::map<Hello, int> early_;  // connections that came before they were asked for
  std::vector<int> control_;    // [ranks], -1 for this one
  uint32_t calls_ = 0, registered_ = 0;
  std::map<uint32_t, std::unique_ptr<Region>> regions_;
};

}  // namespace rma_tcp

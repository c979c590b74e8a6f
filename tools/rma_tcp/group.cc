#include "group.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fault.h"

namespace rma_tcp {

namespace {
std::string name(int rank) { return "rank " + std::to_string(rank); }
}  // namespace

Group::Group(const std::vector<std::string>& addresses, int rank, int listener)
    : addresses(addresses), ranks(static_cast<int>(addresses.size())), rank(rank), listener_(listener) {
  control_.assign(ranks, -1);
  for (int r = rank + 1; r < ranks; ++r) control_[r] = connect(r, 0, 0);
  for (int r = 0; r < rank; ++r) control_[r] = accept(r, 0, 0);
  gather("connecting", ranks);
}

Group::~Group() {
  for (const int fd : control_) {
    if (fd >= 0) close(fd);
  }
  for (const auto& [hello, fd] : early_) close(fd);
  close(listener_);
}

int Group::connect(int to, uint32_t meeting, uint32_t index) {
  const int fd = connect_to(addresses[to], name(to));
  const Hello hello{static_cast<uint32_t>(rank), meeting, index};
  send_all(fd, &hello, sizeof hello, name(to));
  return fd;
}

int Group::accept(int from, uint32_t meeting, uint32_t index) {
  const Hello wanted{static_cast<uint32_t>(from), meeting, index};
  const auto deadline = Clock::now() + patience();
  while (true) {
    if (const auto found = early_.find(wanted); found != early_.end()) {
      const int fd = found->second;
      early_.erase(found);
      return fd;
    }
    const int fd = accept_before(listener_, deadline);
    if (fd < 0) throw Error(kRemoteError, name(from) + " has not connected in time");
    Hello hello;
    receive_all(fd, &hello, sizeof hello, "a rank that connects");
    early_[hello] = fd;
  }
}

std::vector<uint64_t> Group::gather(const std::string& what, uint64_t value) {
  struct Word {
    uint32_t call;
    char what[36];
    uint64_t value;
  } mine{calls_++, {}, value};
  std::strncpy(mine.what, what.c_str(), sizeof mine.what - 1);
  std::vector<uint64_t> values(ranks, value);
  for (int r = 0; r < ranks; ++r) {
    if (r != rank) send_all(control_[r], &mine, sizeof mine, name(r));
  }
  for (int r = 0; r < ranks; ++r) {
    if (r == rank) continue;
    Word theirs;
    receive_all(control_[r], &theirs, sizeof theirs, name(r));
    theirs.what[sizeof theirs.what - 1] = 0;
    if (theirs.call != mine.call || std::strcmp(theirs.what, mine.what) != 0) {
      throw Error(kInvalidArgument, name(r) + " is " + theirs.what + " (call " + std::to_string(theirs.call) +
                                        "), expected " + mine.what + " (call " + std::to_string(mine.call) +
                                        ") as on " + name(rank));
    }
    values[r] = theirs.value;
  }
  return values;
}

const Region* Group::register_memory(char* data, size_t size, bool on_gpu) {
  if (on_gpu) use_current_cuda_context();
  auto made = std::make_unique<Region>(Region{registered_++, data, size, on_gpu, {}});
  made->sizes = gather("registering memory", size);
  const Region* region = made.get();
  {
    std::lock_guard lock(mutex);
    regions_[made->id] = std::move(made);
  }
  gather("done registering", region->id);  // nobody writes to a region that another does not know yet
  return region;
}

void Group::deregister(const Region* region) {
  std::lock_guard lock(mutex);
  regions_.erase(region->id);
}

const Region& Group::region(uint32_t id) const {
  const auto found = regions_.find(id);
  if (found == regions_.end()) throw Error(kInvalidArgument, "region " + std::to_string(id) + " is not registered");
  return *found->second;
}

// ---- Contexts ----

namespace {
int connections_to_a_peer(int contexts) {
  const char* text = std::getenv("RMA_TCP_CONNECTIONS");
  const int most = text ? std::atoi(text) : 4;
  if (most < 1) {
    throw Error(kInvalidArgument, std::string("RMA_TCP_CONNECTIONS=") + text + ": expected a number above 0");
  }
  return std::min(most, contexts);
}
}  // namespace

Context::Context(Group& group, const ContextConfig& config)
    : group(group), width_(connections_to_a_peer(config.contexts)), to_(group.ranks) {
  const int stride = config.rank_stride;
  if (config.contexts < 1 || stride < 1 || group.ranks % stride) {
    throw Error(kInvalidArgument, "got " + std::to_string(config.contexts) + " contexts and a stride of " +
                                      std::to_string(stride) + ", expected at least 1 and a divisor of " +
                                      std::to_string(group.ranks) + " ranks");
  }
  const uint64_t mine = static_cast<uint64_t>(width_) << 32 | static_cast<uint32_t>(stride);
  const auto shapes = group.gather("creating contexts", mine);
  for (int r = 0; r < group.ranks; ++r) {
    if (shapes[r] != mine) throw Error(kInvalidArgument, name(r) + " creates contexts of another number or stride");
  }
  connect(stride);
}

void Context::connect(int stride) {
  const uint32_t meeting = ++group.contexts;
  const auto add = [&](int fd, int peer, int index) {
    all_.push_back(std::make_unique<Connection>(fd, peer, index));
    return all_.back().get();
  };
  for (int r = group.rank % stride; r < group.ranks; r += stride) {
    to_[r].resize(width_);
    for (int i = 0; i < width_ && r >= group.rank; ++i) to_[r][i] = add(group.connect(r, meeting, i), r, i);
  }
  for (int r = group.rank % stride; r <= group.rank; r += stride) {
    for (int i = 0; i < width_; ++i) {
      Connection* made = add(group.accept(r, meeting, i), r, i);
      if (r != group.rank) to_[r][i] = made;
    }
  }
}

Context::~Context() {
  for (const auto& connection : all_) connection->bye();
}

Connection& Context::to(int index, int rank) {
  if (rank < 0 || rank >= group.ranks || to_[rank].empty()) {
    throw Error(kInvalidArgument, "this context has no connection to " + name(rank));
  }
  return *to_[rank][index % width_];
}

Request* Context::ask(Connection& connection, Frame frame, const char* payload, bool plain) {
  auto request = std::make_unique<Request>();
  request->id = frame.request = next_request_++;
  request->peer = connection.peer;
  request->length = frame.length;
  request->context = this;
  Request* made = request.get();
  open_[made->id] = std::move(request);
  connection.send(frame, payload, plain, true);
  return made;
}

Request* Context::put(int index, const Region* from, uint64_t at, size_t bytes, const Region* to, uint64_t offset,
                      int rank, const Region* signal, uint64_t signal_offset, uint64_t add) {
  Connection& connection = this->to(index, rank);
  Frame frame{};
  frame.kind = Kind::kPut;
  std::vector<char> payload(bytes);
  if (bytes > 0) {
    from->check("put from", group.rank, at, bytes);
    to->check("put to", rank, offset, bytes);
    from->read(at, payload.data(), bytes);
    frame.length = bytes, frame.offset = offset, frame.region = to->id;
  }
  if (signal) {
    signal->check("signal", rank, signal_offset, sizeof(uint64_t));
    if (signal_offset % sizeof(uint64_t)) throw Error(kInvalidArgument, "signal: expected an offset of whole 8 bytes");
    frame.signals = 1, frame.signal_region = signal->id, frame.signal_offset = signal_offset, frame.signal_add = add;
  }
  ++(signal ? signals_ : puts_);
  return ask(connection, frame, payload.data(), !signal);
}

Request* Context::get(int index, const Region& from, uint64_t at, size_t bytes, const Region& into, uint64_t offset,
                      int rank) {
  from.check("get from", rank, at, bytes);
  into.check("get into", group.rank, offset, bytes);
  Frame frame{};
  frame.kind = Kind::kGet, frame.length = bytes, frame.offset = at, frame.region = from.id;
  ++gets_;
  Request* request = ask(to(index, rank), frame, nullptr, false);
  request->into = &into, request->offset = offset;
  return request;
}

void Context::progress() {
  enter_cuda_context();
  for (const auto& connection : all_) {
    connection->pump(
        [&](const Frame& frame) { admit(*connection, frame); },
        [&](const Frame& frame, const std::vector<char>& payload) { answer(*connection, frame, payload); });
  }
}

void Context::admit(const Connection& from, const Frame& frame) const {
  try {
    if (frame.kind == Kind::kPut || frame.kind == Kind::kGet) {
      if (frame.length > 0) group.region(frame.region).check("memory", group.rank, frame.offset, frame.length);
      if (frame.signals) {
        group.region(frame.signal_region).check("signal", group.rank, frame.signal_offset, sizeof(uint64_t));
      }
    } else if (frame.kind == Kind::kDone || frame.kind == Kind::kData) {
      const auto asked = open_.find(frame.request);
      if (asked == open_.end() || asked->second->peer != from.peer || asked->second->done) {
        throw Error(kRemoteError, "an answer to what was not asked");
      }
      if (frame.kind == Kind::kData && frame.length != asked->second->length) {
        throw Error(kRemoteError, "an answer of " + std::to_string(frame.length) + " bytes, expected " +
                                      std::to_string(asked->second->length));
      }
    }
  } catch (const Error& error) {
    throw Error(kRemoteError, name(from.peer) + " sent a frame that is refused: " + error.what());
  }
}

void Context::answer(Connection& connection, const Frame& frame, const std::vector<char>& payload) {
  Frame reply{};
  reply.request = frame.request;
  switch (frame.kind) {
    case Kind::kPut:
      if (!payload.empty()) group.region(frame.region).write(frame.offset, payload.data(), payload.size());
      if (frame.signals) group.region(frame.signal_region).add(frame.signal_offset, frame.signal_add);
      reply.kind = Kind::kDone;
      return connection.send(reply, nullptr, false, false);
    case Kind::kGet: {
      std::vector<char> bytes(frame.length);
      if (!bytes.empty()) group.region(frame.region).read(frame.offset, bytes.data(), bytes.size());
      reply.kind = Kind::kData, reply.length = bytes.size();
      return connection.send(reply, bytes.data(), false, false);
    }
    default: {
      Request& request = *open_.at(frame.request);
      if (frame.kind == Kind::kData && !payload.empty()) {
        request.into->write(request.offset, payload.data(), payload.size());
      }
      request.done = true;
    }
  }
}

std::string Context::report() const {
  uint64_t bytes = 0;
  for (const auto& connection : all_) bytes += connection->peer == group.rank ? 0 : connection->sent_bytes;
  return "carried over TCP: " + std::to_string(puts_) + " puts, " + std::to_string(signals_) + " with a signal, " +
         std::to_string(gets_) + " gets, " + std::to_string(bytes) + " bytes sent to other ranks";
}

}  // namespace rma_tcp

#include "wire.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fault.h"

namespace rma_tcp {

namespace {

constexpr uint32_t kMagic = 0x52544350;
constexpr auto kHeld = std::chrono::milliseconds(1);  // the longest that a put waits for others to overtake it

uint32_t checksum(const Frame& frame) {  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(&frame);
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < offsetof(Frame, checksum); ++i) hash = (hash ^ bytes[i]) * 16777619u;
  return hash;
}

bool has_payload(const Frame& frame) { return frame.kind == Kind::kPut || frame.kind == Kind::kData; }

std::string seconds(Clock::duration time) {
  return std::to_string(std::chrono::duration_cast<std::chrono::seconds>(time).count()) + " s";
}

[[noreturn]] void fail(const std::string& what) { throw Error(kSystemError, what + ": " + std::strerror(errno)); }

}  // namespace

namespace {
Clock::duration read_patience() {
  const char* text = std::getenv("RMA_TCP_TIMEOUT");
  const int value = text ? std::atoi(text) : 30;
  if (value < 1) throw Error(kInvalidArgument, std::string("RMA_TCP_TIMEOUT=") + text + ": expected whole seconds");
  return std::chrono::seconds(value);
}
}  // namespace

Clock::duration patience() {
  static const Clock::duration read = read_patience();
  return read;
}

Connection::Connection(int fd, int peer, int index) : peer(peer), index(index), fd_(fd) {
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

Connection::~Connection() { close(fd_); }

std::string Connection::who() const {
  return "rank " + std::to_string(peer) + " (connection " + std::to_string(index) + ")";
}

void Connection::lost(int error) const {
  if (error == ECONNRESET || error == EPIPE) throw Error(kRemoteError, who() + " has closed its connection");
  throw Error(kRemoteError, who() + " cannot be reached: " + std::strerror(error));
}

void Connection::send(Frame frame, const char* payload, bool plain, bool awaited) {
  Faults& fault = faults();
  if (frame.kind == Kind::kPut && fault.corrupt_offset.exchange(false)) frame.offset += 1ull << 40;
  frame.magic = kMagic;
  frame.checksum = checksum(frame);
  const uint64_t bytes = has_payload(frame) ? frame.length : 0;
  if (frame.kind == Kind::kPut && fault.corrupt_length.exchange(false)) frame.length += 4096;
  Message message{std::vector<char>(sizeof frame + bytes), Clock::now()};
  std::memcpy(message.bytes.data(), &frame, sizeof frame);
  std::memcpy(message.bytes.data() + sizeof frame, payload, bytes);
  if (awaited && awaited_++ == 0) heard_ = Clock::now();
  if (plain && fault.reorder > 1) {
    held_.push_back(std::move(message));
    if (static_cast<int>(held_.size()) >= fault.reorder) release();
    return;
  }
  release();
  out_.push_back(std::move(message));
}

void Connection::release() {
  while (!held_.empty()) {
    out_.push_back(std::move(held_.back()));
    held_.pop_back();
  }
}

void Connection::bye() {
  if (ended_ || faults().close == peer || faults().silent == peer) return;
  release();
  fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_NONBLOCK);
  Frame frame{};
  frame.magic = kMagic, frame.kind = Kind::kBye;
  frame.checksum = checksum(frame);
  out_.push_back({std::vector<char>(sizeof frame), Clock::now()});
  std::memcpy(out_.back().bytes.data(), &frame, sizeof frame);
  for (const Message& message : out_) {  // what the peer has not taken by now it will not miss, or has said so
    const ssize_t n = ::send(fd_, message.bytes.data() + written_, message.bytes.size() - written_, MSG_NOSIGNAL);
    if (n < 0) break;
    written_ = 0;
  }
  out_.clear();
}

void Connection::write_due() {
  const Faults& fault = faults();
  if (!held_.empty() && Clock::now() - held_.front().queued > kHeld) release();
  if (fault.silent == peer) return;
  const bool delayed = fault.delayed_connection < 0 || fault.delayed_connection == index;
  const auto delay = std::chrono::microseconds(delayed ? fault.delay.load() : 0);
  while (!out_.empty() && out_.front().queued + delay <= Clock::now()) {
    const std::vector<char>& bytes = out_.front().bytes;
    const ssize_t n = ::send(fd_, bytes.data() + written_, bytes.size() - written_, MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n < 0) lost(errno);
    sent_bytes += n;
    written_ += n;
    if (written_ < bytes.size()) return;
    written_ = 0;
    out_.pop_front();
  }
}

void Connection::read_come(const Admit& admit, const Receive& receive) {
  while (true) {
    size_t wanted = sizeof(Frame);
    if (admitted_) wanted += reinterpret_cast<const Frame*>(in_.data())->length;
    if (in_.size() < wanted) {
      const size_t have = in_.size();
      in_.resize(wanted);
      const ssize_t n = recv(fd_, in_.data() + have, wanted - have, 0);
      in_.resize(have + std::max<ssize_t>(n, 0));
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (n <= 0) lost(n == 0 ? ECONNRESET : errno);
      heard_ = Clock::now();
      if (in_.size() < wanted) continue;
    }
    Frame frame;
    std::memcpy(&frame, in_.data(), sizeof frame);
    if (!admitted_) {
      if (frame.magic != kMagic || frame.checksum != checksum(frame)) {
        throw Error(kRemoteError, who() + " sent a corrupt frame: length " + std::to_string(frame.length) +
                                      ", offset " + std::to_string(frame.offset) + ", expected checksum " +
                                      std::to_string(checksum(frame)) + ", got " + std::to_string(frame.checksum));
      }
      admit(frame);
      if (has_payload(frame) && frame.length > 0) {
        admitted_ = true;
        continue;
      }
    }
    std::vector<char> payload(in_.begin() + sizeof frame, in_.end());
    in_.clear();
    admitted_ = false;
    if (frame.kind == Kind::kBye) {
      ended_ = true;
      return;
    }
    if (frame.kind == Kind::kDone || frame.kind == Kind::kData) --awaited_;
    receive(frame, payload);
  }
}

void Connection::check_silence() const {
  if (awaited_ > 0 && ended_) throw Error(kRemoteError, who() + " has ended while an answer of it is awaited");
  if (awaited_ > 0 && Clock::now() - heard_ > patience()) {
    throw Error(kRemoteError, who() + " has been silent for " + seconds(patience()) + " with " +
                                  std::to_string(awaited_) + " answers due");
  }
}

void Connection::pump(const Admit& admit, const Receive& receive) {
  if (faults().close == peer && !ended_) {
    shutdown(fd_, SHUT_RDWR);
    ended_ = true;
  }
  if (!ended_) write_due();
  if (!ended_) read_come(admit, receive);
  if (!ended_) write_due();  // the answers to what has come
  check_silence();
}

int listen_here(char* address, size_t bytes) {
  const char* host = std::getenv("RMA_TCP_ADDRESS");
  sockaddr_in at{};
  at.sin_family = AF_INET;
  if (inet_pton(AF_INET, host ? host : "127.0.0.1", &at.sin_addr) != 1) {
    throw Error(kInvalidArgument, std::string("RMA_TCP_ADDRESS=") + host + ": expected an IPv4 address of this host");
  }
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length = sizeof at;
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&at), length) || listen(fd, SOMAXCONN) ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&at), &length)) {
    if (fd >= 0) close(fd);
    fail(std::string("listening on ") + (host ? host : "127.0.0.1"));
  }
  char text[INET_ADDRSTRLEN];
  inet_ntop(AF_INET, &at.sin_addr, text, sizeof text);
  std::snprintf(address, bytes, "%s:%d", text, ntohs(at.sin_port));
  return fd;
}

namespace {
void prepare(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  const auto time = std::chrono::duration_cast<std::chrono::microseconds>(patience()).count();
  const timeval limit{time / 1000000, time % 1000000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);  // connect() waits no longer either
  // A cut cable is found even where this rank only waits to be signalled: probes, given up after as long.
  const int every = 1, most = static_cast<int>(time / 1000), probes = std::max(1, most / 1000);
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &every, sizeof every);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every, sizeof every);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &most, sizeof most);
}
}  // namespace

int connect_to(const std::string& address, const std::string& who) {
  const size_t colon = address.find(':');
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(std::atoi(address.c_str() + colon + 1)));
  if (inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr) != 1) {
    throw Error(kInvalidArgument, who + ": got the address " + address + ", expected IPv4:PORT");
  }
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) fail("socket");
  prepare(fd);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to)) {
    const int error = errno;
    close(fd);
    throw Error(kRemoteError, who + " at " + address + " cannot be reached: " + std::strerror(error));
  }
  return fd;
}

int accept_before(int listener, Clock::time_point deadline) {
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return -1;
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, static_cast<int>(std::min<int64_t>(left, 1000))) <= 0) continue;
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) continue;
    prepare(fd);
    return fd;
  }
}

void send_all(int fd, const void* data, size_t bytes, const std::string& who) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = ::send(fd, static_cast<const char*>(data) + done, bytes - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error(kRemoteError, who + " cannot be reached: " + std::strerror(errno));
    done += n;
  }
}

void receive_all(int fd, void* data, size_t bytes, const std::string& who) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = recv(fd, static_cast<char*>(data) + done, bytes - done, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) throw Error(kRemoteError, who + " has not answered for " + seconds(patience()));
    if (n <= 0) throw Error(kRemoteError, who + " has closed its connection");
    done += n;
  }
}

}  // namespace rma_tcp

/* The mode stream: one connection sends as much as it can, and all comes back. */
#include "load.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define CHUNK_BYTES 65536
/* For one answer of poll(). */
#define PATIENCE_MS 10000

/* The stream is one chunk, again and again. */
static const char *expected(size_t at) { return pattern(0, 0) + at % CHUNK_BYTES; }

static size_t least(size_t one, size_t other) { return one < other ? one : other; }

static size_t send_chunk(Channel *channel, size_t sent, size_t total) {
  size_t bytes = least(CHUNK_BYTES - sent % CHUNK_BYTES, total - sent);
  ssize_t count = send_some(channel, expected(sent), bytes);
  return count == WOULD_BLOCK ? 0 : (size_t)count;
}

static size_t receive_chunk(Channel *channel, size_t received) {
  static char data[CHUNK_BYTES];
  ssize_t count = receive_some(channel, data, CHUNK_BYTES - received % CHUNK_BYTES);
  if (count == WOULD_BLOCK) return 0;
  if (memcmp(data, expected(received), (size_t)count) != 0) fail("the server sends something else back");
  return (size_t)count;
}

static short await(Channel *channel, bool sends) {
  struct pollfd polled = {.fd = channel->fd, .events = (short)(POLLIN | (sends ? POLLOUT : 0))};
  int ready = poll(&polled, 1, PATIENCE_MS);
  if (ready < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
  if (ready == 0) fail("the server does not answer");
  return polled.revents;
}

void run_stream(const Options *options) {
  size_t total = (size_t)options->bytes, sent = 0, received = 0;
  pid_t server = (pid_t)options->server;
  make_patterns(CHUNK_BYTES, 0);
  Channel channel = open_channel(options, 0);
  double begun = now(), cpu = cpu_seconds(server);
  while (received < total) {
    short ready = await(&channel, sent < total);
    if (ready & POLLOUT) sent += send_chunk(&channel, sent, total);
    if (ready & ~POLLOUT) received += receive_chunk(&channel, received);
  }
  double end = now();
  cpu = cpu_seconds(server) - cpu;
  double mebibytes = (double)total / (1 << 20);
  close_channel(&channel);
  print_figures((Figure[]){
      {"rate", mebibytes / (end - begun)},
      {"cpu", cpu * 1e6 / mebibytes},
      {"busy", cpu / (end - begun)},
      {"memory", resident_bytes(server)},
      {NULL, 0},
  });
}

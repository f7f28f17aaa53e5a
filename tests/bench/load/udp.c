/* The mode udp: echo of datagrams; one that was not answered in time is counted as lost, and sent again. */
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#define MAX_SOCKETS 1024
#define MAX_BYTES 65507
#define WARM_UP 0.25
#define WAIT_MS 20
#define PATIENCE_SECONDS 0.05

static struct pollfd sockets[MAX_SOCKETS];
static double begun[MAX_SOCKETS];
static long turns[MAX_SOCKETS];
static size_t bytes;
static bool is_counting;
static long answers, losses;

static int open_socket(int port) {
  struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof server) != 0) fail("socket: %s", strerror(errno));
  return fd;
}

static void begin(int i, double time) {
  /* One that does not fit, or is refused, counts as lost later. */
  send(sockets[i].fd, pattern(i, turns[i]), bytes, 0);
  begun[i] = time;
}

static void receive(int i) {
  char data[MAX_BYTES];
  ssize_t count = recv(sockets[i].fd, data, sizeof data, 0);
  if (count < 0 && errno == ECONNREFUSED) fail("the server is gone");
  if (count < 0) return;
  /* It may be the late answer to a datagram that was sent again. */
  if ((size_t)count != bytes || memcmp(data, pattern(i, turns[i]), bytes) != 0) return;
  double time = now();
  if (is_counting) record(time - begun[i]);
  answers += is_counting;
  turns[i]++;
  begin(i, time);
}

static void run_until(double end, int count) {
  for (double time; (time = now()) < end;) {
    int ready = poll(sockets, (nfds_t)count, WAIT_MS);
    for (int i = 0; i < count; i++) {
      if (sockets[i].revents != 0) receive(i);
      if (ready == count || time - begun[i] < PATIENCE_SECONDS) continue;
      losses += is_counting;
      begin(i, time);
    }
  }
}

void run_udp(const Options *options) {
  int count = (int)options->connections;
  pid_t server = (pid_t)options->server;
  bytes = (size_t)options->bytes;
  if (count > MAX_SOCKETS || bytes > MAX_BYTES) fail("there are at most %d sockets", MAX_SOCKETS);
  make_patterns(bytes, 0);
  for (int i = 0; i < count; i++) {
    sockets[i] = (struct pollfd){.fd = open_socket((int)options->port), .events = POLLIN};
    begin(i, now());
  }
  run_until(now() + options->seconds * WARM_UP, count);
  is_counting = true;
  double start = now(), cpu = cpu_seconds(server);
  run_until(start + options->seconds, count);
  double end = now();
  cpu = cpu_seconds(server) - cpu;
  print_figures((Figure[]){
      {"rate", (double)answers / (end - start)},
      {"cpu", cpu * 1e6 / (double)answers},
      {"busy", cpu / (end - start)},
      {"p50", percentile(0.5)},
      {"p99", percentile(0.99)},
      {"p999", percentile(0.999)},
      {"losses", (double)losses},
      {NULL, 0},
  });
}

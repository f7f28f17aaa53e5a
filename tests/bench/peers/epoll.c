/* An echo server with epoll and one thread, which prints its port when it listens: what the machine can do. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 4096
#define EVENTS 1024
#define BUFFER_BYTES 65536

static void end_with(const char *what) {
  perror(what);
  exit(1);
}

static int listen_anywhere(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, length) != 0) end_with("bind");
  if (listen(listener, BACKLOG) != 0) end_with("listen");
  getsockname(listener, (struct sockaddr *)&address, &length);
  printf("%d\n", ntohs(address.sin_port));
  fflush(stdout);
  return listener;
}

static void allow_descriptors(void) {
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

static void watch(int poller, int fd) {
  struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

static void welcome(int poller, int listener) {
  const int on = 1;
  int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
  if (fd < 0) return;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  watch(poller, fd);
}

/* Waits where the client does not read, which costs the others; in an echo of small messages it does not happen. */
static int send_all(int fd, const char *data, ssize_t bytes) {
  while (bytes > 0) {
    ssize_t count = send(fd, data, (size_t)bytes, MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN) return -1;
    if (count < 0) poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
    else data += count, bytes -= count;
  }
  return 0;
}

static void echo(int fd) {
  static char data[BUFFER_BYTES];
  ssize_t bytes = recv(fd, data, sizeof data, 0);
  if (bytes <= 0 || send_all(fd, data, bytes) != 0) close(fd);
}

int main(void) {
  struct epoll_event events[EVENTS];
  allow_descriptors();
  int poller = epoll_create1(0), listener = listen_anywhere();
  watch(poller, listener);
  for (;;) {
    int ready = epoll_wait(poller, events, EVENTS, -1);
    for (int i = 0; i < ready; i++) {
      if (events[i].data.fd == listener) welcome(poller, listener);
      else echo(events[i].data.fd);
    }
  }
}

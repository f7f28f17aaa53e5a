#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#endif

/* Descriptors besides those of the connections. */
#define SPARE_DESCRIPTORS 16
/* Addresses to connect from: one alone runs out of ports when many connections are opened and closed. */
#define SOURCES 100

void allow_connections(int connections) {
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  rlim_t needed = (rlim_t)connections + SPARE_DESCRIPTORS;
  if (limit.rlim_max >= needed) return;
  fail("%ld descriptors are needed, and the limit (ulimit -Hn) is %ld", (long)needed, (long)limit.rlim_max);
}

static void stop_blocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

static int connect_unix(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path) fail("the path %s is too long", path);
  strcpy(address.sun_path, path);
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  if (fd < 0) fail("socket: %s", strerror(errno));
  /* It waits for room in the backlog, which it would not tell of if it did not block. */
  if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) fail("connect: %s", strerror(errno));
  stop_blocking(fd);
  return fd;
}

static struct sockaddr_in loopback(int host, int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK - 1 + (uint32_t)host);
  return address;
}

static int connect_tcp(int port, int index, bool blocks) {
  const int on = 1;
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0) fail("socket: %s", strerror(errno));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  /* The port is chosen when it connects, as then it has to be free for this one server only. */
  setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
  struct sockaddr_in source = loopback(1 + index % SOURCES, 0), server = loopback(1, port);
  if (bind(fd, (struct sockaddr *)&source, sizeof source) != 0) fail("bind: %s", strerror(errno));
  if (!blocks) stop_blocking(fd);
  if (connect(fd, (struct sockaddr *)&server, sizeof server) != 0 && errno != EINPROGRESS) {
    fail("connect: %s", strerror(errno));
  }
  return fd;
}

#ifdef WITH_TLS

static void *secure(int fd) {
  static SSL_CTX *context = NULL;
  if (context == NULL) {
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  }
  SSL *ssl = SSL_new(context);
  SSL_set_fd(ssl, fd);
  if (SSL_connect(ssl) != 1) fail("the TLS handshake failed");
  return ssl;
}

static ssize_t secured(Channel *channel, int result, const char *verb) {
  if (result > 0) return result;
  int error = SSL_get_error(channel->ssl, result);
  if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return WOULD_BLOCK;
  fail("%s over TLS failed, or the server closed a connection", verb);
}

static ssize_t send_secure(Channel *channel, const char *data, size_t bytes) {
  return secured(channel, SSL_write(channel->ssl, data, (int)bytes), "send");
}

static ssize_t receive_secure(Channel *channel, char *into, size_t bytes) {
  return secured(channel, SSL_read(channel->ssl, into, (int)bytes), "receive");
}

static void free_secure(void *ssl) {
  SSL_shutdown(ssl);
  SSL_free(ssl);
}

#else

static void *secure(int fd) {
  (void)fd;
  fail("it was built without TLS, as the headers of OpenSSL are missing (libssl-dev)");
}

static ssize_t send_secure(Channel *channel, const char *data, size_t bytes) {
  (void)data, (void)bytes;
  secure(channel->fd);
  return WOULD_BLOCK;
}

static ssize_t receive_secure(Channel *channel, char *into, size_t bytes) { return send_secure(channel, into, bytes); }

static void free_secure(void *ssl) { (void)ssl; }

#endif

Channel open_channel(const Options *options, int index) {
  if (options->path != NULL) return (Channel){connect_unix(options->path), NULL};
  bool is_tls = options->tls > 0;
  int fd = connect_tcp((int)options->port, index, is_tls);
  if (!is_tls) return (Channel){fd, NULL};
  Channel channel = {fd, secure(fd)};
  stop_blocking(fd);
  return channel;
}

static ssize_t unless_blocked(ssize_t count, const char *verb) {
  if (count >= 0) return count;
  if (errno == EAGAIN || errno == EINTR) return WOULD_BLOCK;
  fail("%s: %s", verb, strerror(errno));
}

ssize_t send_some(Channel *channel, const char *data, size_t bytes) {
  if (channel->ssl != NULL) return send_secure(channel, data, bytes);
  return unless_blocked(send(channel->fd, data, bytes, MSG_NOSIGNAL), "send");
}

ssize_t receive_some(Channel *channel, char *into, size_t bytes) {
  if (channel->ssl != NULL) return receive_secure(channel, into, bytes);
  ssize_t count = recv(channel->fd, into, bytes, 0);
  if (count == 0) fail("the server closed a connection");
  return unless_blocked(count, "receive");
}

void close_channel(Channel *channel) {
  if (channel->ssl != NULL) free_secure(channel->ssl);
  close(channel->fd);
}

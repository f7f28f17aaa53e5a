/* What the parts of the load generator share. */
#ifndef LOAD_H
#define LOAD_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Of an answer that is not an echo. */
#define MAX_REPLY 1024

/* --- options.c: what the command line asks for --- */

typedef struct {
  const char *mode;    /* echo, idle, stream or udp */
  const char *path;    /* of a Unix socket; if NULL, it is a port of 127.0.0.1 */
  double port;         /* of the server */
  double tls;          /* 1: encrypted */
  double server;       /* process id of the server, whose time and memory are measured */
  double connections;
  double bytes;        /* of a message; of all of them in a stream */
  double reply;        /* bytes of an answer that is not an echo; 0: it is one */
  double line;         /* bytes of each line in a message; 0: there are no lines */
  double exchanges;    /* after which a connection is closed and another one opened; 0: never */
  double newcomers;    /* connections that come one after the other while the others are busy */
  double seconds;      /* that are measured; a warm-up comes before them */
  double silence;      /* seconds that idle connections are silent before the server's memory is measured */
} Options;

Options parse_options(int count, char **arguments);

/* --- report.c: the one line of JSON that comes out --- */

/* Prints an error as JSON, and ends the program. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Prints `{"NAME":VALUE,...}`; the names end with a NULL. */
typedef struct {
  const char *name;
  double value;
} Figure;
void print_figures(const Figure *figures);

/* --- clock.c: time that passes, and what the server takes of it --- */

/* Seconds since some time in the past. */
double now(void);
/* Seconds of processor time that the threads of a process have taken. */
double cpu_seconds(pid_t process);
/* Bytes of memory that a process has resident. */
double resident_bytes(pid_t process);
void sleep_seconds(double seconds);
/* Ends the program with an error after so many seconds, wherever it hangs. */
void give_up_after(double seconds);

/* --- histogram.c: latencies, within 1.6 % --- */

void record(double seconds);
/* Microseconds that a part of the latencies, such as 0.999, does not exceed. */
double percentile(double part);

/* --- pattern.c: messages that are told apart --- */

void make_patterns(size_t bytes, size_t line);
/* The bytes of message number `turn` on a connection. */
const char *pattern(int connection, long turn);
/* Whether a part of the answer to `message` is the same as in all such answers before. */
bool is_known_reply(const char *message, size_t offset, const char *data, size_t bytes);

/* --- channel.c: a connection, plain or encrypted, that never blocks once it is open --- */

#define WOULD_BLOCK (-1)

typedef struct {
  int fd;
  void *ssl; /* NULL: plain */
} Channel;

/* Lets the process have as many descriptors as `connections` need. */
void allow_connections(int connections);
/* Over TCP it may be under way yet, and sending would block. */
Channel open_channel(const Options *options, int index);
/* Bytes that were taken, or WOULD_BLOCK. */
ssize_t send_some(Channel *channel, const char *data, size_t bytes);
/* Bytes that came, or WOULD_BLOCK; an end of the stream is an error. */
ssize_t receive_some(Channel *channel, char *into, size_t bytes);
void close_channel(Channel *channel);

/* --- the modes --- */

void run_echo(const Options *options);
void run_idle(const Options *options);
void run_stream(const Options *options);
void run_udp(const Options *options);

#endif

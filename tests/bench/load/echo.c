/*
 * The modes echo and idle. Each connection has one message under way: when it has
 * come back, the next one leaves. First all connections are opened, in groups, and
 * exchange one message each; then all begin at once; what happens after a warm-up
 * is counted.
 */
#include "load.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

/* Fewer than any server's backlog. */
#define OPENING_GROUP 100
/* Of the measured time, before it. */
#define WARM_UP 0.25
#define EVENTS 1024
/* How late a newcomer may come. */
#define WAIT_MS 2
#define RECEIVE_BYTES 65536

typedef struct {
  Channel channel;
  int index;
  bool is_newcomer, is_busy, waits_to_send;
  const char *message;
  size_t sent, received;
  double begun; /* the exchange that is under way */
  double first_reply; /* after all have begun; NAN: none yet */
  long turn, exchanges, counted;
} Client;

typedef enum { OPENING, WARMING_UP, COUNTING } Phase;

static const Options *options;
static size_t message_bytes, reply_bytes;
static Phase phase;
static Client *clients;
static int client_count, newcomer_count, busy_count, poller;
static double all_begun;
static double *newcomer_waits;
static int newcomer_answers;

static void watch(Client *client, int operation) {
  uint32_t events = EPOLLIN | (client->waits_to_send ? EPOLLOUT : 0);
  struct epoll_event event = {.events = events, .data.ptr = client};
  if (epoll_ctl(poller, operation, client->channel.fd, &event) != 0) fail("epoll_ctl: %s", strerror(errno));
}

static void open_client(Client *client) {
  client->channel = open_channel(options, client->index);
  client->waits_to_send = false;
  client->exchanges = 0;
  watch(client, EPOLL_CTL_ADD);
}

static void send_rest(Client *client) {
  while (client->sent < message_bytes) {
    ssize_t count = send_some(&client->channel, client->message + client->sent, message_bytes - client->sent);
    if (count == WOULD_BLOCK) break;
    client->sent += (size_t)count;
  }
  bool waits = client->sent < message_bytes;
  if (waits == client->waits_to_send) return;
  client->waits_to_send = waits;
  watch(client, EPOLL_CTL_MOD);
}

static void begin_exchange(Client *client, double time) {
  client->message = pattern(client->index, client->turn++);
  client->sent = client->received = 0;
  client->begun = time;
  client->is_busy = true;
  busy_count++;
  send_rest(client);
}

static void end_exchange(Client *client) {
  client->is_busy = false;
  busy_count--;
  client->exchanges++;
}

static void welcome(Client *client, double time) {
  newcomer_waits[newcomer_answers++] = time - client->begun;
  close_channel(&client->channel);
}

static void count(Client *client, double time) {
  if (isnan(client->first_reply)) client->first_reply = time - all_begun;
  if (phase != COUNTING) return;
  client->counted++;
  record(time - client->begun);
}

/* What follows a message that has come back. */
static void go_on(Client *client) {
  double time = now();
  end_exchange(client);
  if (client->is_newcomer) return welcome(client, time);
  if (phase == OPENING) return;
  count(client, time);
  if (options->exchanges == 0 || client->exchanges < options->exchanges) return begin_exchange(client, time);
  close_channel(&client->channel);
  client->index += client_count; /* The next one comes from another address. */
  time = now();
  open_client(client);
  begin_exchange(client, time);
}

static void check_reply(Client *client, const char *data, size_t bytes) {
  if (client->sent < message_bytes || client->received + bytes > reply_bytes) fail("the server answers too early or too much");
  if (!is_known_reply(client->message, client->received, data, bytes)) fail("the server answers the same differently");
  client->received += bytes;
}

static void check(Client *client, const char *data, size_t bytes) {
  if (options->reply > 0) return check_reply(client, data, bytes);
  if (!client->is_busy || client->received + bytes > client->sent) fail("the server sends more than it was sent");
  if (memcmp(data, client->message + client->received, bytes) != 0) fail("the server sends something else back");
  client->received += bytes;
}

static void receive(Client *client) {
  static char data[RECEIVE_BYTES];
  for (;;) {
    ssize_t bytes = receive_some(&client->channel, data, sizeof data);
    if (bytes == WOULD_BLOCK) return;
    check(client, data, (size_t)bytes);
    if (client->received == reply_bytes) return go_on(client);
  }
}

static void handle_events(void) {
  struct epoll_event events[EVENTS];
  int ready = epoll_wait(poller, events, EVENTS, WAIT_MS);
  for (int i = 0; i < ready; i++) {
    Client *client = events[i].data.ptr;
    if (events[i].events & EPOLLOUT) send_rest(client);
    if (events[i].events & ~(uint32_t)EPOLLOUT) receive(client);
  }
}

static void open_all(void) {
  phase = OPENING;
  for (int i = 0; i < client_count; i++) {
    open_client(&clients[i]);
    begin_exchange(&clients[i], now());
    bool is_group = (i + 1) % OPENING_GROUP == 0 || i + 1 == client_count;
    while (is_group && busy_count > 0) handle_events();
  }
}

static void let_newcomer_in(int number) {
  Client *client = &clients[client_count + number];
  client->is_newcomer = true;
  double time = now();
  open_client(client);
  begin_exchange(client, time);
}

/* Newcomers come at regular times, the first half an interval after the beginning. */
static void run_until(double end, int newcomers) {
  double begun = now(), interval = (end - begun) / (newcomers > 0 ? newcomers : 1);
  for (int came = 0; now() < end;) {
    if (came < newcomers && now() >= begun + (came + 0.5) * interval) let_newcomer_in(came++);
    handle_events();
  }
}

/* Who still waits at the end has waited at least so long: left out, the longest waits would not count. */
static void count_waiting(double end) {
  for (int i = 0; i < client_count + newcomer_count; i++) {
    Client *client = &clients[i];
    if (!client->is_busy) continue;
    if (client->is_newcomer) newcomer_waits[newcomer_answers++] = end - client->begun;
    else record(end - client->begun);
  }
}

static double total_counted(void) {
  double sum = 0;
  for (int i = 0; i < client_count; i++) sum += clients[i].counted;
  return sum;
}

/* 1: all were answered equally often; 1 / client_count: all answers went to one. */
static double jain(void) {
  double sum = total_counted(), squares = 0;
  for (int i = 0; i < client_count; i++) squares += (double)clients[i].counted * clients[i].counted;
  return sum * sum / (client_count * squares);
}

static double slowest_first_reply(double end) {
  double slowest = 0;
  for (int i = 0; i < client_count; i++) {
    slowest = fmax(slowest, isnan(clients[i].first_reply) ? end - all_begun : clients[i].first_reply);
  }
  return slowest;
}

static double never_answered(void) {
  int never = 0;
  for (int i = 0; i < client_count; i++) never += isnan(clients[i].first_reply);
  return never;
}

static int ascending(const void *one, const void *other) {
  double difference = *(const double *)one - *(const double *)other;
  return (difference > 0) - (difference < 0);
}

/* Microseconds. */
static double newcomer_percentile(double part) {
  if (newcomer_answers == 0) return NAN;
  qsort(newcomer_waits, (size_t)newcomer_answers, sizeof *newcomer_waits, ascending);
  return newcomer_waits[(int)(part * (newcomer_answers - 1))] * 1e6;
}

static void prepare(const Options *given) {
  options = given;
  message_bytes = (size_t)given->bytes;
  reply_bytes = given->reply > 0 ? (size_t)given->reply : message_bytes;
  client_count = (int)given->connections;
  newcomer_count = (int)given->newcomers;
  allow_connections(client_count + newcomer_count);
  make_patterns(message_bytes, (size_t)given->line);
  clients = calloc((size_t)(client_count + newcomer_count), sizeof *clients);
  newcomer_waits = calloc((size_t)newcomer_count + 1, sizeof *newcomer_waits);
  poller = epoll_create1(0);
  if (clients == NULL || newcomer_waits == NULL || poller < 0) fail("no memory for so many connections");
  for (int i = 0; i < client_count + newcomer_count; i++) {
    clients[i].index = i;
    clients[i].first_reply = NAN;
  }
}

void run_echo(const Options *given) {
  prepare(given);
  open_all();
  phase = WARMING_UP;
  all_begun = now();
  for (int i = 0; i < client_count; i++) begin_exchange(&clients[i], all_begun);
  run_until(all_begun + given->seconds * WARM_UP, 0);
  phase = COUNTING;
  pid_t server = (pid_t)given->server;
  double begun = now(), cpu = cpu_seconds(server);
  run_until(begun + given->seconds, newcomer_count);
  double end = now(), replies = total_counted();
  cpu = cpu_seconds(server) - cpu;
  count_waiting(end);
  print_figures((Figure[]){
      {"rate", replies / (end - begun)},
      {"cpu", cpu * 1e6 / replies},
      {"busy", cpu / (end - begun)},
      {"p50", percentile(0.5)},
      {"p99", percentile(0.99)},
      {"p999", percentile(0.999)},
      {"max", percentile(1)},
      {"jain", jain()},
      {"slowestFirstReply", slowest_first_reply(end) * 1e6},
      {"neverAnswered", never_answered()},
      {"newcomerP50", newcomer_percentile(0.5)},
      {"newcomerMax", newcomer_percentile(1)},
      {"memory", resident_bytes(server)},
      {NULL, 0},
  });
}

void run_idle(const Options *given) {
  prepare(given);
  double begun = now();
  open_all();
  double end = now();
  sleep_seconds(given->silence);
  print_figures((Figure[]){
      {"rate", client_count / (end - begun)},
      {"memory", resident_bytes((pid_t)given->server)},
      {NULL, 0},
  });
}

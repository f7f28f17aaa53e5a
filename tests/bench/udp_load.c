/* udp_load PORT SOCKETS BYTES SECONDS: closed-loop UDP echo over 127.0.0.1; prints "RATE LOST". */
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_SOCKETS 1024
/* A datagram that was not answered for so long is counted as lost and sent again. */
#define PATIENCE 0.05

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
  if (argc != 5) return fprintf(stderr, "usage: udp_load PORT SOCKETS BYTES SECONDS\n"), 2;
  int count = atoi(argv[2]), bytes = atoi(argv[3]);
  if (count < 1 || count > MAX_SOCKETS || bytes < 0 || bytes > 65507) return 2;
  static char data[65536];
  static struct pollfd sockets[MAX_SOCKETS];
  static double sent[MAX_SOCKETS];
  struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
  inet_pton(AF_INET, "127.0.0.1", &server.sin_addr);
  for (int i = 0; i < count; i++) {
    sockets[i].fd = socket(AF_INET, SOCK_DGRAM, 0);
    sockets[i].events = POLLIN;
    if (connect(sockets[i].fd, (struct sockaddr *)&server, sizeof server)) return perror("connect"), 1;
    fcntl(sockets[i].fd, F_SETFL, O_NONBLOCK);
    send(sockets[i].fd, data, bytes, 0);
    sent[i] = now();
  }
  long answers = 0, lost = 0;
  double begun = now(), end = begun + atof(argv[4]), time;
  while ((time = now()) < end) {
    int ready = poll(sockets, count, 20);
    for (int i = 0; i < count; i++) {
      int isAnswered = (sockets[i].revents & POLLIN) && recv(sockets[i].fd, data, sizeof data, 0) >= 0;
      int isLost = !isAnswered && ready < count && time - sent[i] > PATIENCE;
      if (!isAnswered && !isLost) continue;
      answers += isAnswered;
      lost += isLost;
      send(sockets[i].fd, data, bytes, 0);
      sent[i] = time;
    }
  }
  printf("%.0f %ld\n", answers / (time - begun), lost);
  return 0;
}
